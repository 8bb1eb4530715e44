/* Lightning indexer: scores of keys and the choice of the best (deepseek-v4.md 2.4). */
#include "panels.h"

#define PANEL_FLOATS 4096

/* total[2] += weight * relu(q . key) of `heads` heads in order, for the KEYS keys of a panel. */
INLINE void score_tile(int heads, const float *q, const float *weight, const float *panel,
                       int64_t c, v16 *total) {
    v16 sum[8][2];
#pragma GCC unroll 8
    for (int h = 0; h < heads; h++) sum[h][0] = sum[h][1] = (v16){};
    for (int64_t i = 0; i < c; i++) {
        v16 a = ld(panel + i * KEYS), b = ld(panel + i * KEYS + 16);
#pragma GCC unroll 8
        for (int h = 0; h < heads; h++) {
            v16 x = all(q[h * c + i]);
            sum[h][0] = fma16(x, a, sum[h][0]);
            sum[h][1] = fma16(x, b, sum[h][1]);
        }
    }
#pragma GCC unroll 8
    for (int h = 0; h < heads; h++) {
        v16 x = all(weight[h]);
        total[0] = fma16(max16(sum[h][0], (v16){}), x, total[0]);
        total[1] = fma16(max16(sum[h][1], (v16){}), x, total[1]);
    }
}

/* score[r][e] = sum over heads in order of weight[r][h] * relu(q[r][h] . key[e]) for e below
 * visible[r]; each dot product is one chain over the channels. What lies beyond, up to ld_score, is
 * undefined. c is a multiple of 16. 0, or -1 out of memory. */
PUBLIC int ps_index_scores(const float *q, const float *weight, int64_t rows, int64_t heads,
                           int64_t c, const float *keys, const int64_t *visible, float *score,
                           int64_t ld_score) {
    int64_t most = 0, block = PANEL_FLOATS / (KEYS * c) * KEYS;
    if (block < KEYS) block = KEYS;
    for (int64_t r = 0; r < rows; r++) most = visible[r] > most ? visible[r] : most;
    float *panels = ps_scratch(0, block * c);
    const float **key = (const float **)ps_scratch(1, 2 * block);
    if (!panels || !key) return -1;
    for (int64_t first = 0; first < most; first += block) {
        int64_t count = first + block < most ? block : most - first;
        /* Beyond the last one it is repeated. */
        for (int64_t e = 0; e < block; e++)
            key[e] = keys + (first + e < most ? first + e : most - 1) * c;
        turn_keys(key, (count + KEYS - 1) / KEYS * KEYS, c, panels);
        for (int64_t r = 0; r < rows; r++) {
            int64_t end = first + count < visible[r] ? first + count : visible[r];
            for (int64_t e = first; e < end; e += KEYS) {
                const float *from = q + r * heads * c, *w = weight + r * heads;
                const float *panel = panels + (e - first) * c;
                v16 total[2] = {};
                int64_t h = 0;
#define STEP(size)                                                                              \
    for (; h + size <= heads; h += size) score_tile(size, from + h * c, w + h, panel, c, total);
                STEP(8) STEP(4) STEP(2) STEP(1)
#undef STEP
                float *to = score + r * ld_score + e;
                if (e + KEYS <= ld_score) {
                    st(to, total[0]), st(to + 16, total[1]);
                } else {
                    float last[KEYS];
                    st(last, total[0]), st(last + 16, total[1]);
                    memcpy(to, last, (size_t)(ld_score - e) * 4);
                }
            }
        }
    }
    return 0;
}

