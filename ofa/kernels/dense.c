/* Gradient of the weights of a convolution at stride 1, padded by half of an odd kernel, from channels-last images of
   bfloat16, by AMX: products of 16 x 32 and 32 x 16 numbers, summed as floats.

   Images stand in one row of pixels, each line of an image followed by K / 2 zeros and each image by K / 2 lines of
   them, so that every tap is the same product: of gy, transposed, with x so many pixels further on.  The right side of
   a product is pairs of pixels by turns, so that x is there twice, from its first pixel on and from its second.  DEEP
   pixels at a time, since they have to fit the second cache.  Threads share out the channels of gy, so that sums do not
   depend on their number. */

#include "vector.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEEP 1024 /* a multiple of TILE */
#define TILE 32   /* channels on a side of four products, and pixels of one */

typedef unsigned short half;
typedef struct {
    const half *x, *gy; /* (N, H, W, C), (N, H, W, D) */
    float *gw;          /* (D, K, K, C) */
    long n, h, w, c, d, k;
    int part, parts, failed;
} job;

INLINE long up(long a, long b) { return (a + b - 1) / b * b; }

/* For `count` pixels from p on of the row of all pixels: which of the images' pixels each is, or -1. */
static void placed(const job *a, long *at, long p, long count) {
    long wide = a->w + a->k / 2, high = a->h + a->k / 2, lines = a->n * high;
    long first = p < 0 ? (p - wide + 1) / wide : p / wide, column = p - first * wide;
    for (long line = first, q = 0; q < count; line++, column = 0) {
        int there = line >= 0 && line < lines && line % high < a->h;
        long begin = (line / high * a->h + line % high) * a->w;
        for (; column < wide && q < count; column++, q++) at[q] = there && column < a->w ? begin + column : -1;
    }
}

/* TILE channels of two pixels by turns, of which `most` are there, into vectors of 16 pairs. */
INLINE void pairs(__m512i *to, const half *one, const half *two, long most) {
    __mmask32 there = most < TILE ? (1u << most) - 1 : ~0u;
    __m512i a = _mm512_maskz_loadu_epi16(there, one), b = _mm512_maskz_loadu_epi16(there, two);
    for (int i = 0; i < 2; i++) {
        __m512i low = _mm512_cvtepu16_epi32(i ? _mm512_extracti64x4_epi64(a, 1) : _mm512_castsi512_si256(a));
        __m512i high = _mm512_cvtepu16_epi32(i ? _mm512_extracti64x4_epi64(b, 1) : _mm512_castsi512_si256(b));
        to[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    }
}

/* 16 vectors of 16 numbers, in place: rows become columns. */
INLINE void turn(__m512i *v) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2)
        t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
            v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
        }
    for (int i = 0; i < 4; i++) {
        __m512i ab = _mm512_shuffle_i32x4(v[i], v[i + 4], 0x88), AB = _mm512_shuffle_i32x4(v[i], v[i + 4], 0xdd);
        __m512i cd = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0x88);
        __m512i CD = _mm512_shuffle_i32x4(v[i + 8], v[i + 12], 0xdd);
        t[i] = _mm512_shuffle_i32x4(ab, cd, 0x88), t[i + 8] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
        t[i + 4] = _mm512_shuffle_i32x4(AB, CD, 0x88), t[i + 12] = _mm512_shuffle_i32x4(AB, CD, 0xdd);
    }
    for (int i = 0; i < 16; i++) v[i] = t[i];
}

/* `count` pixels of the channels [d, d + TILE) of gy, transposed, TILE pixels after TILE: (count / TILE, TILE, TILE). */
static void transposed(const job *a, __m512i *to, long d, const long *at, long count, const half *zeros) {
    for (long q = 0; q < count; q += TILE) {
        __m512i both[2];
        for (int i = 0; i < 16; i++) {
            long one = at[q + 2 * i], two = at[q + 2 * i + 1];
            pairs(both, one < 0 ? zeros : a->gy + one * a->d + d, two < 0 ? zeros : a->gy + two * a->d + d, a->d - d);
            to[q + i] = both[0], to[q + 16 + i] = both[1];
        }
        turn(to + q), turn(to + q + 16);
    }
}

/* `count` pixels of all channels of x, two by turns, TILE channels after TILE: (C / TILE, step / 2, TILE, 2). */
static void paired(const job *a, __m512i *to, long step, const long *at, long count, const half *zeros) {
    for (long q = 0; q < count; q += 2)
        for (long c = 0; c < a->c; c += TILE) {
            const half *one = at[q] < 0 ? zeros : a->x + at[q] * a->c + c;
            const half *two = at[q + 1] < 0 ? zeros : a->x + at[q + 1] * a->c + c;
            pairs(to + c / TILE * step + q, one, two, a->c - c);
        }
}

