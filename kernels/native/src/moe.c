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

/* silu(min(gate, limit)) * clamp(up); limit 0: no clamp (T5, T6). */
INLINE v16 swiglu(v16 gate, v16 up, float limit) {
    if (limit > 0) {
        gate = min16(gate, all(limit));
        up = min16(max16(up, all(-limit)), all(limit));
    }
    return gate * sigmoid16(gate) * up;
}

typedef struct { const void *w13, *w2; int64_t bf16; } Expert;

/* Which rows an expert sees. `list`: slots (row k + j) of experts first .. first + n - 1 by expert,
 * then ascending; those of expert first + e end at end[e]. */
typedef struct { int64_t *list, *end, most; } Plan;

static int plan(const int64_t *ids, int64_t slots, int64_t first, int64_t n, Plan *to) {
    to->list = (int64_t *)ps_scratch(3, 2 * (slots + n + 1));
    if (!to->list) return -1;
    int64_t *at = to->end = to->list + slots;
    memset(at, 0, (size_t)(n + 1) * 8);
    for (int64_t i = 0; i < slots; i++)
        if (ids[i] >= first && ids[i] < first + n) at[ids[i] - first + 1]++;
    to->most = 0;
    for (int64_t e = 0; e < n; e++) to->most = at[e + 1] > to->most ? at[e + 1] : to->most;
    for (int64_t e = 0; e < n; e++) at[e + 1] += at[e];
    for (int64_t i = 0; i < slots; i++)
        if (ids[i] >= first && ids[i] < first + n) to->list[at[ids[i] - first]++] = i;
    return 0;
}

/* inner[rows][width] = swiglu of x W13 times the rows' weights (NULL: 1). */
static int up(const Expert *expert, const float *x, const float *weight, int64_t rows, int64_t d,
              int64_t width, float limit, float *inner) {
    /* A vector that begins in a row's last lanes reads on behind it. */
    float *both = ps_scratch(1, rows * 2 * width + 32), last[16];
    if (!both) return -1;
    ps_tile_product(x, d, rows, expert->w13, (int)expert->bf16, d, 2 * width, both, 2 * width);
    for (int64_t r = 0; r < rows; r++) {
        const float *gate = both + r * 2 * width, share = weight ? weight[r] : 1.0f;
        int64_t i = 0;
        for (; i + 16 <= width; i += 16)
            st(inner + r * width + i, swiglu(ld(gate + i), ld(gate + width + i), limit) * share);
        if (i == width) continue;
        st(last, swiglu(ld(gate + i), ld(gate + width + i), limit) * share);
        memcpy(inner + r * width + i, last, (size_t)(width - i) * 4);
    }
    return 0;
}

/* `up` of one expert's rows, which lie apart in x. */
static int up_routed(const Expert *expert, const float *x, const float *weights, int64_t k,
                     const int64_t *list, int64_t count, int64_t d, int64_t width, float limit,
                     float *inner) {
    float *gathered = ps_scratch(2, count * (d + 1)), *weight = gathered + count * d;
    if (!gathered) return -1;
    for (int64_t i = 0; i < count; i++) {
        memcpy(gathered + i * d, x + list[i] / k * d, (size_t)d * 4);
        weight[i] = weights[list[i]];
    }
    return up(expert, gathered, weight, count, d, width, limit, inner);
}

static void add(float *to, const float *y, int64_t d) {
    for (int64_t j = 0; j < d; j++) to[j] += y[j];
}

/* routed[rows][d]: each row's sum of y, which lie in the order of `list`: in ascending order of
 * experts within a part of `unit` experts, then the parts as a binary tree over the parts of all
 * experts, so that a rank which holds one or two or four parts holds a whole branch. A branch
 * without an expert adds nothing. Then + shared, if it is there. y is written over.
 *
 * Adding 0 turns -0 into 0, as a rank without experts for a row adds it. */
