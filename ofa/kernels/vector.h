/* Vectors of channels, from images of floats or of bfloat16, which is the upper half of a float; and threads. */

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else
#define LANES 8
#endif
#define MAX_THREADS 64
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int mask __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#include <immintrin.h>
INLINE vec widen(const void *p) { return (vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(p)), 16); }
INLINE void narrow(void *p, vec a) { _mm256_storeu_si256(p, (__m256i)_mm512_cvtneps_pbh((__m512)a)); }
#else
typedef unsigned bits __attribute__((vector_size(LANES * 4)));
typedef unsigned short halves __attribute__((vector_size(LANES * 2)));
typedef unsigned short loose_halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

INLINE vec widen(const void *p) { return (vec)(__builtin_convertvector(*(const loose_halves *)p, bits) << 16); }

/* Rounded to the nearest, to the even one of two; what is no number stays none. */
INLINE void narrow(void *p, vec a) {
    bits b = (bits)a, none = (bits)(a != a);
    b = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
    *(loose_halves *)p = __builtin_convertvector((b & ~none) | (none & 0x7fc0), halves);
}
#endif

/* LANES numbers from number k on; half: they are bfloat16. */
INLINE vec get(int half, const void *p, long k) {
    return half ? widen((const unsigned short *)p + k) : (vec)*(const loose *)((const float *)p + k);
}

/* The same to memory. */
INLINE void put(int half, void *p, long k, vec a) {
    if (half)
        narrow((unsigned short *)p + k, a);
    else
        *(loose *)((float *)p + k) = a;
}

/* work(job) for each of up to MAX_THREADS jobs of `size` bytes, the first here and each other in a thread of its own. */
INLINE void run(void *(*work)(void *), void *jobs, size_t size, int threads) {
    pthread_t ids[MAX_THREADS];
    for (int t = 1; t < threads; t++)
        if (pthread_create(&ids[t], NULL, work, (char *)jobs + t * size)) ids[t] = 0, work((char *)jobs + t * size);
    work(jobs);
    for (int t = 1; t < threads; t++)
        if (ids[t]) pthread_join(ids[t], NULL);
}
