/* Depthwise convolution of channels-last images and both of its gradients, padded by half of an odd kernel.  Images are
   of floats or bfloat16, weights and sums of floats.

   A block of LANES channels at a time, whose rows are copied into a buffer with zeros at both ends: every tap is then
   valid, and each inner loop keeps its sums in registers.  Rows that a tap cannot reach are left out.  The last block
   overlaps the one before it where LANES does not divide the channels.  Threads share out the blocks, so that sums
   do not depend on their number. */

#include "vector.h"

typedef struct {
    const void *x, *gy; /* (N, H, W, C), (N, P, Q, C) */
    const float *w;     /* (C, K, K) */
    void *out;          /* y, gx or gw, whichever is asked for */
    long n, h, wd, c, k, stride, p, q;
    int half, what, part, parts; /* half: bfloat16; 0: y, 1: gx, 2: gw */
    vec *scratch;
} job;

INLINE long least(long a, long b) { return a < b ? a : b; }

/* Rows (h, w) of one block, whose first number is `at`, into (h, width), each pixel `step` further than the last, the
   first at `pad`. */
INLINE void padded(int half, vec *to, const void *from, long at, long h, long w, long c, long width, long pad,
                   long step) {
    memset(to, 0, sizeof(vec) * h * width);
    for (long i = 0; i < h; i++)
        for (long j = 0; j < w; j++) to[i * width + pad + j * step] = get(half, from, at + (i * w + j) * c);
}

/* `T` neighbours of an output row: the taps of the rows from `first` to `last`, which lie `width` apart. */
INLINE void outputs(int half, int T, int K, const vec *row, const vec *w, void *to, long at, long c, long stride,
                    int rows, long width, int skip) {
    vec sum[8];
    for (int t = 0; t < T; t++) sum[t] = (vec){0};
    for (int i = 0; i < rows; i++, row += width, w += skip * K)
        for (int j = 0; j < K; j++)
            for (int t = 0; t < T; t++) sum[t] += row[t * stride + j] * w[j];
    for (int t = 0; t < T; t++) put(half, to, at + t * c, sum[t]);
}

/* y from x, or gx from gy with the kernel turned round: there the rows of gy lie `up` apart. */
INLINE void convolve(int half, int K, const job *a, const void *from, long at, const vec *w, long to, vec *rows, long h,
                     long wd, long up, long stride, long p, long q) {
    long width = stride * (q - 1) + K + up;
    padded(half, rows, from, at, h, wd, a->c, width, K / 2, up);
    for (long i = 0; i < p; i++) {
        long top = i * stride - K / 2, first = top < 0 ? -top : 0; /* first tap, in rows of the image */
        first += (up - (top + first) % up) % up;
        long last = least(K, (h - 1) * up + 1 - top);
        int count = last > first ? (int)((last - first + up - 1) / up) : 0;
        const vec *row = rows + (top + first) / up * width, *tap = w + first * K;
        long j = 0, out = to + i * q * a->c;
#define RUN(T) \
    outputs(half, T, K, row + j * stride, tap, a->out, out + j * a->c, a->c, stride, count, width, (int)up)
        for (; j + 8 <= q; j += 8) RUN(8);
        for (; j + 4 <= q; j += 4) RUN(4);
        if (q - j == 3) RUN(3);
        if (q - j == 2) RUN(2);
        if (q - j == 1) RUN(1);
#undef RUN
    }
}

