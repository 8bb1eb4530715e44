/* Products whose rows cannot depend on each other: every output element is one chain of fused
 * multiply-adds over k = 0, 1, ..., K-1, whatever the number of rows in the call.
 *
 * Weights are packed in panels of 32 columns ([N/32][K][32], zeros at the end), fp32 or bf16.
 */
#include "vec.h"
#if defined(__GLIBC__)
#include <malloc.h>
#endif

#define WIDE 32
#define ROW_BLOCK 240

static __thread struct { float *data; int64_t floats; } kept[SLOTS];

float *ps_scratch(int slot, int64_t floats) {
    if (kept[slot].floats < floats) {
        free(kept[slot].data);
        kept[slot].floats = floats + floats / 2 + 64;
        kept[slot].data = aligned_alloc(64, (size_t)((kept[slot].floats * 4 + 63) / 64 * 64));
        if (!kept[slot].data) kept[slot].floats = 0;
    }
    return kept[slot].data;
}

/* Buffers of a layer come and go. Left to itself the allocator gives them back to the system and
 * takes them again, zeroed page by page: up to a sixth of a prefill. 64 MiB are kept at most. */
PUBLIC void ps_keep_memory(void) {
#if defined(__GLIBC__)
    mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 64 << 20);
#endif
}

PUBLIC void ps_pack(const float *w_NK, int64_t n, int64_t k, int bf16, void *out) {
    int64_t panels = (n + WIDE - 1) / WIDE;
    for (int64_t p = 0; p < panels; p++)
        for (int64_t i = 0; i < k; i++)
            for (int64_t j = 0; j < WIDE; j++) {
                int64_t col = p * WIDE + j, at = (p * k + i) * WIDE + j;
                union { float f; uint32_t u; } x = {col < n ? w_NK[col * k + i] : 0.0f};
                if (bf16)
                    ((uint16_t *)out)[at] = (uint16_t)(x.u >> 16);
                else
                    ((float *)out)[at] = x.f;
            }
}

/* `ahead`: a bf16 panel that is fetched on the way, or NULL. */
INLINE void tile(int rows, int bf16, const float *a, int64_t lda, const void *panel, int64_t k,
                 int64_t valid, float *c, int64_t ldc, const char *ahead) {
    v16 sum[8][2];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = (v16){};
    for (int64_t i = 0; i < k; i++) {
        v16 b0, b1;
        if (bf16) {
            const uint16_t *b = (const uint16_t *)panel + i * WIDE;
            b0 = ld_bf16(b), b1 = ld_bf16(b + 16);
        } else {
            const float *b = (const float *)panel + i * WIDE;
            b0 = ld(b), b1 = ld(b + 16);
        }
        if (ahead) __builtin_prefetch(ahead + i * WIDE * 2, 0, 2);
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            v16 x = all(a[r * lda + i]);
            sum[r][0] = fma16(x, b0, sum[r][0]);
            sum[r][1] = fma16(x, b1, sum[r][1]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++) {
        if (valid >= WIDE) {
            st(c + r * ldc, sum[r][0]), st(c + r * ldc + 16, sum[r][1]);
        } else {
            float last[WIDE];
            st(last, sum[r][0]), st(last + 16, sum[r][1]);
            memcpy(c + r * ldc, last, (size_t)valid * 4);
        }
    }
}

/* One row against four panels: enough chains side by side to hide the latency of an add. */
INLINE void row_of_four(int bf16, const float *a, const void *panel, int64_t k, float *c) {
    v16 sum[4][2] = {};
    for (int64_t i = 0; i < k; i++) {
        v16 x = all(a[i]);
#pragma GCC unroll 4
        for (int p = 0; p < 4; p++) {
            int64_t at = (p * k + i) * WIDE;
            v16 b0, b1;
            if (bf16) {
                b0 = ld_bf16((const uint16_t *)panel + at);
                b1 = ld_bf16((const uint16_t *)panel + at + 16);
            } else {
                b0 = ld((const float *)panel + at), b1 = ld((const float *)panel + at + 16);
            }
            sum[p][0] = fma16(x, b0, sum[p][0]);
            sum[p][1] = fma16(x, b1, sum[p][1]);
        }
    }
#pragma GCC unroll 4
    for (int p = 0; p < 4; p++) st(c + p * WIDE, sum[p][0]), st(c + p * WIDE + 16, sum[p][1]);
}

INLINE void product(int bf16, const float *a, int64_t lda, int64_t rows, const char *panels,
                    int64_t k, int64_t n, float *c, int64_t ldc) {
    int64_t panel_bytes = k * WIDE * (bf16 ? 2 : 4);
    for (int64_t first = 0; first < rows; first += ROW_BLOCK) {
        int64_t end = first + ROW_BLOCK < rows ? first + ROW_BLOCK : rows;
        int64_t col = 0;
        /* Widening a panel once pays when several tiles read it; without memory it is done anew. */
        float *wide = bf16 && end - first >= 16 ? ps_scratch(5, k * WIDE) : NULL;
        if (end - first == 1)
            for (; col + 4 * WIDE <= n; col += 4 * WIDE)
                row_of_four(bf16, a + first * lda, panels + col / WIDE * panel_bytes, k,
                            c + first * ldc + col);
        for (; col < n; col += WIDE) {
            const char *panel = panels + col / WIDE * panel_bytes;
            int64_t r = first;
#define TILE(size, small, from, next)                                                           \
    tile(size, small, a + r * lda, lda, from, k, n - col, c + r * ldc + col, ldc, next)
#define STEP(size, small, from)                                                                 \
    for (; r + size <= end; r += size) TILE(size, small, from, NULL);
            /* Read once a block of rows, a panel comes from memory: it is asked for while the one
             * before it is used. */
            const char *next = col + WIDE < n ? panel + panel_bytes : NULL;
            if (wide) {
                for (int64_t i = 0; i < k * WIDE; i += 16)
                    st(wide + i, ld_bf16((const uint16_t *)panel + i));
                if (next) TILE(8, 0, wide, next), r += 8;
                STEP(8, 0, wide) STEP(4, 0, wide) STEP(2, 0, wide) STEP(1, 0, wide)
            } else {
                STEP(8, bf16, panel) STEP(4, bf16, panel) STEP(2, bf16, panel) STEP(1, bf16, panel)
            }
#undef STEP
#undef TILE
        }
    }
}

void ps_tile_product(const float *a, int64_t lda, int64_t rows, const void *panels, int bf16,
                     int64_t k, int64_t n, float *c, int64_t ldc) {
    if (bf16)
        product(1, a, lda, rows, panels, k, n, c, ldc);
    else
        product(0, a, lda, rows, panels, k, n, c, ldc);
}

/* c[rows, n] = a[rows, k] W^T; rows of a and c lie lda and ldc floats apart. */
PUBLIC void ps_product(const float *a, int64_t lda, int64_t rows, const void *panels, int bf16,
                       int64_t k, int64_t n, float *c, int64_t ldc) {
    ps_tile_product(a, lda, rows, panels, bf16, k, n, c, ldc);
}
