/* Attention over window, heavy entries or selected entries in one softmax (deepseek-v4.md 2.5).
 *
 * A row's keys keep one order (window by position, then entries ascending) and one lane each (by
 * position, by entry, by rank in the selection), so its sums do not depend on the rows beside it.
 * A key that a row does not see adds exactly zero.
 */
#include "dots.h"
#include "panels.h"

#define MOST_FLOATS (1 << 17)
#define MOST_ROWS 128
#define KEY_BLOCK 256

typedef const float *row_t;

/* score[m][n] of rows q + i * c and the listed keys; keys is a multiple of 4. */
static void score_all(const float *q, int64_t rows, int64_t c, const row_t *key, int64_t keys,
                      float scale, float *score, int64_t ld_score) {
    for (int64_t n = 0; n < keys; n += 4)
        for (int64_t m = 0; m < rows; m += 4) {
            const float *from[4];
            for (int i = 0; i < 4; i++) from[i] = q + (m + i < rows ? m + i : rows - 1) * c;
            float found[16];
            st(found, dots(from, key + n, c) * scale);
            for (int i = 0; i < 4 && m + i < rows; i++)
                memcpy(score + (m + i) * ld_score + n, found + 4 * i, 16);
        }
}

INLINE void score_tile(int rows, const float *q, int64_t c, const float *panel, float scale,
                       float *score, int64_t ld_score, int wide) {
    v16 sum[8][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (v16){};
    for (int64_t i = 0; i < c; i++) {
        v16 a = ld(panel + i * KEYS), b = wide ? ld(panel + i * KEYS + 16) : (v16){};
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            v16 x = all(q[r * c + i]);
            sum[r][0] = fma16(x, a, sum[r][0]);
            if (wide) sum[r][1] = fma16(x, b, sum[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        st(score + r * ld_score, sum[r][0] * scale);
        if (wide) st(score + r * ld_score + 16, sum[r][1] * scale);
    }
}

/* score[m][n] of rows q + m * c and keys in panels; keys is a multiple of 16. */
static void score_panels(const float *q, int64_t rows, int64_t c, const float *panels,
                         int64_t keys, float scale, float *score, int64_t ld_score) {
    for (int64_t n = 0; n < keys; n += KEYS) {
        int64_t m = 0;
#define STEP(size)                                                                              \
    for (; m + size <= rows; m += size) {                                                       \
        float *to = score + m * ld_score + n;                                                   \
        if (n + KEYS <= keys)                                                                   \
            score_tile(size, q + m * c, c, panels + n * c, scale, to, ld_score, 1);             \
        else                                                                                    \
            score_tile(size, q + m * c, c, panels + n * c, scale, to, ld_score, 0);             \
    }
        STEP(8) STEP(4) STEP(2) STEP(1)
#undef STEP
    }
}

INLINE void value_tile(int rows, const float *p, int64_t ld_p, const row_t *key, int64_t keys,
                       float *out, int64_t c, int wide) {
    v16 sum[8][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
        sum[r][0] = ld(out + r * c), sum[r][1] = wide ? ld(out + r * c + 16) : (v16){};
    for (int64_t n = 0; n < keys; n++) {
        v16 b0 = ld(key[n]), b1 = wide ? ld(key[n] + 16) : (v16){};
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            v16 x = all(p[r * ld_p + n]);
            sum[r][0] = fma16(x, b0, sum[r][0]);
            if (wide) sum[r][1] = fma16(x, b1, sum[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        st(out + r * c, sum[r][0]);
        if (wide) st(out + r * c + 16, sum[r][1]);
    }
}

/* out[m] += sum over keys in order of weight[m][n] * key[n]. */
static void add_values(const float *p, int64_t rows, int64_t ld_p, const row_t *key, int64_t keys,
                       float *out, int64_t c) {
    row_t part[KEY_BLOCK];
    for (int64_t n = 0; n < keys; n += KEY_BLOCK) {
        int64_t count = n + KEY_BLOCK < keys ? KEY_BLOCK : keys - n;
        for (int64_t at = 0; at < c; at += 32) {
            int wide = at + 32 <= c;
            for (int64_t i = 0; i < count; i++) part[i] = key[n + i] + at;
            int64_t m = 0;
#define STEP(size)                                                                              \
    for (; m + size <= rows; m += size) {                                                       \
        if (wide)                                                                               \
            value_tile(size, p + m * ld_p + n, ld_p, part, count, out + m * c + at, c, 1);      \
        else                                                                                    \
            value_tile(size, p + m * ld_p + n, ld_p, part, count, out + m * c + at, c, 0);      \
    }
            STEP(8) STEP(4) STEP(2) STEP(1)
#undef STEP
        }
    }
}

/* Lanes first..last-1 of a row of scores count, the others become -inf. Returns the maximum. */
INLINE v16 mask_range(float *score, int64_t n, int64_t first, int64_t last, v16 top) {
    v16 none = all(-__builtin_inff());
    for (int64_t i = 0; i < n; i += 16) {
        i16 lane = iota() + (int32_t)i;
        i16 seen = (lane >= (int32_t)first) & (lane < (int32_t)last);
        v16 s = pick(seen, ld(score + i), none);
        st(score + i, s);
        top = max16(top, s);
    }
    return top;
}

typedef struct {
    int64_t row, count, position, history_rows;
    const float *history, *entries;
} Span;

/* q, out [R][heads][c]; top and norm [R][heads]: maximum and denominator of each softmax.
 *
 * A span is {row, count, position, history rows, history, entries}: `history` holds the rows of
 * consecutive positions that end with the span's last. ratio 0: window only. picked NULL: all
 * complete entries; else picked[R][slots] ascending, -1 at the end. c is a multiple of 16.
 * 0, or -1 out of memory. */
PUBLIC int ps_attend(const float *q, int64_t heads, int64_t c, const int64_t *spans,
                     int64_t n_spans, int64_t window, int64_t ratio, const int64_t *picked,
                     int64_t slots, const float *sink, float scale, float *out, float *top,
                     float *norm) {
    float *zero = ps_scratch(2, c);
    if (!zero) return -1;
    memset(zero, 0, (size_t)c * 4);
    for (int64_t s = 0; s < n_spans; s++) {
        Span span;
        memcpy(&span, spans + 6 * s, sizeof span);
        int64_t known = span.position + span.count - span.history_rows;
        int64_t most = ratio ? (span.position + span.count) / ratio : 0;
        if (picked) most = slots;
        int64_t per_token = heads * ((window + 32 + most + 15) / 16 * 16);
        int64_t step = MOST_FLOATS / per_token;
        if (step > MOST_ROWS / heads) step = MOST_ROWS / heads;
        if (step < 1) step = 1;
        for (int64_t t = 0; t < span.count; t += step) {
            int64_t count = t + step < span.count ? step : span.count - t;
            int64_t first = span.position + t, end = first + count, rows = count * heads;
            int64_t low = first - window + 1 > 0 ? (first - window + 1) / 16 * 16 : 0;
            int64_t near = (end - low + 15) / 16 * 16;
            int64_t far = picked || !ratio ? 0 : (end / ratio + 15) / 16 * 16;
            int64_t chosen = picked ? (slots + 15) / 16 * 16 : 0;
            int64_t width = near + far + chosen;
            float *score = ps_scratch(3, rows * width);
            row_t *key = (row_t *)ps_scratch(4, 2 * width);
            float *panels = ps_scratch(1, (near + far + 16) * c);
            if (!score || !key || !panels) return -1;
            const float *from = q + (span.row + t) * heads * c;
            float *to = out + (span.row + t) * heads * c;
            memset(to, 0, (size_t)(rows * c) * 4);
            for (int64_t n = 0; n < near; n++) {
                int64_t at = low + n;
                key[n] = at >= known && at < end ? span.history + (at - known) * c : zero;
            }
            int64_t visible = ratio ? end / ratio : 0;
            for (int64_t n = 0; n < far; n++)
                key[near + n] = n < visible ? span.entries + n * c : zero;
            turn_keys(key, near + far, c, panels);
            score_panels(from, rows, c, panels, near + far, scale, score, width);
            for (int64_t i = 0; i < count; i++) {
                int64_t at = first + i, lows = at - window + 1 > 0 ? at - window + 1 : 0;
                int64_t used = far, seen = ratio ? (at + 1) / ratio : 0;
                if (picked) {
                    const int64_t *list = picked + (span.row + t + i) * slots;
                    for (seen = 0; seen < slots && list[seen] >= 0; seen++)
                        key[near + seen] = span.entries + list[seen] * c;
                    used = (seen + 15) / 16 * 16;
                    for (int64_t n = seen; n < used; n++) key[near + n] = zero;
                    score_all(from + i * heads * c, heads, c, key + near, used, scale,
                              score + i * heads * width + near, width);
                }
                for (int64_t h = 0; h < heads; h++) {
                    int64_t m = i * heads + h;
                    float *p = score + m * width;
                    v16 best = mask_range(p, near, lows - low, at - low + 1, all(sink[h]));
                    float peak = top16(mask_range(p + near, used, 0, seen, best));
                    v16 sum = {};
                    for (int64_t n = 0; n < near + used; n += 16) {
                        v16 w = exp16(ld(p + n) - peak);
                        st(p + n, w);
                        sum += w;
                    }
                    float extra[16];
                    st(extra, exp16(all(sink[h] - peak)));
                    int64_t place = (span.row + t) * heads + m;
                    top[place] = peak;
                    norm[place] = sum16(sum) + extra[0];
                }
                if (picked) {
                    int64_t m = i * heads;
                    add_values(score + m * width, heads, width, key, near, to + m * c, c);
                    add_values(score + m * width + near, heads, width, key + near, seen,
                               to + m * c, c);
                }
            }
            if (!picked) add_values(score, rows, width, key, near + visible, to, c);
            for (int64_t m = 0; m < rows; m++) {
                float inverse = 1.0f / norm[(span.row + t) * heads + m];
                for (int64_t n = 0; n < c; n += 16) st(to + m * c + n, ld(to + m * c + n) * inverse);
            }
        }
    }
    return 0;
}

/* mass[slots]: attention probability of each listed entry, averaged in order over the heads, of one
 * row q[heads][c] whose softmax has maximum `top` and denominator `norm` [heads]. */
PUBLIC int ps_entry_mass(const float *q, int64_t heads, int64_t c, const float *entries,
                         const int64_t *list, int64_t slots, float scale, const float *top,
                         const float *norm, float *mass) {
    int64_t width = (slots + 15) / 16 * 16, seen = 0;
    float *score = ps_scratch(3, heads * width);
    row_t *key = (row_t *)ps_scratch(4, 2 * width);
    if (!score || !key) return -1;
    for (; seen < slots && list[seen] >= 0; seen++) key[seen] = entries + list[seen] * c;
    for (int64_t n = seen; n < width; n++) key[n] = entries;
    score_all(q, heads, c, key, width, scale, score, width);
    for (int64_t n = 0; n < width; n += 16) {
        v16 sum = {};
        for (int64_t h = 0; h < heads; h++)
            sum += exp16(ld(score + h * width + n) - top[h]) / norm[h];
        float found[16];
        st(found, sum / (float)heads);
        for (int64_t i = n; i < n + 16 && i < slots; i++) mass[i] = i < seen ? found[i - n] : 0.0f;
    }
    return 0;
}