/* Add to gw (K, K) what one image gives; `U` sums for each tap, so that none waits for the one before. */
INLINE void weights(int half, int K, int U, const job *a, long x, long gy, vec *gw, vec *rows) {
    long width = a->stride * (a->q - 1) + K + 1, c = a->c, s = a->stride;
    padded(half, rows, a->x, x, a->h, a->wd, c, width > a->wd + K - 1 ? width : a->wd + K - 1, K / 2, 1);
    width = width > a->wd + K - 1 ? width : a->wd + K - 1;
    for (int k = 0; k < K; k++) {
        vec sum[16];
        for (int j = 0; j < K * U; j++) sum[j] = (vec){0};
        for (long i = 0; i < a->p; i++) {
            long r = i * s + k - K / 2, o = 0;
            if (r < 0 || r >= a->h) continue;
            const vec *row = rows + r * width;
            long g = gy + i * a->q * c;
            for (; o + U <= a->q; o += U)
                for (int u = 0; u < U; u++)
                    for (int j = 0; j < K; j++)
                        sum[u * K + j] += get(half, a->gy, g + (o + u) * c) * row[(o + u) * s + j];
            for (; o < a->q; o++)
                for (int j = 0; j < K; j++) sum[j] += get(half, a->gy, g + o * c) * row[o * s + j];
        }
        for (int j = 0; j < K; j++) gw[k * K + j] += U > 1 ? sum[j] + sum[K + j] : sum[j];
    }
}

/* Blocks of one thread. */
INLINE void blocks(int half, int K, const job *a) {
    long all = (a->c + LANES - 1) / LANES, from = all * a->part / a->parts, to = all * (a->part + 1) / a->parts;
    vec *taps = a->scratch, *rows = taps + (to - from) * K * K;
    for (long b = from; b < to; b++) {
        long c = least(b * LANES, a->c - LANES);
        vec *w = taps + (b - from) * K * K;
        for (int t = 0; t < K * K; t++)
            for (int l = 0; l < LANES; l++)
                w[t][l] = a->what == 2 ? 0 : a->w[(c + l) * K * K + (a->what ? K * K - 1 - t : t)];
    }
    for (long n = 0; n < a->n; n++)
        for (long b = from; b < to; b++) {
            long c = least(b * LANES, a->c - LANES), in = n * a->h * a->wd * a->c + c, on = n * a->p * a->q * a->c + c;
            vec *w = taps + (b - from) * K * K;
            if (a->what == 0)
                convolve(half, K, a, a->x, in, w, on, rows, a->h, a->wd, 1, a->stride, a->p, a->q);
            else if (a->what == 1)
                convolve(half, K, a, a->gy, on, w, in, rows, a->p, a->q, a->stride, 1, a->h, a->wd);
            else
                weights(half, K, K < 7 ? 2 : 1, a, in, on, w, rows);
        }
    float *gw = a->out;
    for (long b = from; a->what == 2 && b < to; b++)
        for (int t = 0; t < K * K; t++)
            for (int l = 0; l < LANES; l++)
                gw[(least(b * LANES, a->c - LANES) + l) * K * K + t] = taps[(b - from) * K * K + t][l];
}

static void *work(void *argument) {
    const job *a = argument;
    switch (a->half * 8 + a->k) {
    case 1: blocks(0, 1, a); break;
    case 3: blocks(0, 3, a); break;
    case 5: blocks(0, 5, a); break;
    case 7: blocks(0, 7, a); break;
    case 9: blocks(1, 1, a); break;
    case 11: blocks(1, 3, a); break;
    case 13: blocks(1, 5, a); break;
    case 15: blocks(1, 7, a); break;
    }
    return NULL;
}

/* what: 0 y = conv(x, w), 1 gx, 2 gw.  Returns 0, or 1 where nothing was computed. */
int depthwise(int what, int half, const void *x, const float *w, const void *gy, void *out, long n, long h, long wd,
              long c, long k, long stride, int threads) {
    long p = (h - 1) / stride + 1, q = (wd - 1) / stride + 1, all = (c + LANES - 1) / LANES;
    job jobs[MAX_THREADS];
    if (c < LANES || k > 7 || k % 2 == 0) return 1;
    threads = (int)least(least(threads, MAX_THREADS), all);
    long each = (all / threads + 1) * k * k + (h + 1) * (wd + 2 * k + 2 * stride);
    vec *scratch = aligned_alloc(sizeof(vec), sizeof(vec) * each * threads);
    if (!scratch) return 1;
    for (int t = 0; t < threads; t++)
        jobs[t] = (job){x, gy, w, out, n, h, wd, c, k, stride, p, q, half, what, t, threads, scratch + t * each};
    run(work, jobs, sizeof(job), threads);
    free(scratch);
    return 0;
}
