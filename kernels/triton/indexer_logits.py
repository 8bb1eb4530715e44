"""Lightning indexer scores; meaning in kernels/reference/indexer_logits.py.

Keys are the rows of a product and heads its columns, so the weighted sum over heads stays within a
quad of lanes. A program keeps 128 keys and walks over query tokens; the paged form decodes its FP4
keys to e4m3 in registers first.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.indexer_logits import SCORE_BLOCK
from kernels.reference.pages import IndexPages
from kernels.triton.launch import Case, launch, meta
from kernels.triton.numerals import fp4_value, power_of_two

_KEYS = 128
_TOKENS = 32


@triton.jit
def load_index(slot, pages, page_bytes, page_rows, N: tl.constexpr, C: tl.constexpr):
    """e4m3 keys [N, C] and their fp32 scales [N]; slot must be valid."""
    HALF: tl.constexpr = C // 2
    page = pages + (slot // page_rows).to(tl.int64) * page_bytes
    row = slot % page_rows
    byte = tl.load((page + row * HALF)[:, None] + tl.arange(0, HALF)[None, :]).to(tl.int32)
    start = page + page_rows * HALF + row * (C // 32)
    exponent = tl.load(start[:, None] + tl.arange(0, C // 32)[None, :]).to(tl.int32)
    top = tl.maximum(tl.max(exponent, 1), 7) - 6
    values = tl.join(fp4_value(byte & 15), fp4_value(byte >> 4))
    factor = power_of_two(tl.maximum(exponent - top[:, None], -126))
    values = tl.reshape(values, (N, C // 32, 32)) * factor[:, :, None]
    return tl.reshape(values, (N, C)).to(tl.float8e4nv), (top << 23).to(tl.float32, bitcast=True)


@triton.jit
def store_scores(score, entry, seen, scores, maxima, N: tl.constexpr, BLOCK: tl.constexpr, entries):
    """Scores of one token's N entries and the maxima of their blocks, nan passed over."""
    score = tl.where(entry < seen, score, float("-inf"))
    tl.store(scores + entry, score, mask=entry < entries)
    known = tl.where(score == score, score, float("-inf"))
    best = tl.max(tl.reshape(known, (N // BLOCK, BLOCK)), 1)
    block = tl.program_id(0) * (N // BLOCK) + tl.arange(0, N // BLOCK)
    tl.store(maxima + block, best, mask=block < tl.cdiv(entries, BLOCK))


@triton.jit
def weighted(keys, q, weight, heads, H: tl.constexpr, C: tl.constexpr):
    """sum over heads of weight * relu(keys . q): [N] fp32."""
    head = tl.arange(0, H)
    inside = head < heads
    at = head[:, None] * C + tl.arange(0, C)[None, :]
    query = tl.load(q + at, mask=inside[:, None], other=0.0)
    product = tl.dot(keys, tl.trans(query))
    factor = tl.load(weight + head, mask=inside, other=0.0)
    return tl.sum(tl.where(product > 0.0, product, 0.0) * factor[None, :], 1)


@triton.jit
def _indexer_logits(
    q, weight, keys, key_scale, visible, scores, maxima, rows, heads, entries, blocks,
    TOKENS: tl.constexpr, N: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0) * N + tl.arange(0, N)
    first = tl.program_id(1) * TOKENS
    token = first + tl.arange(0, TOKENS)
    furthest = tl.max(tl.load(visible + token, mask=token < rows, other=0), 0)
    if tl.program_id(0) * N < furthest:
        at = entry.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]
        tile = tl.load(keys + at, mask=(entry < entries)[:, None], other=0.0)
        scale = tl.load(key_scale + entry, mask=entry < entries, other=0.0)
        for row in tl.range(first, tl.minimum(first + TOKENS, rows)):
            place = first.to(tl.int64) + (row - first)
            query, factor = q + place * heads * C, weight + place * heads
            score = weighted(tile, query, factor, heads, H, C) * scale
            seen = tl.load(visible + row)
            store_scores(
                score, entry, seen, scores + place * entries, maxima + place * blocks,
                N, BLOCK, entries,
            )  # fmt: skip


@triton.jit
def _indexer_logits_paged(
    q, weight, pages, tables, visible, scores, maxima, heads, entries, blocks, places,
    page_bytes, page_rows,
    N: tl.constexpr, H: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(0) * N + tl.arange(0, N)
    row = tl.program_id(1).to(tl.int64)
    seen = tl.load(visible + row)
    if tl.program_id(0) * N < seen:
        table = tables + row * places + entry // page_rows
        page = tl.load(table, mask=entry < seen, other=0)
        slot = page * page_rows + entry % page_rows
        tile, scale = load_index(slot, pages, page_bytes, page_rows, N, C)
        score = weighted(tile, q + row * heads * C, weight + row * heads, heads, H, C) * scale
        store_scores(
            score, entry, seen, scores + row * entries, maxima + row * blocks, N, BLOCK, entries
        )


@triton.jit
def _gather_index(
    pages, slots, keys, scales, count, page_bytes, page_rows, N: tl.constexpr, C: tl.constexpr
):
    place = tl.program_id(0) * N + tl.arange(0, N)
    inside = place < count
    slot = tl.load(slots + place, mask=inside, other=-1)
    values, scale = load_index(tl.maximum(slot, 0), pages, page_bytes, page_rows, N, C)
    values = tl.where((slot >= 0)[:, None], values.to(tl.float32), 0.0)
    at = place.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(keys + at, values.to(tl.float8e4nv), mask=inside[:, None])
    tl.store(scales + place, tl.where(slot >= 0, scale, 1.1754943508222875e-38), mask=inside)


def gather_index(pages_PB: Tensor, slots_S: Tensor, layout: IndexPages) -> tuple[Tensor, Tensor]:
    count, device = slots_S.shape[0], pages_PB.device
    keys = torch.empty((count, layout.dim), dtype=torch.float8_e4m3fn, device=device)
    scales = torch.empty(count, dtype=torch.float32, device=device)
    launch(
        _gather_index, (triton.cdiv(count, 64),),
        pages_PB, slots_S, keys, scales, count, pages_PB.stride(0), layout.page_rows,
        N=64, C=layout.dim, num_warps=4, num_stages=1,
    )  # fmt: skip
    return keys, scales


def _outputs(q_RHC: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    rows, device = q_RHC.shape[0], q_RHC.device
    scores = torch.empty((rows, entries), dtype=torch.float32, device=device)
    blocks = triton.cdiv(entries, SCORE_BLOCK)
    return scores, torch.empty((rows, blocks), dtype=torch.float32, device=device)


def indexer_logits(
    q_RHC: Tensor, weight_RH: Tensor, keys_EC: Tensor, scale_E: Tensor, visible_R: Tensor
) -> tuple[Tensor, Tensor]:
    rows, heads, channels = q_RHC.shape
    entries = keys_EC.shape[0]
    scores, maxima = _outputs(q_RHC, entries)
    launch(
        _indexer_logits, (triton.cdiv(entries, _KEYS), triton.cdiv(rows, _TOKENS)),
        q_RHC, weight_RH, keys_EC, scale_E, visible_R, scores, maxima,
        rows, heads, entries, maxima.shape[1],
        TOKENS=_TOKENS, N=_KEYS, H=max(16, triton.next_power_of_2(heads)), C=channels,
        BLOCK=SCORE_BLOCK, num_warps=4, num_stages=3,
    )  # fmt: skip
    return scores, maxima


def indexer_logits_paged(
    q_RHC: Tensor,
    weight_RH: Tensor,
    pages_PB: Tensor,
    tables_RT: Tensor,
    layout: IndexPages,
    visible_R: Tensor,
) -> tuple[Tensor, Tensor]:
    rows, heads, channels = q_RHC.shape
    entries = tables_RT.shape[1] * layout.page_rows
    scores, maxima = _outputs(q_RHC, entries)
    launch(
        _indexer_logits_paged, (triton.cdiv(entries, _KEYS), rows),
        q_RHC, weight_RH, pages_PB, tables_RT, visible_R, scores, maxima,
        heads, entries, maxima.shape[1], tables_RT.shape[1],
        pages_PB.stride(0), layout.page_rows,
        N=_KEYS, H=max(16, triton.next_power_of_2(heads)), C=channels,
        BLOCK=SCORE_BLOCK, num_warps=4, num_stages=1,
    )  # fmt: skip
    return scores, maxima


_LAYOUT = IndexPages(page_rows=64, dim=128)
_FP8 = torch.float8_e4m3fn


def _pages() -> Tensor:
    return meta(65536, _LAYOUT.page_bytes, dtype=torch.uint8)


CASES = (
    Case(
        "indexer_logits, 64 heads, 65,536 entries",
        lambda: indexer_logits(
            meta(2048, 64, 128, dtype=_FP8),
            meta(2048, 64, dtype=torch.float32),
            meta(65536, 128, dtype=_FP8),
            meta(65536, dtype=torch.float32),
            meta(2048, dtype=torch.int32),
        ),
        {"_indexer_logits": "wgmma"},
    ),
    Case(
        "indexer_logits_paged, 64 heads, 262,144 entries",
        lambda: indexer_logits_paged(
            meta(16, 64, 128, dtype=_FP8),
            meta(16, 64, dtype=torch.float32),
            _pages(),
            meta(16, 4096, dtype=torch.int32),
            _LAYOUT,
            meta(16, dtype=torch.int32),
        ),
        {"_indexer_logits_paged": "wgmma"},
    ),
    Case(
        "gather_index, 128",
        lambda: gather_index(_pages(), meta(65536, dtype=torch.int32), _LAYOUT),
    ),
)
