/* Operators on 8-bit maps, rows x columns x channels, channels side by side.  C99, no library but stdint and string.

   Every sum of products, zero points taken off, lies within 2^30.  x, a, b: read; y: written. */
#ifndef OFA_KERNELS_H
#define OFA_KERNELS_H

#include <stdint.h>

typedef struct { /* a fixed-point factor: times multiplier / 2^(31 - shift) */
    int32_t multiplier;
    int32_t shift;
} ofa_factor;

typedef struct { /* what a result is: zero point, least and largest number */
    int32_t zero, low, high;
} ofa_result;

typedef struct { /* filters of a convolution: (outputs, rows, columns, inputs), or (channels, rows, columns) */
    const int8_t *weight;
    const int32_t *bias; /* from which the input's zero point times the weights is taken off */
    const int32_t *multiplier;
    const int8_t *shift;
    ofa_result result;
} ofa_filters;

typedef struct { /* a window and the maps that it joins; above, left: padding */
    int32_t rows_in, columns_in, rows_out, columns_out;
    int32_t rows, columns, stride_y, stride_x, above, left;
    int32_t fill; /* what lies outside the image: the input's zero point */
} ofa_window;

typedef struct { /* a + b on a common scale, both shifted left by 20 */
    int32_t zero_a, zero_b;
    ofa_factor a, b, sum;
    ofa_result result;
} ofa_sum;

typedef struct {
    int32_t zero_a, zero_b;
    ofa_factor factor;
    ofa_result result;
} ofa_product;

typedef struct {
    int32_t zero;
    ofa_factor factor; /* divides by the pixels too */
    ofa_result result;
} ofa_average;

void ofa_pointwise(const int8_t *x, int8_t *y, int32_t pixels, int32_t inputs, int32_t outputs, const ofa_filters *f);
/* column: rows * columns * inputs bytes. */
void ofa_conv(const int8_t *x, int8_t *y, int8_t *column, int32_t inputs, int32_t outputs, const ofa_window *w,
              const ofa_filters *f);
/* y may be x; ring: rows * ((columns_out - 1) * stride_x + columns) bytes. */
void ofa_depthwise(const int8_t *x, int8_t *y, int8_t *ring, int32_t channels, const ofa_window *w,
                   const ofa_filters *f);
/* y may be a or b. */
void ofa_add(const int8_t *a, const int8_t *b, int8_t *y, int32_t size, const ofa_sum *s);
/* y may be a; b has one number for each of the period numbers of a that repeat. */
void ofa_mul(const int8_t *a, const int8_t *b, int8_t *y, int32_t size, int32_t period, const ofa_product *p);
void ofa_mean(const int8_t *x, int8_t *y, int32_t pixels, int32_t channels, const ofa_average *m);
void ofa_average_pool(const int8_t *x, int8_t *y, int32_t channels, const ofa_window *w, const ofa_result *r);
void ofa_max_pool(const int8_t *x, int8_t *y, int32_t channels, const ofa_window *w, const ofa_result *r);
/* y may be x; table: of the number plus 128. */
void ofa_lookup(const int8_t *x, int8_t *y, int32_t size, const int8_t *table);

#endif
