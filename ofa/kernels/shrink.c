/* The kernels of smaller depthwise layers, each the centre of the next larger one times a matrix, and the gradients.

   Of what a matrix gives only the centre is computed that is needed next.  One channel at a time, in buffers whose rows
   are whole vectors: a product sums multiples of a matrix's rows, which stay in registers meanwhile. */

#include <string.h>

#define WIDEST 7
#define ROW 56 /* floats of a buffer: WIDEST * WIDEST rounded up to vectors of 8 */
#define MOST 3 /* matrices */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));

typedef struct {
    int count;                       /* matrices */
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

/* to = the sum of rows times factors, V vectors in each row. */
INLINE void product(int V, float *to, const float *rows, const float *factors, int count) {
    vec sum[WIDEST];
    for (int v = 0; v < V; v++) sum[v] = (vec){0};
    for (int t = 0; t < count; t++)
        for (int v = 0; v < V; v++) sum[v] += ((const vec *)(rows + t * ROW))[v] * factors[t];
    for (int v = 0; v < V; v++) ((vec *)to)[v] = sum[v];
}

/* Each of the rows += the same one times the row's factor. */
INLINE void outer(int V, float *rows, const float *one, const float *factors, int count) {
    vec fixed[WIDEST];
    for (int v = 0; v < V; v++) fixed[v] = ((const vec *)one)[v];
    for (int t = 0; t < count; t++)
        for (int v = 0; v < V; v++) ((vec *)(rows + t * ROW))[v] += fixed[v] * factors[t];
}

/* RUN(V), V a constant: the vectors in a row of so many numbers. */
#define FOR_VECTORS(numbers, RUN) \
    switch (numbers) {            \
    case 1: RUN(1); break;        \
    case 9: RUN(2); break;        \
    case 25: RUN(4); break;       \
    default: RUN(7);              \
    }

static void prepare(chain *a, int taps, int count, const int *size, const float *const *matrix, int turned) {
    a->count = count;
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

/* What each matrix gets of one channel, and after the last, what that gives; rows are turned. */
INLINE void forward(const chain *a, const float *w, float (*got)[ROW], const int *size) {
    centre(got[0], w, size[1], size[0]);
    for (int s = 0; s < a->count; s++) {
#define RUN(V) product(V, got[s + 1], a->rows[s], got[s], a->in[s])
        FOR_VECTORS(a->out[s], RUN)
#undef RUN
    }
}

/* w: (C, K, K) to y: (C, taps, taps), of the kernels of `size` (count + 1), the first of them K. */
void shrink(const float *w, float *y, long channels, int taps, int count, const int *size, const float *const *matrix) {
    chain a;
    float got[MOST + 1][ROW];
    int whole = size[0] * size[0], part = taps * taps;
    prepare(&a, taps, count, size, matrix, 1);
    for (long c = 0; c < channels; c++)
        if (count) {
            forward(&a, w + c * whole, got, size);
            memcpy(y + c * part, got[count], sizeof(float) * part);
        } else
            centre(y + c * part, w + c * whole, taps, size[0]);
}

/* gy: (C, taps, taps) to gw: (C, K, K), and to the gradient of each matrix. */
void shrink_back(const float *w, const float *gy, float *gw, long channels, int taps, int count, const int *size,
                 const float *const *matrix, float *const *gmatrix) {
    chain turned, a;
    float sums[MOST][ROW * ROW], got[MOST + 1][ROW], g[ROW], next[ROW];
    int whole = size[0] * size[0], part = taps * taps, first = count ? size[1] : taps, cut = (size[0] - first) / 2;
    prepare(&turned, taps, count, size, matrix, 1);
    prepare(&a, taps, count, size, matrix, 0);
    for (int s = 0; s < count; s++) memset(sums[s], 0, sizeof(float) * ROW * a.out[s]);
    memset(got, 0, sizeof got);
    memset(gw, 0, sizeof(float) * channels * whole);
    for (long c = 0; c < channels; c++) {
        if (count) forward(&turned, w + c * whole, got, size);
        memcpy(g, gy + c * part, sizeof(float) * part);
        for (int s = count - 1; s >= 0; s--) {
#define RUN(V) outer(V, sums[s], got[s], g, a.out[s]), product(V, next, a.rows[s], g, a.out[s])
            FOR_VECTORS(a.in[s], RUN)
#undef RUN
            memcpy(g, next, sizeof g);
        }
        float *to = gw + c * whole + cut * size[0] + cut;
        for (int i = 0; i < first; i++) memcpy(to + i * size[0], g + i * first, sizeof(float) * first);
    }
    for (int s = 0; s < count; s++) {
        int k = size[s + 1], small = s + 1 < count ? size[s + 2] : taps;
        memset(gmatrix[s], 0, sizeof(float) * k * k * k * k);
        for (int o = 0; o < small * small; o++)
            memcpy(gmatrix[s] + at(o, small, k) * k * k, sums[s] + o * ROW, sizeof(float) * k * k);
    }
}
