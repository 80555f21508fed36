/* Batch norm by the batch's own statistics and the activation behind it, in two passes over the image each way.

   Images are rows (M, C) of floats or bfloat16; all else is floats.  CHUNK rows at a time, which stay in the cache, and
   of these WIDE vectors of channels at a time, whose sums stay in registers: so rows are read from memory in one go.
   Threads share out the channels, so that sums do not depend on their number.  Means and squares are summed over a
   chunk about its own mean and merged in double (Chan et al. 1982). */

#include <math.h>

#include "vector.h"

#define CHUNK 64
#define WIDE 4 /* vectors of channels at a time */

typedef struct {
    const void *x, *gz;   /* images */
    const float *w, *b;   /* (C,) */
    float *mean, *inv;    /* (C,): of the batch, and 1 / sqrt(variance + eps) */
    void *out;            /* z or gx, an image */
    float *gw, *gb;       /* (C,) */
    double *sums;                 /* (2, C): mean and squares, or gradients of bias and weight */
    float *scale, *shift, *less, *tilt; /* (C,): y = scale x + shift; gx = scale (g - less - (x - mean) tilt) */
    long m, c;
    float eps;
    int half, act, backward, part, parts; /* half: bfloat16; act 0: none, 1: ReLU, 2: ReLU6, 3: hard swish */
} job;

INLINE vec all(float value) { return (vec){0} + value; }
INLINE vec keep(vec a, mask where) { return (vec)((mask)a & where); }
INLINE vec lower(vec a, vec b) { mask m = a < b; return (vec)(((mask)a & m) | ((mask)b & ~m)); }
INLINE vec each(const float *p) { return get(0, p, 0); }

INLINE vec activate(int act, vec y) {
    if (act == 1) return keep(y, y > 0);
    if (act == 2) return lower(keep(y, y > 0), all(6));
    if (act == 3) {
        vec t = y + 3;
        return y * lower(keep(t, t > 0), all(6)) * (1 / 6.0f);
    }
    return y;
}

/* g times the activation's slope at y */
INLINE vec slope(int act, vec y, vec g) {
    if (act == 1) return keep(g, y > 0);
    if (act == 2) return keep(g, (y > 0) & (y < 6));
    if (act == 3) {
        mask above = y > 3;
        vec t = keep(y * (1 / 3.0f) + 0.5f, ~above & (y > -3));
        return g * (t + keep(all(1), above));
    }
    return g;
}

/* Rows [from, to), `B` vectors of channels from c on: merge mean and squares into `sums`, but of the first `done`. */
INLINE void statistics(int half, int B, const job *a, long c, int done, long from, long to) {
    vec sum[WIDE] = {{0}}, rest[WIDE] = {{0}};
    for (long i = from; i < to; i++)
        for (int v = 0; v < B; v++) sum[v] += get(half, a->x, i * a->c + c + v * LANES);
    for (int v = 0; v < B; v++) sum[v] *= all(1.0f / (float)(to - from));
    for (long i = from; i < to; i++)
        for (int v = 0; v < B; v++) {
            vec d = get(half, a->x, i * a->c + c + v * LANES) - sum[v];
            rest[v] += d * d;
        }
    double share = (double)(to - from) / (double)to, *mean = a->sums + c, *square = a->sums + a->c + c;
    for (int v = 0; v < B; v++)
        for (int l = v ? 0 : done; l < LANES; l++) {
            int k = v * LANES + l;
            double delta = sum[v][l] - mean[k];
            mean[k] += delta * share;
            square[k] += rest[v][l] + delta * delta * share * (double)from;
        }
}

/* The same rows and channels: add the gradients of bias and weight to `sums`. */
INLINE void gradients(int half, int B, int act, const job *a, long c, int done, long from, long to) {
    vec scale[WIDE], shift[WIDE], mean[WIDE], sum[WIDE] = {{0}}, dot[WIDE] = {{0}};
    for (int v = 0; v < B; v++) {
        mean[v] = each(a->mean + c + v * LANES);
        scale[v] = each(a->scale + c + v * LANES), shift[v] = each(a->shift + c + v * LANES);
    }
    for (long i = from; i < to; i++)
        for (int v = 0; v < B; v++) {
            long k = i * a->c + c + v * LANES;
            vec x = get(half, a->x, k), g = slope(act, x * scale[v] + shift[v], get(half, a->gz, k));
            sum[v] += g, dot[v] += g * (x - mean[v]);
        }
    for (int v = 0; v < B; v++)
        for (int l = v ? 0 : done; l < LANES; l++) {
            long k = c + v * LANES + l;
            a->sums[k] += sum[v][l], a->sums[a->c + k] += dot[v][l];
        }
}

