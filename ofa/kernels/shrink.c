/* The kernels of smaller depthwise layers, each the centre of the next larger one times a matrix, and the gradients.

   Of what a matrix gives only the centre is computed that is needed next.  BLOCK channels at a time, in buffers whose
   rows are whole vectors: a product sums multiples of a matrix's rows for several channels, whose sums stay in
   registers meanwhile. */

#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define WIDE(numbers) (((numbers) + LANES - 1) / LANES) /* vectors that hold so many */
#define ROW (WIDE(7 * 7) * LANES)                       /* floats of a buffer */
#define MOST 3                                          /* matrices */
#define BLOCK 8                                         /* channels at a time, and vectors in registers */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

typedef struct {
    int in[MOST + 1], out[MOST + 1]; /* numbers that each gets, and that are needed of what it gives */
    float rows[MOST][ROW * ROW];     /* what is needed of each: a row for each output or, turned, for each input */
} chain;

/* The number of a kernel of `k` taps a side that the tap `t` of its centre, `small` a side, has. */
INLINE int at(int t, int small, int k) { return (t / small + (k - small) / 2) * k + t % small + (k - small) / 2; }

/* The centre k x k of a kernel of `from` x `from` taps. */
INLINE void centre(float *to, const float *larger, int k, int from) {
    int cut = (from - k) / 2;
    for (int i = 0; i < k; i++) memcpy(to + i * k, larger + (i + cut) * from + cut, sizeof(float) * k);
}

/* Of B channels, to = the sum of rows times the channel's factors, V vectors in each row. */
INLINE void product(int V, int B, float (*to)[ROW], const float *rows, float (*factors)[ROW], int count) {
    vec sum[BLOCK];
    for (int i = 0; i < B * V; i++) sum[i] = (vec){0};
    for (int t = 0; t < count; t++)
        for (int b = 0; b < B; b++)
            for (int v = 0; v < V; v++) sum[b * V + v] += ((const vec *)(rows + t * ROW))[v] * factors[b][t];
    for (int b = 0; b < B; b++)
        for (int v = 0; v < V; v++) ((vec *)to[b])[v] = sum[b * V + v];
}

/* Each of the rows += those of B channels, each times the row's factor of the channel. */
INLINE void outer(int V, int B, float *rows, float (*ones)[ROW], float (*factors)[ROW], int count) {
    for (int t = 0; t < count; t++)
        for (int v = 0; v < V; v++) {
            vec *row = (vec *)(rows + t * ROW) + v, sum = *row;
            for (int b = 0; b < B; b++) sum += ((const vec *)ones[b])[v] * factors[b][t];
            *row = sum;
        }
}

/* RUN(V, B) for n channels, B at a time; V, a constant: the vectors in a row of so many numbers. */
#define FOR_VECTORS(numbers, RUN)                                 \
    switch (numbers) {                                            \
    case 1: FOR_CHANNELS(WIDE(1), BLOCK / WIDE(1), RUN) break;    \
    case 9: FOR_CHANNELS(WIDE(9), BLOCK / WIDE(9), RUN) break;    \
    case 25: FOR_CHANNELS(WIDE(25), BLOCK / WIDE(25), RUN) break; \
    default: FOR_CHANNELS(WIDE(49), BLOCK / WIDE(49), RUN)        \
    }
#define FOR_CHANNELS(V, B, RUN)               \
    {                                         \
        int b = 0;                            \
        for (; b + B <= n; b += B) RUN(V, B); \
        for (; b < n; b++) RUN(V, 1);         \
    }

static void prepare(chain *a, int taps, int count, const int *size, const float *const *matrix, int turned) {
    for (int s = 0; s < count; s++) {
        int k = size[s + 1], small = s + 1 < count ? size[s + 2] : taps;
        a->in[s] = k * k, a->out[s] = small * small;
        for (int i = 0; i < (turned ? a->in[s] : a->out[s]); i++) {
            float *row = a->rows[s] + i * ROW;
            memset(row, 0, sizeof(float) * ROW);
            if (turned)
                for (int o = 0; o < a->out[s]; o++) row[o] = matrix[s][at(o, small, k) * k * k + i];
            else
                memcpy(row, matrix[s] + at(i, small, k) * k * k, sizeof(float) * k * k);
        }
    }
}

