/* Copies past the caches, which are too small for a network: so no line has to be read before it is written. */

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#define LANES 16
#define STREAM(to, from) _mm512_stream_ps(to, _mm512_loadu_ps(from))
#elif defined(__AVX__)
#include <immintrin.h>
#define LANES 8
#define STREAM(to, from) _mm256_stream_ps(to, _mm256_loadu_ps(from))
#endif

static void stream(float *to, const float *from, long n) {
    long i = 0;
#ifdef LANES
    i = (-(uintptr_t)to & 63) / sizeof(float);
    if (i > n) i = n;
    memcpy(to, from, sizeof(float) * i);
    for (; i + 16 <= n; i += 16)
        for (int j = 0; j < 16; j += LANES) STREAM(to + i + j, from + i + j);
#endif
    memcpy(to + i, from + i, sizeof(float) * (n - i));
}

/* The first `width` numbers of each row of `pitch` numbers. */
void copy(float *to, const float *from, long rows, long width, long pitch) {
    if (width == pitch)
        stream(to, from, rows * width);
    else
        for (long r = 0; r < rows; r++) stream(to + r * width, from + r * pitch, width);
#ifdef LANES
    _mm_sfence();
#endif
}