static int add_up(float *y, int64_t rows, int64_t k, int64_t d, const int64_t *ids,
                  const Plan *slots, int64_t mine, int64_t unit, const float *shared,
                  float *routed) {
    int64_t *place = (int64_t *)ps_scratch(2, 2 * (rows + 2) * k), *part = place + rows * k;
    float **term = (float **)(part + k);
    if (!place) return -1;
    memset(place, -1, (size_t)(rows * k) * 8);
    for (int64_t i = 0; i < mine; i++) place[slots->list[i]] = i;
    for (int64_t r = 0; r < rows; r++) {
        int64_t n = 0;
        for (int64_t j = r * k; j < (r + 1) * k; j++)
            if (place[j] >= 0) part[n] = ids[j] / unit, term[n++] = y + place[j] * d;
        while (n > 1) {
            int64_t left = 0;
            for (int64_t i = 1; i < n; i++) {
                if (part[i] == part[left]) add(term[left], term[i], d);
                else left++, part[left] = part[i], term[left] = term[i];
            }
            n = left + 1;
            for (int64_t i = 0; i < n; i++) part[i] /= 2;
        }
        float *to = routed + r * d;
        if (n) for (int64_t j = 0; j < d; j++) to[j] = term[0][j] + 0.0f;
        else memset(to, 0, (size_t)d * 4);
        if (shared) add(to, shared + r * d, d);
    }
    return 0;
}

/* Up to the inner channels: inner[slots][width] of experts first .. first + n - 1 by expert, then
 * by slot, and shared[rows][shared_width]. `experts` holds {w13, w2, bf16} of those and then of the
 * shared expert; ids of others belong to other ranks, and so may some of the inner channels. 0, or
 * -1 out of memory. */
PUBLIC int ps_experts_up(const float *x, int64_t rows, int64_t d, const int64_t *ids,
                         const float *weights, int64_t k, const Expert *experts, int64_t first,
                         int64_t n, int64_t width, int64_t shared_width, float limit, float *inner,
                         float *shared) {
    Plan slots;
    if (plan(ids, rows * k, first, n, &slots)) return -1;
    for (int64_t e = 0, at = 0; e < n; at = slots.end[e++])
        if (slots.end[e] > at && up_routed(experts + e, x, weights, k, slots.list + at,
                                           slots.end[e] - at, d, width, limit, inner + at * width))
            return -1;
    return up(experts + n, x, NULL, rows, d, shared_width, limit, shared);
}

/* Down from whole inner channels, as `ps_experts_up` orders them, to some outputs: routed[rows][d]
 * and shared[rows][shared_d]. */
PUBLIC int ps_experts_down(const float *inner, const float *shared_inner, int64_t rows,
                           const int64_t *ids, int64_t k, const Expert *experts, int64_t first,
                           int64_t n, int64_t unit, int64_t width, int64_t shared_width, int64_t d,
                           int64_t shared_d, float *routed, float *shared) {
    Plan slots;
    if (plan(ids, rows * k, first, n, &slots)) return -1;
    int64_t mine = n ? slots.end[n - 1] : 0;
    float *y = ps_scratch(4, mine * d + 1);
    if (!y) return -1;
    for (int64_t e = 0, at = 0; e < n; at = slots.end[e++])
        ps_tile_product(inner + at * width, width, slots.end[e] - at, experts[e].w2,
                        (int)experts[e].bf16, width, d, y + at * d, d);
    ps_tile_product(shared_inner, shared_width, rows, experts[n].w2, (int)experts[n].bf16,
                    shared_width, shared_d, shared, shared_d);
    return add_up(y, rows, k, d, ids, &slots, mine, unit, NULL, routed);
}

/* out[rows][d]: up and down of all experts and the shared one, added. */
PUBLIC int ps_experts(const float *x, int64_t rows, int64_t d, const int64_t *ids,
                      const float *weights, int64_t k, const Expert *experts, int64_t n,
                      int64_t unit, int64_t width, int64_t shared_width, float limit, float *out) {
    Plan slots;
    if (plan(ids, rows * k, 0, n, &slots)) return -1;
    int64_t most = slots.most * width;
    if (rows * shared_width > most) most = rows * shared_width;
    float *y = ps_scratch(4, rows * (k + 1) * d), *inner = ps_scratch(0, most);
    if (!y || !inner) return -1;
    for (int64_t e = 0, at = 0; e < n; at = slots.end[e++]) {
        int64_t count = slots.end[e] - at;
        if (!count) continue;
        if (up_routed(experts + e, x, weights, k, slots.list + at, count, d, width, limit, inner))
            return -1;
        ps_tile_product(inner, width, count, experts[e].w2, (int)experts[e].bf16, width, d,
                        y + at * d, d);
    }
    float *shared = y + rows * k * d;
    if (up(experts + n, x, NULL, rows, d, shared_width, limit, inner)) return -1;
    ps_tile_product(inner, shared_width, rows, experts[n].w2, (int)experts[n].bf16, shared_width, d,
                    shared, d);
    return add_up(y, rows, k, d, ids, &slots, rows * k, unit, shared, out);
}