/* Order of floats as order of signed numbers; -0 counts as 0. */
INLINE i16 rank16(v16 x) {
    i16 bits = (i16)(x + (v16){});
    return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

INLINE int any16(i16 mask) {
    union { i16 v; int64_t half[8]; } x = {mask};
    int64_t found = 0;
    for (int i = 0; i < 8; i++) found |= x.half[i];
    return found != 0;
}

/* Appends the lanes of `x` that are at least `edge`, and their places; returns the new count.
 * Up to sixteen places behind it are written over. */
INLINE int64_t append(int32_t *rank, int32_t *place, int64_t n, i16 x, i16 at, int32_t edge) {
#if defined(__AVX512F__)
    __mmask16 in = _mm512_cmpge_epi32_mask((__m512i)x, _mm512_set1_epi32(edge));
    if (!in) return n;
    _mm512_storeu_si512(rank + n, _mm512_maskz_compress_epi32(in, (__m512i)x));
    _mm512_storeu_si512(place + n, _mm512_maskz_compress_epi32(in, (__m512i)at));
    return n + __builtin_popcount(in);
#else
    i16 in = x >= edge;
    if (!any16(in)) return n;
    for (int j = 0; j < 16; j++)
        if (in[j]) rank[n] = x[j], place[n++] = at[j];
    return n;
#endif
}

INLINE i16 ld_ranks(const int32_t *p) { return (i16)ld((const float *)p); }

/* How many of n ranks are at least `edge`, which is above INT32_MIN; that fills the last vector. */
static int64_t count_from(const int32_t *rank, int64_t n, int32_t edge) {
    i16 sum = {};
    int64_t found = 0;
    for (int64_t i = 0; i < n; i += 16) sum -= ld_ranks(rank + i) >= edge;
    for (int j = 0; j < 16; j++) found += sum[j];
    return found;
}

/* Keeps the k best of n > k candidates, in order; equal ones: the first. Returns the least rank
 * that a later candidate needs. There is room for a vector behind the candidates.
 *
 * The edge is found by halving the range of ranks: at most 32 counts, fewer as soon as one of them
 * is k. */
static int32_t keep_best(int32_t *rank, int32_t *place, int64_t n, int64_t k) {
    i16 least = ld_ranks(rank), most = least;
    for (int64_t i = 0; i + 16 <= n; i += 16) {
        i16 x = ld_ranks(rank + i);
        i16 under = x < least, over = x > most;
        least = (x & under) | (least & ~under), most = (x & over) | (most & ~over);
    }
    int64_t low = rank[n - 1], high = low, used = 0;
    for (int64_t i = n / 16 * 16; i < n; i++) {
        low = rank[i] < low ? rank[i] : low;
        high = rank[i] > high ? rank[i] : high;
    }
    for (int j = 0; j < 16 && j < n; j++) {
        low = least[j] < low ? least[j] : low;
        high = most[j] > high ? most[j] : high;
    }
    st((float *)(rank + n), (v16)((i16){} + INT32_MIN));
    /* At least k are >= low, fewer than k are > high. */
    while (low < high) {
        int64_t middle = low + (high - low + 1) / 2;
        int64_t found = count_from(rank, n, (int32_t)middle);
        if (found >= k) low = middle;
        else high = middle - 1;
        if (found == k) break;
    }
    if (low < high) {
        for (int64_t i = 0; i < n; i += 16)
            used = append(rank, place, used, ld_ranks(rank + i), ld_ranks(place + i), (int32_t)low);
        return (int32_t)low;
    }
    int64_t spare = k - (low < INT32_MAX ? count_from(rank, n, (int32_t)low + 1) : 0);
    for (int64_t i = 0; i < n; i++) {
        int32_t x = rank[i], where = place[i];
        int tie = x == low, keep = x > low || (tie && spare > 0);
        spare -= tie;
        rank[used] = x, place[used] = where;
        used += keep;
    }
    /* A later one that equals the k-th best loses to it. */
    return (int32_t)(low < INT32_MAX ? low + 1 : low);
}

/* picked[r][k]: the k best of the first visible[r] scores, ascending, -1 in unused slots; equal
 * scores: the lower index wins (T15). 0, or -1 out of memory.
 *
 * Every score is read once: those below the k-th best so far can never be chosen, the others are
 * gathered, and cut back to k whenever there are twice as many. */
PUBLIC int ps_select(const float *score, int64_t ld_score, int64_t rows, const int64_t *visible,
                     int64_t k, int64_t *picked) {
    int64_t room = 2 * k + 256;
    int32_t *rank = (int32_t *)ps_scratch(0, 2 * (room + 32)), *place = rank + room + 32;
    if (!rank) return -1;
    for (int64_t r = 0; r < rows; r++) {
        const float *s = score + r * ld_score;
        int64_t *to = picked + r * k, seen = visible[r], n = 0, i = 0;
        if (seen <= k) {
            for (i = 0; i < k; i++) to[i] = i < seen ? i : -1;
            continue;
        }
        int32_t edge = INT32_MIN;
        for (; i + 16 <= seen; i += 16) {
            n = append(rank, place, n, rank16(ld(s + i)), iota() + (int32_t)i, edge);
            if (n > room) edge = keep_best(rank, place, n, k), n = k;
        }
        if (i < seen) {
            float last[16];
            for (int j = 0; j < 16; j++) last[j] = -__builtin_inff();
            memcpy(last, s + i, (size_t)(seen - i) * 4);
            n = append(rank, place, n, rank16(ld(last)), iota() + (int32_t)i, edge);
            /* Lanes that are no scores come last. */
            while (n && place[n - 1] >= seen) n--;
        }
        if (n > k) keep_best(rank, place, n, k);
        for (int64_t j = 0; j < k; j++) to[j] = place[j];
    }
    return 0;
}