/* sums (TILE, TILE), `width` apart, plus or, at first, as gy (TILE, count) times x (count, TILE). */
INLINE void product(float *sums, long width, const __m512i *gy, const __m512i *x, long count, int first) {
    float *below = sums + 16 * width;
    __asm__ volatile("" ::: "memory"); /* the compiler does not know what tiles read and write */
    if (first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, sums, 4 * width);
        _tile_loadd(1, sums + 16, 4 * width);
        _tile_loadd(2, below, 4 * width);
        _tile_loadd(3, below + 16, 4 * width);
    }
    for (long q = 0; q < count; q += TILE) {
        _tile_loadd(4, gy + q, 64);
        _tile_loadd(6, x + q, 128);
        _tile_loadd(5, gy + q + 16, 64);
        _tile_loadd(7, x + q + 1, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, 4 * width);
    _tile_stored(1, sums + 16, 4 * width);
    _tile_stored(2, below, 4 * width);
    _tile_stored(3, below + 16, 4 * width);
    __asm__ volatile("" ::: "memory");
}

/* The channels [begin, end) of gy. */
static void share(job *a, long begin, long end) {
    long wide = a->w + a->k / 2, all = a->n * (a->h + a->k / 2) * wide, taps = a->k * a->k, lead = a->k / 2 * (wide + 1);
    long step = up(DEEP + 2 * lead, TILE), width = up(a->c, TILE), rows = up(end - begin, TILE);
    __m512i *gy = aligned_alloc(64, 64 * DEEP), *x = aligned_alloc(64, 2 * 2 * width * step);
    float *sums = aligned_alloc(64, 4 * taps * rows * width);
    long *at = malloc(sizeof(long) * (step + 1));
    half zeros[TILE] = {0};
    a->failed = !x || !gy || !sums || !at;
    for (long p = 0; p < all && !a->failed; p += DEEP) {
        long count = up(all - p < DEEP ? all - p : DEEP, TILE), broad = up(count + 2 * lead, TILE);
        placed(a, at, p - lead, broad + 1);
        for (int odd = 0; odd < 2; odd++) paired(a, x + odd * width / TILE * step, step, at + odd, broad, zeros);
        for (long d = 0; d < rows; d += TILE) {
            transposed(a, gy, begin + d, at + lead, count, zeros);
            for (long c = 0; c < width; c += TILE)
                for (long t = 0; t < taps; t++) {
                    long on = t / a->k * wide + t % a->k;
                    const __m512i *moved = x + (on % 2 * width + c) / TILE * step + on / 2 * 2;
                    product(sums + (t * rows + d) * width + c, width, gy, moved, count, !p);
                }
        }
    }
    for (long d = begin; d < end && !a->failed; d++)
        for (long t = 0; t < taps; t++)
            memcpy(a->gw + (d * taps + t) * a->c, sums + (t * rows + d - begin) * width, sizeof(float) * a->c);
    free(x), free(gy), free(sums), free(at);
}

static void *work(void *argument) {
    job *a = argument;
    long blocks = up(a->d, TILE) / TILE, begin = blocks * a->part / a->parts, end = blocks * (a->part + 1) / a->parts;
    struct {
        unsigned char palette, start, reserved[14];
        unsigned short columns[16];
        unsigned char rows[16];
    } before, tiles = {.palette = 1};
    for (int t = 0; t < 8; t++) tiles.columns[t] = 64, tiles.rows[t] = 16;
    _tile_storeconfig(&before);
    _tile_loadconfig(&tiles);
    share(a, begin * TILE, end * TILE < a->d ? end * TILE : a->d);
    if (before.palette) /* as its owner left it */
        _tile_loadconfig(&before);
    else
        _tile_release();
    return NULL;
}

/* Returns 0, or 1 where nothing was computed. */
int dense(const half *x, const half *gy, float *gw, long n, long h, long w, long c, long d, long k, int threads) {
    const int ask = 0x1023, tiles = 18; /* ARCH_REQ_XCOMP_PERM, XTILEDATA */
    job jobs[MAX_THREADS];
    if (syscall(SYS_arch_prctl, ask, tiles)) return 1;
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > up(d, TILE) / TILE) threads = (int)(up(d, TILE) / TILE);
    for (int t = 0; t < threads; t++) jobs[t] = (job){x, gy, gw, n, h, w, c, d, k, t, threads, 0};
    run(work, jobs, sizeof(job), threads);
    int failed = 0;
    for (int t = 0; t < threads; t++) failed |= jobs[t].failed;
    return failed;
}
#else
int dense(const void *x, const void *gy, float *gw, long n, long h, long w, long c, long d, long k, int threads) {
    return 1;
}
#endif
