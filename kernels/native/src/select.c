/* Lightning indexer: scores of keys and the choice of the best (deepseek-v4.md 2.4). */
#include "dots.h"

typedef float v4 __attribute__((vector_size(16)));

/* score[r][e] = sum over heads in order of weight[r][h] * relu(q[r][h] . key[e]) for e below
 * round_up(visible[r], 4); c is a multiple of 16. */
PUBLIC void ps_index_scores(const float *q, const float *weight, int64_t rows, int64_t heads,
                            int64_t c, const float *keys, const int64_t *visible, float *score,
                            int64_t ld_score) {
    enum { BLOCK = 256 };
    int64_t most = 0;
    for (int64_t r = 0; r < rows; r++) most = visible[r] > most ? visible[r] : most;
    for (int64_t block = 0; block < most; block += BLOCK)
        for (int64_t r = 0; r < rows; r++) {
            int64_t end = block + BLOCK < visible[r] ? block + BLOCK : visible[r];
            for (int64_t e = block; e < end; e += 4) {
                const float *key[4], *from[4];
                for (int j = 0; j < 4; j++) key[j] = keys + (e + j) * c;
                v4 total = {};
                for (int64_t h = 0; h < heads; h += 4) {
                    int64_t count = h + 4 < heads ? 4 : heads - h;
                    for (int i = 0; i < 4; i++)
                        from[i] = q + (r * heads + h + (i < count ? i : count - 1)) * c;
                    union { v16 v; v4 row[4]; } found;
                    found.v = max16(dots(from, key, c), (v16){});
                    for (int64_t i = 0; i < count; i++)
                        total += found.row[i] * weight[r * heads + h + i];
                }
                memcpy(score + r * ld_score + e, &total, 16);
            }
        }
}

/* Order of floats as order of unsigned numbers; -0 counts as 0. */
INLINE uint32_t rank_of(float x) {
    union { float f; uint32_t u; } v = {x + 0.0f};
    return v.u & 0x80000000u ? ~v.u : v.u | 0x80000000u;
}

/* The value of rank k (1 = largest) among n, by counting: 12, 10 and 10 bits at a time.
 * *left: how many of the equal ones belong to the k largest. */
static uint32_t kth(const float *score, int64_t n, int64_t k, int64_t *left) {
    static const int shift[] = {20, 10, 0}, width[] = {12, 10, 10};
    uint32_t prefix = 0, mask = 0;
    for (int turn = 0; turn < 3; turn++) {
        uint32_t count[1 << 12] = {0}, bins = 1u << width[turn];
        for (int64_t i = 0; i < n; i++) {
            uint32_t x = rank_of(score[i]);
            if ((x & mask) == prefix) count[x >> shift[turn] & (bins - 1)]++;
        }
        uint32_t bin = bins - 1;
        while (count[bin] < k) k -= count[bin--];
        prefix |= bin << shift[turn];
        mask |= (bins - 1) << shift[turn];
    }
    *left = k;
    return prefix;
}

/* picked[r][k]: the k best of the first visible[r] scores, ascending, -1 in unused slots; equal
 * scores: the lower index wins (T15). */
PUBLIC void ps_select(const float *score, int64_t ld_score, int64_t rows, const int64_t *visible,
                      int64_t k, int64_t *picked) {
    for (int64_t r = 0; r < rows; r++) {
        const float *s = score + r * ld_score;
        int64_t *to = picked + r * k, seen = visible[r], used = 0, left = 0;
        if (seen <= k) {
            for (int64_t i = 0; i < k; i++) to[i] = i < seen ? i : -1;
            continue;
        }
        uint32_t edge = kth(s, seen, k, &left);
        for (int64_t i = 0; i < seen && used < k; i++) {
            uint32_t x = rank_of(s[i]);
            if (x > edge || (x == edge && left-- > 0)) to[used++] = i;
        }
    }
}
