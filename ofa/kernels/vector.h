/* Vectors of channels, from images of floats or of bfloat16, which is the upper half of a float. */

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
typedef unsigned bits __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef unsigned short halves __attribute__((vector_size(LANES * 2)));
typedef unsigned short loose_halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

/* LANES numbers from number k on; half: they are bfloat16. */
INLINE vec get(int half, const void *p, long k) {
    if (!half) return *(const loose *)((const float *)p + k);
    return (vec)(__builtin_convertvector(*(const loose_halves *)((const unsigned short *)p + k), bits) << 16);
}

/* The same to memory, rounded to the nearest, to the even one of two; what is no number stays none. */
INLINE void put(int half, void *p, long k, vec a) {
    if (half) {
        bits b = (bits)a, none = (bits)(a != a);
        b = (b + 0x7fff + ((b >> 16) & 1)) >> 16;
        *(loose_halves *)((unsigned short *)p + k) = __builtin_convertvector((b & ~none) | (none & 0x7fc0), halves);
    } else
        *(loose *)((float *)p + k) = a;
}
