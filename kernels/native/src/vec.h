/* Sixteen fp32 lanes, whatever the machine has: every sum in this folder is written over these
 * lanes in one fixed order, so a result does not depend on the instruction set's width.
 * Compiled with -ffp-contract=off: a fused multiply-add happens where `fma16` stands, nowhere else.
 */
#ifndef PENSTOCK_VEC_H
#define PENSTOCK_VEC_H

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

typedef float v16 __attribute__((vector_size(64)));
typedef float v16u __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32), aligned(2), may_alias));

#define INLINE static inline __attribute__((always_inline))
#define PUBLIC __attribute__((visibility("default")))

INLINE v16 ld(const float *p) { return *(const v16u *)p; }
INLINE void st(float *p, v16 v) { *(v16u *)p = v; }
INLINE v16 all(float x) { return x - (v16){}; }
INLINE i16 iota(void) { return (i16){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
INLINE v16 pick(i16 mask, v16 yes, v16 no) {
    return (v16)(((i16)yes & mask) | ((i16)no & ~mask));
}
/* The second where one of them is no number: what the instruction does. */
#if defined(__AVX512F__)
INLINE v16 max16(v16 a, v16 b) { return (v16)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE v16 min16(v16 a, v16 b) { return (v16)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE v16 max16(v16 a, v16 b) { return pick(a > b, a, b); }
INLINE v16 min16(v16 a, v16 b) { return pick(a < b, a, b); }
#endif

/* a * b + c, rounded once. */
INLINE v16 fma16(v16 a, v16 b, v16 c) {
#if defined(__AVX512F__)
    return (v16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
    union { v16 v; __m256 h[2]; } x = {a}, y = {b}, z = {c};
    z.h[0] = _mm256_fmadd_ps(x.h[0], y.h[0], z.h[0]);
    z.h[1] = _mm256_fmadd_ps(x.h[1], y.h[1], z.h[1]);
    return z.v;
#elif defined(__aarch64__)
    union { v16 v; float32x4_t q[4]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 4; i++) z.q[i] = vfmaq_f32(z.q[i], x.q[i], y.q[i]);
    return z.v;
#else
    union { v16 v; float f[16]; } x = {a}, y = {b}, z = {c};
    for (int i = 0; i < 16; i++) z.f[i] = __builtin_fmaf(x.f[i], y.f[i], z.f[i]);
    return z.v;
#endif
}

/* bf16 numbers as fp32: exact. */
INLINE v16 ld_bf16(const uint16_t *p) {
    return (v16)(__builtin_convertvector(*(const h16 *)p, i16) << 16);
}

/* Sum and maximum of the lanes, as a tree: lane i with i + 8, then + 4, + 2, + 1. */
INLINE float sum16(v16 v) {
    union { v16 v; float f[16]; } x = {v};
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) x.f[i] += x.f[i + half];
    return x.f[0];
}
INLINE float top16(v16 v) {
    union { v16 v; float f[16]; } x = {v};
    for (int half = 8; half; half /= 2)
        for (int i = 0; i < half; i++) x.f[i] = x.f[i] > x.f[i + half] ? x.f[i] : x.f[i + half];
    return x.f[0];
}

/* exp to about one ulp; 0 below -87, where the true value is under 2^-125. */
INLINE v16 exp16(v16 x) {
    i16 alive = x > all(-87.0f);
    x = pick(alive, min16(x, all(88.0f)), (v16){});
    v16 shifted = x * 1.44269504088896341f + all(12582912.0f);
    v16 n = shifted - all(12582912.0f);
    v16 r = fma16(n, all(-0.693359375f), x);
    r = fma16(n, all(2.12194440e-4f), r);
    v16 p = fma16(r, all(1.9875691500e-4f), all(1.3981999507e-3f));
    p = fma16(p, r, all(8.3334519073e-3f));
    p = fma16(p, r, all(4.1665795894e-2f));
    p = fma16(p, r, all(1.6666665459e-1f));
    p = fma16(p, r, all(5.0000001201e-1f));
    p = fma16(p, r * r, r) + 1.0f;
    i16 power = __builtin_convertvector(n, i16);
    return (v16)(((i16)p + (power << 23)) & alive);
}

/* log of positive normal numbers, to about one ulp. */
INLINE v16 log16(v16 x) {
    i16 bits = (i16)x;
    i16 e = (bits >> 23) - 126;
    v16 m = (v16)((bits & 0x7FFFFF) | 0x3F000000);
    i16 low = m < all(0.70710678f);
    e += low;
    m = pick(low, m + m, m) - 1.0f;
    v16 z = m * m, n = __builtin_convertvector(e, v16);
    static const float c[] = {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f,
                              1.4249322787e-1f,  -1.6668057665e-1f, 2.0000714765e-1f,
                              -2.4999993993e-1f, 3.3333331174e-1f};
    v16 p = all(7.0376836292e-2f);
    for (int i = 0; i < 8; i++) p = fma16(p, m, all(c[i]));
    p = p * m * z;
    p = fma16(n, all(-2.12194440e-4f), p);
    p = fma16(z, all(-0.5f), p);
    return fma16(n, all(0.693359375f), m + p);
}

INLINE v16 sigmoid16(v16 x) { return 1.0f / (1.0f + exp16(-x)); }

/* log(1 + e^x) that keeps tiny results (deepseek-v4.md T9). */
INLINE v16 softplus16(v16 x) {
    v16 size = (v16)((i16)x & 0x7FFFFFFF), y = exp16(-size), u = 1.0f + y;
    return max16(x, (v16){}) + (log16(u) + (y - (u - 1.0f)) / u);
}

/* Memory of the calling thread that only grows; its content does not last beyond a call.
 * Several pieces of one call use different slots. NULL when memory is out. */
#define SLOTS 6
float *ps_scratch(int slot, int64_t floats);

void ps_tile_product(const float *a, int64_t lda, int64_t rows, const void *panels, int bf16,
                     int64_t k, int64_t n, float *c, int64_t ldc);

#endif
