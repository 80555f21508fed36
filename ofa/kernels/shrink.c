/* The kernels of smaller depthwise layers, each the centre of the next larger one times a matrix, and the gradients.

   One channel at a time, in buffers whose rows are whole vectors: a product sums multiples of a matrix's rows, which
   stay in registers meanwhile. */

#include <string.h>

#define WIDEST 7
#define ROW 56 /* floats of a buffer: WIDEST * WIDEST rounded up to vectors of 8 */
#define MOST 3 /* matrices */
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));

typedef struct {
    int count;                  /* matrices */
    int size[MOST + 1];         /* of the kernels, the largest first */
    const float *matrix[MOST];  /* (k * k, k * k) */
    float rows[MOST][ROW * ROW]; /* the same with rows of ROW, turned for the way forward */
} chain;

/* The centre k x k of a kernel of `from` x `from` taps. */
INLINE void centre(float *to, const float *larger, int k, int from) {
    int cut = (from - k) / 2;
    for (int i = 0; i < k; i++) memcpy(to + i * k, larger + (i + cut) * from + cut, sizeof(float) * k);
}

/* A kernel of `to` x `to` taps, zero but for its centre k x k. */
INLINE void placed(float *larger, const float *from, int k, int to) {
    int cut = (to - k) / 2;
    memset(larger, 0, sizeof(float) * ROW);
    for (int i = 0; i < k; i++) memcpy(larger + (i + cut) * to + cut, from + i * k, sizeof(float) * k);
}

/* to = the sum of rows times factors, V vectors in each row, as many rows as `taps`. */
INLINE void product(int V, float *to, const float *rows, const float *factors, int taps) {
    vec sum[WIDEST];
    for (int v = 0; v < V; v++) sum[v] = (vec){0};
    for (int t = 0; t < taps; t++)
        for (int v = 0; v < V; v++) sum[v] += ((const vec *)(rows + t * ROW))[v] * factors[t];
    for (int v = 0; v < V; v++) ((vec *)to)[v] = sum[v];
}

/* Each of the rows += the same one times the row's factor. */
INLINE void outer(int V, float *rows, const float *one, const float *factors, int taps) {
    vec fixed[WIDEST];
    for (int v = 0; v < V; v++) fixed[v] = ((const vec *)one)[v];
    for (int t = 0; t < taps; t++)
        for (int v = 0; v < V; v++) ((vec *)(rows + t * ROW))[v] += fixed[v] * factors[t];
}

/* V for so many taps, as a constant. */
#define FOR_VECTORS(taps, RUN)        \
    switch (taps) {                   \
    case 1: RUN(1); break;            \
    case 9: RUN(2); break;            \
    case 25: RUN(4); break;           \
    default: RUN(7);                  \
    }

INLINE void prepare(chain *a, int count, const int *size, const float *const *matrix, int turned) {
    a->count = count;
    memcpy(a->size, size, sizeof(int) * (count + 1));
    for (int s = 0; s < count; s++) {
        int taps = size[s + 1] * size[s + 1];
        memset(a->rows[s], 0, sizeof a->rows[s]);
        for (int i = 0; i < taps; i++)
            for (int j = 0; j < taps; j++)
                a->rows[s][turned ? j * ROW + i : i * ROW + j] = matrix[s][i * taps + j];
    }
}

/* What each matrix is multiplied with, `in`, and the smallest kernel, `last`, of one channel; rows are turned. */
INLINE void forward(const chain *a, const float *w, float (*in)[ROW], float *last) {
    const float *larger = w;
    for (int s = 0; s < a->count; s++) {
        int k = a->size[s + 1], taps = k * k;
        centre(in[s], larger, k, a->size[s]);
#define RUN(V) product(V, last, a->rows[s], in[s], taps)
        FOR_VECTORS(taps, RUN)
#undef RUN
        larger = last;
    }
    if (!a->count) memcpy(last, w, sizeof(float) * a->size[0] * a->size[0]);
}

/* w: (C, K, K) to y: (C, taps, taps), of the kernels of `size` (count + 1), the first of them K. */
void shrink(const float *w, float *y, long channels, int taps, int count, const int *size, const float *const *matrix) {
    chain a;
    float in[MOST][ROW], last[ROW];
    prepare(&a, count, size, matrix, 1);
    for (long c = 0; c < channels; c++) {
        forward(&a, w + c * size[0] * size[0], in, last);
        centre(y + c * taps * taps, last, taps, size[count]);
    }
}

/* gy: (C, taps, taps) to gw: (C, K, K), and to the gradient of each matrix. */
void shrink_back(const float *w, const float *gy, float *gw, long channels, int taps, int count, const int *size,
                 const float *const *matrix, float *const *gmatrix) {
    chain turned, a;
    float sums[MOST][ROW * ROW], in[MOST][ROW], last[ROW], g[ROW], next[ROW];
    prepare(&turned, count, size, matrix, 1);
    prepare(&a, count, size, matrix, 0);
    memset(sums, 0, sizeof sums);
    memset(in, 0, sizeof in);
    for (long c = 0; c < channels; c++) {
        if (count) forward(&turned, w + c * size[0] * size[0], in, last);
        placed(g, gy + c * taps * taps, taps, size[count]);
        for (int s = count - 1; s >= 0; s--) {
            int k = size[s + 1], n = k * k;
#define RUN(V) outer(V, sums[s], in[s], g, n), product(V, next, a.rows[s], g, n)
            FOR_VECTORS(n, RUN)
#undef RUN
            placed(g, next, k, size[s]);
        }
        memcpy(gw + c * size[0] * size[0], g, sizeof(float) * size[0] * size[0]);
    }
    for (int s = 0; s < count; s++) {
        int n = size[s + 1] * size[s + 1];
        for (int t = 0; t < n; t++) memcpy(gmatrix[s] + t * n, sums[s] + t * ROW, sizeof(float) * n);
    }
}
