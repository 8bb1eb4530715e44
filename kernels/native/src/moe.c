/* Mixture of experts (deepseek-v4.md 1.4): routing, and the experts' clamped SwiGLU. */
#include "vec.h"

/* ids[rows][k] ascending and their weights, of router logits [rows][experts]. `table`: the ids of
 * each row's token in ascending order (hash routing), or NULL with the selection bias. The bias
 * takes part in the choice only; equal scores: the lower id wins. 0, or -1 out of memory. */
PUBLIC int ps_route(const float *logits, int64_t rows, int64_t experts, const float *bias,
                    const int64_t *table, int64_t k, float scale, int64_t *ids, float *weights) {
    int64_t width = (experts + 15) / 16 * 16;
    float *score = ps_scratch(0, 2 * width), *biased = score + width;
    if (!score) return -1;
    memset(score, 0, (size_t)width * 4);
    for (int64_t r = 0; r < rows; r++) {
        int64_t *id = ids + r * k;
        float *weight = weights + r * k, sum = 0.0f;
        memcpy(score, logits + r * experts, (size_t)experts * 4);
        for (int64_t i = 0; i < width; i += 16) {
            v16 x = ld(score + i);
            float y[16];
            /* Below -16 it is e^x, down to the smallest subnormal number (T9). */
            v16 tiny = exp16(x + 40.0f) * 4.248354255291589e-18f;
            st(y, pick(x < all(-16.0f), tiny, softplus16(x)));
            for (int j = 0; j < 16; j++) score[i + j] = __builtin_sqrtf(y[j]);
        }
        if (table) {
            memcpy(id, table + r * k, (size_t)k * 8);
        } else {
            for (int64_t i = 0; i < experts; i++) biased[i] = score[i] + bias[i];
            for (int64_t n = 0; n < k; n++) {
                int64_t best = -1;
                for (int64_t i = 0; i < experts; i++)
                    if (biased[i] > -__builtin_inff() && (best < 0 || biased[i] > biased[best]))
                        best = i;
                int64_t at = n;
                for (; at > 0 && id[at - 1] > best; at--) id[at] = id[at - 1];
                id[at] = best;
                biased[best] = -__builtin_inff();
            }
        }
        for (int64_t n = 0; n < k; n++) sum += weight[n] = score[id[n]];
        sum = sum > 1e-30f ? sum : 1e-30f;
        for (int64_t n = 0; n < k; n++) weight[n] = weight[n] / sum * scale;
    }
    return 0;
}

/* silu(min(gate, limit)) * clamp(up) * weight of rows [gate | up]; limit 0: no clamp (T5, T6). */
INLINE void swiglu(const float *both, int64_t width, float limit, float weight, float *out) {
    for (int64_t i = 0; i < width; i += 16) {
        v16 gate = ld(both + i), up = ld(both + width + i);
        if (limit > 0) {
            gate = min16(gate, all(limit));
            up = min16(max16(up, all(-limit)), all(limit));
        }
        st(out + i, gate * sigmoid16(gate) * up * weight);
    }
}

typedef struct { const void *w13, *w2; int64_t bf16; } Expert;

static int run(const Expert *expert, const float *x, const float *weight, int64_t rows, int64_t d,
               int64_t width, float limit, float *out) {
    int64_t pad = (width + 15) / 16 * 16 + 16;
    float *both = ps_scratch(1, rows * (2 * width + pad)), *inner = both + rows * 2 * width;
    if (!both) return -1;
    ps_tile_product(x, d, rows, expert->w13, (int)expert->bf16, d, 2 * width, both, 2 * width);
    for (int64_t r = 0; r < rows; r++)
        swiglu(both + r * 2 * width, width, limit, weight ? weight[r] : 1.0f, inner + r * pad);
    ps_tile_product(inner, pad, rows, expert->w2, (int)expert->bf16, width, d, out, d);
    return 0;
}

/* out[rows][d] = sum over a row's experts in ascending order, then + the shared expert.
 *
 * `experts` holds {w13, w2, bf16} of experts first .. first + n - 1 and then of the shared expert
 * (w13 NULL: none); other ids belong to other ranks. `width` and `shared_width`: an expert's inner
 * channels here. 0, or -1 out of memory. */
PUBLIC int ps_experts(const float *x, int64_t rows, int64_t d, const int64_t *ids,
                      const float *weights, int64_t k, const Expert *experts, int64_t first,
                      int64_t n, int64_t width, int64_t shared_width, float limit, float *out) {
    const Expert *shared = experts + n;
    int64_t *list = (int64_t *)ps_scratch(3, 2 * (rows * k + n + 1)), most = rows;
    if (!list) return -1;
    int64_t *start = list + rows * k;
    memset(start, 0, (size_t)(n + 1) * 8);
    for (int64_t i = 0; i < rows * k; i++)
        if (ids[i] >= first && ids[i] < first + n) start[ids[i] - first + 1]++;
    /* A hash table may name an expert twice for one token. */
    for (int64_t e = 0; e < n; e++) most = start[e + 1] > most ? start[e + 1] : most;
    float *gathered = ps_scratch(2, most * (2 * d + 1));
    if (!gathered) return -1;
    float *y = gathered + most * d, *weight = y + most * d;
    for (int64_t e = 0; e < n; e++) start[e + 1] += start[e];
    for (int64_t i = 0; i < rows * k; i++)
        if (ids[i] >= first && ids[i] < first + n) list[start[ids[i] - first]++] = i;
    memset(out, 0, (size_t)(rows * d) * 4);
    for (int64_t e = 0, at = 0; e < n; at = start[e++]) {
        int64_t count = start[e] - at;
        if (!count) continue;
        for (int64_t i = 0; i < count; i++) {
            memcpy(gathered + i * d, x + list[at + i] / k * d, (size_t)d * 4);
            weight[i] = weights[list[at + i]];
        }
        if (run(experts + e, gathered, weight, count, d, width, limit, y)) return -1;
        for (int64_t i = 0; i < count; i++) {
            float *to = out + list[at + i] / k * d;
            for (int64_t j = 0; j < d; j++) to[j] += y[i * d + j];
        }
    }
    if (!shared->w13) return 0;
    if (run(shared, x, NULL, rows, d, shared_width, limit, y)) return -1;
    for (int64_t j = 0; j < rows * d; j++) out[j] += y[j];
    return 0;
}
