/* Hyper-connections with four streams (deepseek-v4.md 4), one row at a time. */
#include "vec.h"

#define S 4

INLINE v16 turned(v16 x, int by) { return __builtin_shuffle(x, iota() ^ by); }

/* Lane 4 j + k is C[j][k]: rows are groups of four lanes, columns lie four lanes apart. */
INLINE v16 row_sum(v16 c) { c += turned(c, 1); return c + turned(c, 2); }
INLINE v16 column_sum(v16 c) { c += turned(c, 4); return c + turned(c, 8); }

#define SIDE 4
INLINE void sinkhorn(v16 *c, int iters, float eps) {
    for (int i = 0; i < SIDE; i++) {
        v16 top = max16(c[i], turned(c[i], 1));
        c[i] = exp16(c[i] - max16(top, turned(top, 2)));
        c[i] = c[i] / row_sum(c[i]) + eps;
        c[i] = c[i] / (column_sum(c[i]) + eps);
    }
    for (int turn = 1; turn < iters; turn++) {
#pragma GCC unroll 4
        for (int i = 0; i < SIDE; i++) c[i] = c[i] / (row_sum(c[i]) + eps);
#pragma GCC unroll 4
        for (int i = 0; i < SIDE; i++) c[i] = c[i] / (column_sum(c[i]) + eps);
    }
}

INLINE float mean_square(const float *x, int64_t n) {
    v16 sum = {};
    for (int64_t i = 0; i < n; i += 16) sum = fma16(ld(x + i), ld(x + i), sum);
    return sum16(sum) / (float)n;
}

/* out = sum over streams of pre * stream; returns the sum of its squares. */
INLINE float collapse(const float *x, const float *pre, int64_t d, float *out) {
    v16 sum = {};
    for (int64_t i = 0; i < d; i += 16) {
        v16 y = ld(x + i) * pre[0];
        for (int s = 1; s < S; s++) y = fma16(ld(x + s * d + i), all(pre[s]), y);
        sum = fma16(y, y, sum);
        st(out + i, y);
    }
    return sum16(sum);
}

/* Into a sublayer: normed input x[rows, d], post[rows, 4] and comb[rows, 4, 4] of streams
 * [rows, 4, d]. `fn` is the packed fp32 [24, 4 d]. d is a multiple of 16. 0, or -1 out of memory. */
PUBLIC int ps_enter(const float *streams, int64_t rows, int64_t d, const void *fn,
                    const float *scale, const float *base, const float *norm, float norm_eps,
                    float eps, int64_t iters, float *x, float *post, float *comb) {
    /* A block's streams are read three times: they should stay in the second cache. */
    enum { MIX = S * (S + 2), PAD = 32, ROWS = 48 };
    float *mixed = ps_scratch(0, ROWS * PAD);
    if (!mixed) return -1;
    for (int64_t first = 0; first < rows; first += SIDE) {
        int64_t end = first + SIDE < rows ? first + SIDE : rows;
        int64_t block = first + ROWS < rows ? ROWS : rows - first;
        if (first % ROWS == 0)
            ps_tile_product(streams + first * S * d, S * d, block, fn, 0, S * d, MIX, mixed, PAD);
        v16 c[SIDE] = {};
        for (int64_t r = first; r < end; r++) {
            const float *row = streams + r * S * d;
            float *m = mixed + r % ROWS * PAD;
            float inverse = 1.0f / __builtin_sqrtf(mean_square(row, S * d) + norm_eps);
            for (int i = 0; i < MIX; i++)
                m[i] = m[i] * inverse * scale[i < S ? 0 : i < 2 * S ? 1 : 2] + base[i];
            float gates[16];
            st(gates, sigmoid16(ld(m)));
            for (int s = 0; s < S; s++) {
                gates[s] += eps;
                post[r * S + s] = 2.0f * gates[S + s];
            }
            float square = collapse(row, gates, d, x + r * d) / (float)d;
            inverse = 1.0f / __builtin_sqrtf(square + norm_eps);
            for (int64_t i = 0; i < d; i += 16)
                st(x + r * d + i, ld(x + r * d + i) * inverse * ld(norm + i));
            c[r - first] = ld(m + 2 * S);
        }
        sinkhorn(c, (int)iters, eps);
        for (int64_t r = first; r < end; r++) st(comb + r * S * S, c[r - first]);
    }
    return 0;
}

/* Out of a sublayer: X'_k = post_k y + sum over j of comb[j][k] X_j. */
PUBLIC void ps_leave(const float *streams, const float *y, const float *post, const float *comb,
                     int64_t rows, int64_t d, float *out) {
    for (int64_t r = 0; r < rows; r++) {
        const float *x = streams + r * S * d, *p = post + r * S, *c = comb + r * S * S;
        float *to = out + r * S * d;
        for (int64_t i = 0; i < d; i += 16) {
            v16 add = ld(y + r * d + i), from[S];
            for (int j = 0; j < S; j++) from[j] = ld(x + j * d + i);
            for (int k = 0; k < S; k++) {
                v16 sum = add * p[k];
                for (int j = 0; j < S; j++) sum = fma16(all(c[j * S + k]), from[j], sum);
                st(to + k * d + i, sum);
            }
        }
    }
}

/* Head collapse (4.4); `fn` is the packed fp32 [4, 4 d]. */
PUBLIC int ps_head(const float *streams, int64_t rows, int64_t d, const void *fn,
                   const float *scale, const float *base, float norm_eps, float eps, float *out) {
    float *mixed = ps_scratch(0, rows * 16);
    if (!mixed) return -1;
    ps_tile_product(streams, S * d, rows, fn, 0, S * d, S, mixed, 16);
    for (int64_t r = 0; r < rows; r++) {
        const float *row = streams + r * S * d;
        float inverse = 1.0f / __builtin_sqrtf(mean_square(row, S * d) + norm_eps), gates[16] = {};
        for (int s = 0; s < S; s++) gates[s] = mixed[r * 16 + s] * inverse * scale[0] + base[s];
        st(gates, sigmoid16(ld(gates)) + eps);
        collapse(row, gates, d, out + r * d);
    }
    return 0;
}
