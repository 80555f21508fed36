/* Batch norm by the batch's own statistics and the activation behind it, in two passes over the image each way.

   Images are rows (M, C) of floats.  A block of channels at a time, so that a block that fits into the cache is read
   from memory once; threads share out the blocks, so that sums do not depend on their number.  Means and squares are
   summed over CHUNK rows about the chunk's own mean and merged in double (Chan et al. 1982). */

#include <math.h>
#include <pthread.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define CHUNK 64
#ifndef WIDE
#define WIDE 4 /* vectors of channels at a time */
#endif
#define MAX_THREADS 64
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int mask __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

typedef struct {
    const float *x, *w, *b, *gz;  /* (M, C), (C,), (C,), (M, C) */
    float *mean, *inv;            /* (C,): of the batch, and 1 / sqrt(variance + eps) */
    float *out, *gw, *gb;         /* z or gx (M, C); (C,), (C,) */
    long m, c;
    float eps;
    int act, backward, part, parts; /* act 0: none, 1: ReLU, 2: ReLU6, 3: hard swish */
} job;

INLINE vec all(float value) { return (vec){0} + value; }
INLINE vec keep(vec a, mask where) { return (vec)((mask)a & where); }
INLINE vec lower(vec a, vec b) { mask m = a < b; return (vec)(((mask)a & m) | ((mask)b & ~m)); }
INLINE vec get(const float *p) { return *(const loose *)p; }
INLINE void put(float *p, vec a) { *(loose *)p = a; }

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

/* `B` vectors of channels from c on: statistics, then z. */
INLINE void forward(int B, int act, const job *a, long c) {
    double mean[WIDE * LANES] = {0}, square[WIDE * LANES] = {0};
    for (long from = 0; from < a->m; from += CHUNK) {
        long n = a->m - from < CHUNK ? a->m - from : CHUNK;
        const float *x = a->x + from * a->c + c;
        vec sum[WIDE] = {{0}}, rest[WIDE] = {{0}};
        for (long i = 0; i < n; i++)
            for (int v = 0; v < B; v++) sum[v] += get(x + i * a->c + v * LANES);
        for (int v = 0; v < B; v++) sum[v] *= all(1.0f / (float)n);
        for (long i = 0; i < n; i++)
            for (int v = 0; v < B; v++) {
                vec d = get(x + i * a->c + v * LANES) - sum[v];
                rest[v] += d * d;
            }
        double share = (double)n / (double)(from + n);
        for (int v = 0; v < B; v++)
            for (int l = 0; l < LANES; l++) {
                int k = v * LANES + l;
                double delta = sum[v][l] - mean[k];
                mean[k] += delta * share;
                square[k] += rest[v][l] + delta * delta * share * (double)from;
            }
    }
    for (int k = 0; k < B * LANES; k++) {
        a->mean[c + k] = (float)mean[k];
        a->inv[c + k] = (float)(1 / sqrt(square[k] / (double)a->m + a->eps));
    }
    vec scale[WIDE], shift[WIDE];
    for (int v = 0; v < B; v++) {
        long k = c + v * LANES;
        scale[v] = get(a->w + k) * get(a->inv + k);
        shift[v] = get(a->b + k) - get(a->mean + k) * scale[v];
    }
    for (long i = 0; i < a->m; i++)
        for (int v = 0; v < B; v++) {
            long k = i * a->c + c + v * LANES;
            put(a->out + k, activate(act, get(a->x + k) * scale[v] + shift[v]));
        }
}

/* The same channels: gradients of bias and weight, then gx. */
INLINE void backward(int B, int act, const job *a, long c) {
    double gb[WIDE * LANES] = {0}, gw[WIDE * LANES] = {0};
    vec scale[WIDE], shift[WIDE], mean[WIDE];
    for (int v = 0; v < B; v++) {
        long k = c + v * LANES;
        mean[v] = get(a->mean + k);
        scale[v] = get(a->w + k) * get(a->inv + k);
        shift[v] = get(a->b + k) - mean[v] * scale[v];
    }
    for (long from = 0; from < a->m; from += CHUNK) {
        long to = a->m - from < CHUNK ? a->m : from + CHUNK;
        vec sum[WIDE] = {{0}}, dot[WIDE] = {{0}};
        for (long i = from; i < to; i++)
            for (int v = 0; v < B; v++) {
                long k = i * a->c + c + v * LANES;
                vec x = get(a->x + k), g = slope(act, x * scale[v] + shift[v], get(a->gz + k));
                sum[v] += g, dot[v] += g * (x - mean[v]);
            }
        for (int v = 0; v < B; v++)
            for (int l = 0; l < LANES; l++) gb[v * LANES + l] += sum[v][l], gw[v * LANES + l] += dot[v][l];
    }
    float less[WIDE * LANES], tilt[WIDE * LANES];
    for (int k = 0; k < B * LANES; k++) {
        double i = a->inv[c + k];
        a->gb[c + k] = (float)gb[k], a->gw[c + k] = (float)(gw[k] * i);
        less[k] = (float)(gb[k] / (double)a->m), tilt[k] = (float)(gw[k] * i * i / (double)a->m);
    }
    for (long i = 0; i < a->m; i++)
        for (int v = 0; v < B; v++) {
            long k = i * a->c + c + v * LANES;
            vec x = get(a->x + k), g = slope(act, x * scale[v] + shift[v], get(a->gz + k));
            put(a->out + k, scale[v] * (g - get(less + v * LANES) - (x - mean[v]) * get(tilt + v * LANES)));
        }
}

INLINE void block(int B, int act, const job *a, long c) {
    if (a->backward) backward(B, act, a, c);
    else forward(B, act, a, c);
}

INLINE void share(int act, const job *a) {
    long wide = WIDE * LANES, all = (a->c + wide - 1) / wide, b = all * a->part / a->parts;
    for (; b < all * (a->part + 1) / a->parts; b++)
        if ((b + 1) * wide <= a->c) block(WIDE, act, a, b * wide);
        else
            for (long c = b * wide; c < a->c; c += LANES)
                block(1, act, a, c + LANES <= a->c ? c : a->c - LANES); /* the last overlaps the one before it */
}

static void *work(void *argument) {
    const job *a = argument;
    switch (a->act) {
    case 0: share(0, a); break;
    case 1: share(1, a); break;
    case 2: share(2, a); break;
    case 3: share(3, a); break;
    }
    return NULL;
}

/* Forward: mean, inv and out = z.  Backward: out = gx, gw and gb.  Returns 0, or 1 where nothing was computed. */
int norm(int back, int act, const float *x, const float *w, const float *b, const float *gz, float *mean, float *inv,
         float *out, float *gw, float *gb, long m, long c, float eps, int threads) {
    pthread_t ids[MAX_THREADS];
    job jobs[MAX_THREADS];
    if (c < LANES || act < 0 || act > 3) return 1;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > c / LANES) threads = (int)(c / LANES);
    for (int t = 0; t < threads; t++)
        jobs[t] = (job){x, w, b, gz, mean, inv, out, gw, gb, m, c, eps, act, back, t, threads};
    for (int t = 1; t < threads; t++)
        if (pthread_create(&ids[t], NULL, work, &jobs[t])) ids[t] = 0, work(&jobs[t]);
    work(&jobs[0]);
    for (int t = 1; t < threads; t++)
        if (ids[t]) pthread_join(ids[t], NULL);
    return 0;
}
