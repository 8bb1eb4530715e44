/* Dot products of four rows with four keys at a time: per pair sixteen partial sums by lane, then
 * one tree. A pair's result does not depend on which other pairs share the tile.
 */
#ifndef PENSTOCK_DOTS_H
#define PENSTOCK_DOTS_H
#include "vec.h"

#define FOLD8(a, b)                                                                             \
    (__builtin_shuffle(a, b, (i16){0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23}) +   \
     __builtin_shuffle(a, b, (i16){8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}))
#define FOLD4(a, b)                                                                             \
    (__builtin_shuffle(a, b, (i16){0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27}) + \
     __builtin_shuffle(a, b, (i16){4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31}))
#define FOLD2(a, b)                                                                             \
    (__builtin_shuffle(a, b, (i16){0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29}) + \
     __builtin_shuffle(a, b, (i16){2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31}))
#define FOLD1(a, b)                                                                             \
    (__builtin_shuffle(a, b, (i16){0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30}) +\
     __builtin_shuffle(a, b, (i16){1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31}))

/* Lane 4 i + j: the dot product of row i and key j over c channels (a multiple of 16). */
INLINE v16 dots(const float *const q[4], const float *const k[4], int64_t c) {
    v16 s[16] = {};
    for (int64_t at = 0; at < c; at += 16) {
        v16 y[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) y[j] = ld(k[j] + at);
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            v16 x = ld(q[i] + at);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) s[4 * i + j] = fma16(x, y[j], s[4 * i + j]);
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) s[i] = FOLD8(s[2 * i], s[2 * i + 1]);
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) s[i] = FOLD4(s[2 * i], s[2 * i + 1]);
    return FOLD1(FOLD2(s[0], s[1]), FOLD2(s[2], s[3]));
}

#endif
