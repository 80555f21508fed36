/* The operators of kernels.h.  A shift to the right keeps the sign, as it does on every compiler this is built with. */
#include "kernels.h"

#include <string.h>

#define LIMIT (INT64_C(1) << 30)

/* value * multiplier * 2^(shift - 31), rounded twice: to the high half, halves up, then halves away from 0. */
static inline int32_t rescale(int32_t value, int32_t multiplier, int32_t shift) {
    int64_t wide = value;
    int32_t high, rest, mask;
    if (shift > 0) {
        wide *= INT64_C(1) << shift;
        wide = wide > LIMIT ? LIMIT : wide < -LIMIT ? -LIMIT : wide;
        shift = 0;
    }
    high = (int32_t)((wide * multiplier + LIMIT) >> 31);
    mask = (int32_t)((UINT32_C(1) << -shift) - 1);
    rest = high & mask;
    return (high >> -shift) + (rest > (mask >> 1) + (high < 0));
}

static inline int8_t finish(int32_t value, const ofa_result *r) {
    value += r->zero;
    return (int8_t)(value < r->low ? r->low : value > r->high ? r->high : value);
}

static inline int8_t filtered(int32_t sum, const ofa_filters *f, int32_t k) {
    return finish(rescale(sum, f->multiplier[k], f->shift[k]), &f->result);
}

static inline int32_t least(int32_t a, int32_t b) { return a < b ? a : b; }
static inline int32_t most(int32_t a, int32_t b) { return a > b ? a : b; }

/* All outputs of one pixel, or of the numbers under one window; four at a time share what is read of x. */
static inline void products(const int8_t *x, int8_t *y, int32_t inputs, int32_t outputs, const ofa_filters *f) {
    const int8_t *w = f->weight;
    int32_t k = 0, i;
    for (; k + 4 <= outputs; k += 4, w += 4 * inputs) {
        const int8_t *w1 = w + inputs, *w2 = w1 + inputs, *w3 = w2 + inputs;
        int32_t a = f->bias[k], b = f->bias[k + 1], c = f->bias[k + 2], d = f->bias[k + 3];
        for (i = 0; i < inputs; i++) {
            a += x[i] * w[i];
            b += x[i] * w1[i];
            c += x[i] * w2[i];
            d += x[i] * w3[i];
        }
        y[k] = filtered(a, f, k);
        y[k + 1] = filtered(b, f, k + 1);
        y[k + 2] = filtered(c, f, k + 2);
        y[k + 3] = filtered(d, f, k + 3);
    }
    for (; k < outputs; k++, w += inputs) {
        int32_t a = f->bias[k];
        for (i = 0; i < inputs; i++) a += x[i] * w[i];
        y[k] = filtered(a, f, k);
    }
}

void ofa_pointwise(const int8_t *x, int8_t *y, int32_t pixels, int32_t inputs, int32_t outputs, const ofa_filters *f) {
    for (; pixels > 0; pixels--, x += inputs, y += outputs) products(x, y, inputs, outputs, f);
}

/* Gathers what lies under each window into one column. */
void ofa_conv(const int8_t *x, int8_t *y, int8_t *column, int32_t inputs, int32_t outputs, const ofa_window *w,
              const ofa_filters *f) {
    int32_t wide = w->columns * inputs, oy, ox, i;
    for (oy = 0; oy < w->rows_out; oy++) {
        for (ox = 0; ox < w->columns_out; ox++, y += outputs) {
            int32_t row = oy * w->stride_y - w->above, left = ox * w->stride_x - w->left;
            int32_t from = most(0, -left), to = least(w->columns, w->columns_in - left);
            memset(column, w->fill, (size_t)(w->rows * wide));
            for (i = most(0, -row); i < least(w->rows, w->rows_in - row); i++)
                memcpy(column + i * wide + from * inputs, x + ((row + i) * w->columns_in + left + from) * inputs,
                       (size_t)((to - from) * inputs));
            products(column, y, w->rows * wide, outputs, f);
        }
    }
}

/* One padded row of one channel. */
static inline void gather_row(const int8_t *x, int8_t *to, int32_t row, int32_t channels, int32_t width,
                              const ofa_window *w) {
    int32_t j, end = least(width, w->columns_in + w->left);
    memset(to, w->fill, (size_t)width);
    if (row < 0 || row >= w->rows_in) return;
    x += row * w->columns_in * channels;
    for (j = w->left; j < end; j++, x += channels) to[j] = *x;
}

/* Channel by channel.  The ring holds the rows under the window: a result lies at or before the row that was gathered
   last, so it overwrites only what the ring has, or what no later window reads. */
