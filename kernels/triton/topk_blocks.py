"""Exact top-k without a sort; meaning in kernels/reference/topk_blocks.py.

A program takes a row. Scores become uint32 keys of the same order; four passes of 256-bin
histograms find the key of rank k, one more writes what lies above it and the first of those that
equal it, in index order. Long rows are done in two steps: the k best blocks of 32 by their maxima,
then the k best entries of those. Nothing depends on the order in which lanes run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.indexer_logits import SCORE_BLOCK
from kernels.triton.launch import Case, launch, meta

_SPAN = 4096


@triton.jit
def ordered(score, valid):
    """uint32 keys: 0 for what may not be selected, 1 for nan, then every number in its order."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, ~bits, bits ^ -2147483648)
    bits = tl.where(score == score, bits, 1)
    return tl.where(valid, bits, 0).to(tl.uint32, bitcast=True)


@triton.jit
def candidates(
    scores, chosen, row, place, width, count, visible, k, BLOCK: tl.constexpr, GATHER: tl.constexpr
):
    """Index and key of the candidates at `place` of a row of `width` scores."""
    if GATHER:
        block = tl.load(chosen + row * k + place // BLOCK, mask=place < count, other=-1)
        index = tl.maximum(block, 0) * BLOCK + place % BLOCK
        valid = (block >= 0) & (index < visible)
    else:
        index = place
        valid = place < count
    score = tl.load(scores + row * width + index, mask=valid, other=0.0)
    return index, ordered(score, valid)


@triton.jit
def _topk(
    scores, chosen, visible, out, width, k,
    UNIT: tl.constexpr, BLOCK: tl.constexpr, GATHER: tl.constexpr, SPAN: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Best k of a row's scores, of which cdiv(visible, UNIT) count; GATHER: of chosen blocks."""
    row = tl.program_id(0).to(tl.int64)
    seen = tl.load(visible + row)
    count = tl.cdiv(seen, UNIT)
    slot = tl.arange(0, SLOTS)
    if count <= k:
        tl.store(out + row * k + slot, tl.where(slot < count, slot, -1), mask=slot < k)
    else:
        if GATHER:
            count = tl.minimum(tl.cdiv(seen, BLOCK), k) * BLOCK
        digit = tl.arange(0, 256)
        wanted = k
        prefix = tl.full([1], 0, tl.uint32)
        for step in tl.static_range(4):
            bins = tl.zeros([256], tl.int32)
            for start in tl.range(0, count, SPAN):
                place = start + tl.arange(0, SPAN)
                _index, key = candidates(
                    scores, chosen, row, place, width, count, seen, k, BLOCK, GATHER
                )
                alive = place < count
                if step > 0:
                    alive = alive & ((key >> (32 - 8 * step)) == prefix)
                bins += tl.histogram(((key >> (24 - 8 * step)) & 255).to(tl.int32), 256, mask=alive)
            above = tl.sum(bins, 0) - tl.cumsum(bins, 0)
            # The bin that holds rank `wanted`: fewer lie above it, enough within it.
            here = (above < wanted) & (above + bins >= wanted)
            found = tl.max(tl.where(here, digit, 0), 0)
            wanted -= tl.sum(tl.where(digit == found, above, 0), 0)
            prefix = (prefix << 8) | found.to(tl.uint32)
        larger = 0
        equal = 0
        for start in tl.range(0, count, SPAN):
            place = start + tl.arange(0, SPAN)
            index, key = candidates(
                scores, chosen, row, place, width, count, seen, k, BLOCK, GATHER
            )
            more = (key > prefix).to(tl.int32)
            same = ((key == prefix) & (place < count)).to(tl.int32)
            both = (more << 16) | same
            before = tl.cumsum(both, 0) - both
            rank = equal + (before & 65535)
            take = (more > 0) | ((same > 0) & (rank < wanted))
            at = larger + (before >> 16) + tl.minimum(rank, wanted)
            tl.store(out + row * k + at, index, mask=take)
            larger += tl.sum(more, 0)
            equal += tl.sum(same, 0)


def topk_blocks(scores_RE: Tensor, maxima_RN: Tensor, visible_R: Tensor, k: int) -> Tensor:
    if scores_RE.shape[1] < 2 * SCORE_BLOCK * k:
        return _best(scores_RE, None, visible_R, k, unit=1)
    # Fewer than half of the scores lie in the k best blocks: look for those first.
    blocks = _best(maxima_RN, None, visible_R, k, unit=SCORE_BLOCK)
    return _best(scores_RE, blocks, visible_R, k, unit=1)


def _best(
    scores_RE: Tensor, chosen_RK: Tensor | None, visible_R: Tensor, k: int, *, unit: int
) -> Tensor:
    rows, width = scores_RE.shape
    out = torch.empty((rows, k), dtype=torch.int32, device=scores_RE.device)
    length = width if chosen_RK is None else k * SCORE_BLOCK
    launch(
        _topk, (rows,),
        scores_RE, chosen_RK, visible_R, out, width, k,
        UNIT=unit, BLOCK=SCORE_BLOCK, GATHER=chosen_RK is not None,
        SPAN=min(_SPAN, max(256, triton.next_power_of_2(length))),
        SLOTS=triton.next_power_of_2(k), num_warps=16, num_stages=2,
    )  # fmt: skip
    return out


def _case(rows: int, entries: int, k: int) -> Case:
    return Case(
        f"topk_blocks, {k} of {entries:,}",
        lambda: topk_blocks(
            meta(rows, entries, dtype=torch.float32),
            meta(rows, entries // SCORE_BLOCK, dtype=torch.float32),
            meta(rows, dtype=torch.int32),
            k,
        ),
    )


CASES = (_case(2048, 16_384, 512), _case(16, 65_536, 512), _case(8, 262_144, 1024))