/* The same rows and channels: z or gx. */
INLINE void outputs(int half, int B, int act, const job *a, long c, long from, long to) {
    vec scale[WIDE], shift[WIDE], mean[WIDE], less[WIDE], tilt[WIDE];
    for (int v = 0; v < B; v++) {
        scale[v] = each(a->scale + c + v * LANES), shift[v] = each(a->shift + c + v * LANES);
        less[v] = each(a->less + c + v * LANES), tilt[v] = each(a->tilt + c + v * LANES);
        mean[v] = each(a->mean + c + v * LANES);
    }
    for (long i = from; i < to; i++)
        for (int v = 0; v < B; v++) {
            long k = i * a->c + c + v * LANES;
            vec x = get(half, a->x, k), y = x * scale[v] + shift[v];
            if (a->backward) {
                vec g = slope(act, y, get(half, a->gz, k));
                put(half, a->out, k, scale[v] * (g - less[v] - (x - mean[v]) * tilt[v]));
            } else
                put(half, a->out, k, activate(act, y));
        }
}

/* One pass over all rows of channels [begin, end), CHUNK rows at a time. */
INLINE void pass(int half, int second, int act, const job *a, long begin, long end) {
#define RUN(B, C, DONE)                                           \
    (second        ? outputs(half, B, act, a, C, from, to)         \
     : a->backward ? gradients(half, B, act, a, C, DONE, from, to) \
                   : statistics(half, B, a, C, DONE, from, to))
    for (long from = 0; from < a->m; from += CHUNK) {
        long to = a->m - from < CHUNK ? a->m : from + CHUNK, c = begin;
        for (; c + WIDE * LANES <= end; c += WIDE * LANES) RUN(WIDE, c, 0);
        for (; c + 2 * LANES <= end; c += 2 * LANES) RUN(2, c, 0);
        for (; c + LANES <= end; c += LANES) RUN(1, c, 0);
        if (c < end) RUN(1, end - LANES, (int)(LANES - (end - c))); /* overlaps what is done */
    }
#undef RUN
}

/* Channels [c, end) before the first pass of going back. */
INLINE void affine(const job *a, long c, long end) {
    for (; c < end; c++) a->scale[c] = a->w[c] * a->inv[c], a->shift[c] = a->b[c] - a->mean[c] * a->scale[c];
}

/* Channels [c, end) between the two passes. */
INLINE void totals(const job *a, long c, long end) {
    for (; c < end; c++) {
        double first = a->sums[c], second = a->sums[a->c + c], m = (double)a->m, i = a->inv[c];
        if (a->backward) {
            a->gb[c] = (float)first, a->gw[c] = (float)(second * i);
            a->less[c] = (float)(first / m), a->tilt[c] = (float)(second * i * i / m);
        } else
            a->mean[c] = (float)first, a->inv[c] = (float)(1 / sqrt(second / m + a->eps));
    }
}

/* The channels of one thread. */
INLINE void share(int half, int act, const job *a) {
    long wide = WIDE * LANES, blocks = (a->c + wide - 1) / wide;
    long begin = blocks * a->part / a->parts * wide, end = blocks * (a->part + 1) / a->parts * wide;
    if (end > a->c) end = a->c;
    if (a->backward) affine(a, begin, end);
    pass(half, 0, act, a, begin, end);
    totals(a, begin, end);
    if (!a->backward) affine(a, begin, end);
    pass(half, 1, act, a, begin, end);
}

static void *work(void *argument) {
    const job *a = argument;
    switch (2 * a->act + a->half) {
    case 0: share(0, 0, a); break;
    case 1: share(1, 0, a); break;
    case 2: share(0, 1, a); break;
    case 3: share(1, 1, a); break;
    case 4: share(0, 2, a); break;
    case 5: share(1, 2, a); break;
    case 6: share(0, 3, a); break;
    case 7: share(1, 3, a); break;
    }
    return NULL;
}

/* Forward: mean, inv and out = z.  Backward: out = gx, gw and gb.  Returns 0, or 1 where nothing was computed. */
int norm(int back, int half, int act, const void *x, const float *w, const float *b, const void *gz, float *mean,
         float *inv, void *out, float *gw, float *gb, long m, long c, float eps, int threads) {
    job jobs[MAX_THREADS];
    if (c < LANES || act < 0 || act > 3) return 1;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > c / (WIDE * LANES)) threads = (int)(c / (WIDE * LANES));
    if (threads < 1) threads = 1;
    double *sums = calloc((size_t)c, 2 * sizeof(double) + 4 * sizeof(float));
    if (!sums) return 1;
    float *f = (float *)(sums + 2 * c);
    for (int t = 0; t < threads; t++)
        jobs[t] = (job){x, gz,    w,         b,         mean, inv, out, gw,   gb,  sums, f,
                        f + c, f + 2 * c, f + 3 * c, m,    c,   eps, half, act, back, t,    threads};
    run(work, jobs, sizeof(job), threads);
    free(sums);
    return 0;
}
