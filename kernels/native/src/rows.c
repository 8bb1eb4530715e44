/* Norm, rotation and the rounding of cache rows (deepseek-v4.md 1.3, 2.2, 5.4). */
#include "vec.h"

/* Each of rows x heads vectors of c channels: RMS norm (weight NULL: unweighted; norm 0: none),
 * then rotation of the last `rope` channels by the row's table. `cos` and `sin` are [rows, rope],
 * each pair's value twice, sin as (-s, +s). out may be x. c and rope are multiples of 16. */
PUBLIC void ps_norm_rope(const float *x, int64_t rows, int64_t heads, int64_t c, int norm,
                         const float *weight, float eps, const float *cos, const float *sin,
                         int64_t rope, float *out) {
    for (int64_t v = 0; v < rows * heads; v++) {
        const float *from = x + v * c;
        float *to = out + v * c;
        v16 sum = {};
        if (norm)
            for (int64_t i = 0; i < c; i += 16) sum = fma16(ld(from + i), ld(from + i), sum);
        float inverse = norm ? 1.0f / __builtin_sqrtf(sum16(sum) / (float)c + eps) : 1.0f;
        const float *co = cos + v / heads * rope, *si = sin + v / heads * rope;
        for (int64_t i = 0; i < c; i += 16) {
            v16 y = ld(from + i);
            if (norm) y = y * inverse;
            if (weight) y = y * ld(weight + i);
            if (i >= c - rope) {
                int64_t at = i - (c - rope);
                v16 other = __builtin_shuffle(y, iota() ^ 1);
                y = y * ld(co + at) + other * ld(si + at);
            }
            st(to + i, y);
        }
    }
}

INLINE int32_t bits_of(float x) { union { float f; int32_t i; } u = {x}; return u.i; }
INLINE float of_bits(int32_t x) { union { int32_t i; float f; } u = {x}; return u.f; }
INLINE v16 size_of(v16 x) { return (v16)((i16)x & 0x7FFFFFFF); }

/* ceil(log2(max(amax, floor) / largest code)); the largest code is mantissa x 2^exponent. */
INLINE int32_t scale_exponent(float amax, float floor, int32_t mantissa, int32_t exponent) {
    int32_t bits = bits_of(amax > floor ? amax : floor);
    return (bits >> 23) - 127 - exponent + ((bits & 0x7FFFFF) > mantissa);
}

/* Nearest e4m3 value, ties to even; |x| <= 448. */
INLINE v16 e4m3(v16 x) {
    i16 bits = (i16)x, sign = bits & (int32_t)0x80000000;
    i16 normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF;
    v16 small = size_of(x) + 24576.0f - 24576.0f;
    i16 tiny = size_of(x) < all(0.015625f);
    return pick(tiny, (v16)((i16)small | sign), (v16)normal);
}

/* First `nope` channels to e4m3 with one power-of-two scale per 64, the rest to bf16. */
PUBLIC void ps_fp8_round(const float *x, int64_t rows, int64_t c, int64_t nope, float *out) {
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * c;
        float *to = out + r * c;
        for (int64_t g = 0; g < nope; g += 64) {
            int64_t end = g + 64 < nope ? g + 64 : nope;
            v16 top = {};
            for (int64_t i = g; i < end; i += 16) top = max16(top, size_of(ld(from + i)));
            int32_t e = scale_exponent(top16(top), 1e-4f, 0x600000, 8);
            float down = of_bits((127 - e) << 23), up = of_bits((127 + e) << 23);
            for (int64_t i = g; i < end; i += 16) {
                v16 y = min16(max16(ld(from + i) * down, all(-448.0f)), all(448.0f));
                st(to + i, e4m3(y) * up);
            }
        }
        for (int64_t i = nope; i < c; i += 16) {
            i16 bits = (i16)ld(from + i);
            st(to + i, (v16)((bits + 0x7FFF + ((bits >> 16) & 1)) & ~0xFFFF));
        }
    }
}

/* Nearest e2m1 value, ties to even; |x| <= 6. */
INLINE v16 e2m1(v16 x) {
    v16 size = size_of(x), half = {};
    /* Steps of 0.5 to 2, of 1 to 4, of 2 to 6: adding 1.5 * 2^23 steps rounds to the step. */
    half = size + 6291456.0f - 6291456.0f;
    v16 one = size + 12582912.0f - 12582912.0f, two = size + 25165824.0f - 25165824.0f;
    v16 y = pick(size < all(2.0f), half, pick(size < all(4.0f), one, two));
    return (v16)((i16)y | ((i16)x & (int32_t)0x80000000));
}

/* Walsh-Hadamard rotation (natural order, scaled by c^-0.5) and e2m1 with one power-of-two scale
 * per 32 channels. c is a power of two of at least 32; out may be x. */
PUBLIC void ps_index_round(const float *x, int64_t rows, int64_t c, float *out) {
    float scale = 1.0f / __builtin_sqrtf((float)c);
    for (int64_t r = 0; r < rows; r++) {
        float *to = out + r * c;
        if (out != x) memcpy(to, x + r * c, (size_t)c * 4);
        for (int64_t i = 0; i < c; i += 16) {
            v16 y = ld(to + i);
            for (int step = 1; step < 16; step *= 2) {
                v16 other = __builtin_shuffle(y, iota() ^ step);
                y = pick((iota() & step) == 0, y + other, other - y);
            }
            st(to + i, y);
        }
        for (int64_t step = 16; step < c; step *= 2)
            for (int64_t i = 0; i < c; i += 16)
                if (!(i & step)) {
                    v16 a = ld(to + i), b = ld(to + i + step);
                    st(to + i, a + b), st(to + i + step, a - b);
                }
        for (int64_t g = 0; g < c; g += 32) {
            v16 a = ld(to + g) * scale, b = ld(to + g + 16) * scale;
            float amax = top16(max16(size_of(a), size_of(b)));
            int32_t e = scale_exponent(amax, 6.0f * 0x1p-126f, 0x400000, 2);
            float up = of_bits((127 + e) << 23), down = of_bits((127 - e) << 23);
            st(to + g, e2m1(a * down) * up), st(to + g + 16, e2m1(b * down) * up);
        }
    }
}

/* out[n][c]: channel-wise softmax over the slots of window n, times kv; slots in order, one after
 * the other (deepseek-v4.md 2.3). kv and score are [n][slots][c]; c is a multiple of 16. */
PUBLIC void ps_pool(const float *kv, const float *score, int64_t n, int64_t slots, int64_t c,
                    float *out) {
    for (int64_t w = 0; w < n; w++)
        for (int64_t i = 0; i < c; i += 16) {
            const float *k = kv + w * slots * c + i, *s = score + w * slots * c + i;
            v16 top = ld(s), sum = {}, norm = {};
            for (int64_t j = 1; j < slots; j++) top = max16(top, ld(s + j * c));
            for (int64_t j = 0; j < slots; j++) {
                v16 weight = exp16(ld(s + j * c) - top);
                sum = fma16(weight, ld(k + j * c), sum);
                norm += weight;
            }
            st(out + w * c + i, sum / norm);
        }
}
