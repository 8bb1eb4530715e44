/* Keys in panels, so that lanes run over keys: [c][KEYS] floats for KEYS of them. A dot product is
 * then one chain over the channels in one lane, whatever keys share the panel.
 */
#ifndef PENSTOCK_PANELS_H
#define PENSTOCK_PANELS_H
#include "vec.h"

#define KEYS 32

#define PAIRS(a, b, low)                                                                        \
    __builtin_shuffle(a, b, (i16){low, 16 + low, 1 + low, 17 + low, 4 + low, 20 + low, 5 + low, \
                                  21 + low, 8 + low, 24 + low, 9 + low, 25 + low, 12 + low,     \
                                  28 + low, 13 + low, 29 + low})
#define FOURS(a, b, low)                                                                        \
    __builtin_shuffle(a, b, (i16){low, 1 + low, 16 + low, 17 + low, 4 + low, 5 + low, 20 + low, \
                                  21 + low, 8 + low, 9 + low, 24 + low, 25 + low, 12 + low,     \
                                  13 + low, 28 + low, 29 + low})
#define EIGHTS(a, b, low)                                                                       \
    __builtin_shuffle(a, b, (i16){low, 1 + low, 2 + low, 3 + low, 8 + low, 9 + low, 10 + low,   \
                                  11 + low, 16 + low, 17 + low, 18 + low, 19 + low, 24 + low,   \
                                  25 + low, 26 + low, 27 + low})

/* out[channel][16] of sixteen channels of sixteen keys; rows of out lie KEYS floats apart. */
INLINE void turn16(const float *const key[16], int64_t at, float *out) {
    v16 a[16], b[16];
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) a[j] = ld(key[j] + at);
    /* Lane group g of b[4 i + m] holds channel 4 g + m of keys 4 i .. 4 i + 3. */
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        v16 x = PAIRS(a[i], a[i + 1], 0), y = PAIRS(a[i + 2], a[i + 3], 0);
        v16 z = PAIRS(a[i], a[i + 1], 2), w = PAIRS(a[i + 2], a[i + 3], 2);
        b[i] = FOURS(x, y, 0), b[i + 1] = FOURS(x, y, 2);
        b[i + 2] = FOURS(z, w, 0), b[i + 3] = FOURS(z, w, 2);
    }
#pragma GCC unroll 4
    for (int m = 0; m < 4; m++) {
        v16 x = EIGHTS(b[m], b[4 + m], 0), y = EIGHTS(b[8 + m], b[12 + m], 0);
        v16 z = EIGHTS(b[m], b[4 + m], 4), w = EIGHTS(b[8 + m], b[12 + m], 4);
        st(out + (0 + m) * KEYS, EIGHTS(x, y, 0)), st(out + (8 + m) * KEYS, EIGHTS(x, y, 4));
        st(out + (4 + m) * KEYS, EIGHTS(z, w, 0)), st(out + (12 + m) * KEYS, EIGHTS(z, w, 4));
    }
}

/* `count` keys (a multiple of 16) as [panel][c][KEYS]. c is a multiple of 16. */
INLINE void turn_keys(const float *const *key, int64_t count, int64_t c, float *out) {
    for (int64_t e = 0; e < count; e += 16)
        for (int64_t at = 0; at < c; at += 16)
            turn16(key + e, at, out + e / KEYS * KEYS * c + at * KEYS + e % KEYS);
}

#endif