void ofa_depthwise(const int8_t *x, int8_t *y, int8_t *ring, int32_t channels, const ofa_window *w,
                   const ofa_filters *f) {
    int32_t width = (w->columns_out - 1) * w->stride_x + w->columns, c, oy, ox, i, j;
    const int8_t *weight = f->weight;
    for (c = 0; c < channels; c++, weight += w->rows * w->columns) {
        int32_t gathered = 0, bias = f->bias[c]; /* rows, counted from the first of the padding */
        for (oy = 0; oy < w->rows_out; oy++) {
            int32_t top = oy * w->stride_y;
            for (gathered = most(gathered, top); gathered < top + w->rows; gathered++)
                gather_row(x + c, ring + gathered % w->rows * width, gathered - w->above, channels, width, w);
            for (ox = 0; ox < w->columns_out; ox++) {
                int32_t sum = bias, slot = top % w->rows;
                const int8_t *k = weight;
                for (i = 0; i < w->rows; i++, slot = slot + 1 == w->rows ? 0 : slot + 1) {
                    const int8_t *row = ring + slot * width + ox * w->stride_x;
                    for (j = 0; j < w->columns; j++) sum += row[j] * *k++;
                }
                y[(oy * w->columns_out + ox) * channels + c] = filtered(sum, f, c);
            }
        }
    }
}

void ofa_add(const int8_t *a, const int8_t *b, int8_t *y, int32_t size, const ofa_sum *s) {
    int32_t i;
    for (i = 0; i < size; i++) {
        int32_t u = rescale((a[i] - s->zero_a) * (1 << 20), s->a.multiplier, s->a.shift);
        int32_t v = rescale((b[i] - s->zero_b) * (1 << 20), s->b.multiplier, s->b.shift);
        y[i] = finish(rescale(u + v, s->sum.multiplier, s->sum.shift), &s->result);
    }
}

void ofa_mul(const int8_t *a, const int8_t *b, int8_t *y, int32_t size, int32_t period, const ofa_product *p) {
    int32_t i, j = 0;
    for (i = 0; i < size; i++, j = j + 1 == period ? 0 : j + 1) {
        int32_t product = (a[i] - p->zero_a) * (b[j] - p->zero_b);
        y[i] = finish(rescale(product, p->factor.multiplier, p->factor.shift), &p->result);
    }
}

void ofa_mean(const int8_t *x, int8_t *y, int32_t pixels, int32_t channels, const ofa_average *m) {
    int32_t c, i;
    for (c = 0; c < channels; c++) {
        int32_t sum = -m->zero * pixels;
        for (i = 0; i < pixels; i++) sum += x[i * channels + c];
        y[c] = finish(rescale(sum, m->factor.multiplier, m->factor.shift), &m->result);
    }
}

/* The sum, count and largest of the pixels of one channel under a window. */
static inline int32_t under(const int8_t *x, int32_t oy, int32_t ox, int32_t channels, const ofa_window *w,
                            int32_t *count, int32_t *largest) {
    int32_t row = oy * w->stride_y - w->above, left = ox * w->stride_x - w->left, sum = 0, i, j;
    *count = 0;
    *largest = INT8_MIN;
    for (i = most(0, row); i < least(w->rows_in, row + w->rows); i++)
        for (j = most(0, left); j < least(w->columns_in, left + w->columns); j++) {
            int32_t value = x[(i * w->columns_in + j) * channels];
            sum += value;
            *largest = most(*largest, value);
            ++*count;
        }
    return sum;
}

static inline int8_t clamped(int32_t value, const ofa_result *r) {
    return (int8_t)(value < r->low ? r->low : value > r->high ? r->high : value);
}

void ofa_average_pool(const int8_t *x, int8_t *y, int32_t channels, const ofa_window *w, const ofa_result *r) {
    int32_t oy, ox, c, count, largest;
    for (oy = 0; oy < w->rows_out; oy++)
        for (ox = 0; ox < w->columns_out; ox++)
            for (c = 0; c < channels; c++) {
                int32_t sum = under(x + c, oy, ox, channels, w, &count, &largest);
                *y++ = clamped((sum < 0 ? sum - count / 2 : sum + count / 2) / count, r);
            }
}

void ofa_max_pool(const int8_t *x, int8_t *y, int32_t channels, const ofa_window *w, const ofa_result *r) {
    int32_t oy, ox, c, count, largest;
    for (oy = 0; oy < w->rows_out; oy++)
        for (ox = 0; ox < w->columns_out; ox++)
            for (c = 0; c < channels; c++) {
                (void)under(x + c, oy, ox, channels, w, &count, &largest);
                *y++ = clamped(largest, r);
            }
}

void ofa_lookup(const int8_t *x, int8_t *y, int32_t size, const int8_t *table) {
    int32_t i;
    for (i = 0; i < size; i++) y[i] = table[x[i] + 128];
}