/* What each matrix up to number `count` gets of n channels, whose rows are turned; the last gets what it gives. */
INLINE void forward(const chain *a, int count, const float *w, float (*got)[BLOCK][ROW], const int *size, int n) {
    for (int b = 0; b < n; b++) centre(got[0][b], w + b * size[0] * size[0], size[1], size[0]);
    for (int s = 0; s < count; s++) {
#define RUN(V, B) product(V, B, got[s + 1] + b, a->rows[s], got[s] + b, a->in[s])
        FOR_VECTORS(a->out[s], RUN)
#undef RUN
    }
}

/* w: (C, K, K) to y: (C, taps, taps), of the kernels of `size` (count + 1), the first of them K. */
void shrink(const float *w, float *y, long channels, int taps, int count, const int *size, const float *const *matrix) {
    chain a;
    float got[MOST + 1][BLOCK][ROW];
    int whole = size[0] * size[0], part = taps * taps;
    prepare(&a, taps, count, size, matrix, 1);
    for (long c = 0; c < channels; c += BLOCK) {
        int n = channels - c < BLOCK ? (int)(channels - c) : BLOCK;
        if (count) forward(&a, count, w + c * whole, got, size, n);
        for (int b = 0; b < n; b++)
            if (count)
                memcpy(y + (c + b) * part, got[count][b], sizeof(float) * part);
            else
                centre(y + (c + b) * part, w + (c + b) * whole, taps, size[0]);
    }
}

/* gy: (C, taps, taps) to gw: (C, K, K), and to the gradient of each matrix. */
void shrink_back(const float *w, const float *gy, float *gw, long channels, int taps, int count, const int *size,
                 const float *const *matrix, float *const *gmatrix) {
    chain turned, a;
    float sums[MOST][ROW * ROW], got[MOST + 1][BLOCK][ROW], g[BLOCK][ROW], next[BLOCK][ROW];
    int whole = size[0] * size[0], part = taps * taps, first = count ? size[1] : taps, cut = (size[0] - first) / 2;
    prepare(&turned, taps, count, size, matrix, 1);
    prepare(&a, taps, count, size, matrix, 0);
    for (int s = 0; s < count; s++) memset(sums[s], 0, sizeof(float) * ROW * a.out[s]);
    memset(got, 0, sizeof got);
    memset(gw, 0, sizeof(float) * channels * whole);
    for (long c = 0; c < channels; c += BLOCK) {
        int n = channels - c < BLOCK ? (int)(channels - c) : BLOCK;
        if (count) forward(&turned, count - 1, w + c * whole, got, size, n);
        for (int b = 0; b < n; b++) memcpy(g[b], gy + (c + b) * part, sizeof(float) * part);
        for (int s = count - 1; s >= 0; s--) {
#define RUN(V, B) \
    outer(V, B, sums[s], got[s] + b, g + b, a.out[s]), product(V, B, next + b, a.rows[s], g + b, a.out[s])
            FOR_VECTORS(a.in[s], RUN)
#undef RUN
            memcpy(g, next, sizeof(float) * ROW * n);
        }
        for (int b = 0; b < n; b++) {
            float *to = gw + (c + b) * whole + cut * size[0] + cut;
            for (int i = 0; i < first; i++) memcpy(to + i * size[0], g[b] + i * first, sizeof(float) * first);
        }
    }
    for (int s = 0; s < count; s++) {
        int k = size[s + 1], small = s + 1 < count ? size[s + 2] : taps;
        memset(gmatrix[s], 0, sizeof(float) * k * k * k * k);
        for (int o = 0; o < small * small; o++)
            memcpy(gmatrix[s] + at(o, small, k) * k * k, sums[s] + o * ROW, sizeof(float) * k * k);
    }
}
