"""Attention of prompt tokens to their window and all compressed entries; meaning in
kernels/reference/sparse_attention.py (`dense_compressed_attention`).

Keys are shared and contiguous, so they come through tensor descriptors (TMA on Hopper), which hold
no pointers in registers. A program has 64 rows: 64 heads of one token, or as many neighbouring
tokens as fit if a rank has fewer heads. In the second form window tiles begin at multiples of 64
positions, so that a token's sums do not depend on its neighbours; a tile in which it has no key
changes nothing. The sink, the division and the rotation back are `combine`'s even for one chunk:
in this kernel they would spill.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.reference.sparse_attention import CHUNK
from kernels.triton.combine import Parts, combine
from kernels.triton.launch import Case, launch, meta
from kernels.triton.softmax import LOG2_E, fold

_BLOCK_M = 64
_BLOCK_K = 64


@triton.jit
def _dense_attention(
    q, kv, total_out, top_out, norm_out,
    tokens, heads, position, newest, entries_at, window, ratio, chunk, chunks, scale: tl.float32,
    HEADS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """HEADS is the power of two that holds a token's heads in this tile."""
    PACKED: tl.constexpr = BLOCK_M // HEADS
    groups = tl.cdiv(heads, HEADS)
    first = tl.program_id(0) // groups * PACKED
    row = tl.arange(0, BLOCK_M)
    head = tl.program_id(0) % groups * HEADS + row % HEADS
    column = tl.arange(0, D)
    # Rows of a token follow one another; those beyond the last token are not loaded or stored.
    if PACKED > 1:
        token = first + row // HEADS
        inside = (token < tokens) & (head < heads)
        here = position + token
        line = row // HEADS * heads + head
    else:
        inside = head < heads
        here = tl.full([1], 0, tl.int32) + position + first
        line = head
    start_line = first.to(tl.int64) * heads
    at = line[:, None] * D + column[None, :]
    query = tl.load(q + start_line * D + at, mask=inside[:, None], other=0.0)
    total = tl.zeros([BLOCK_M, D], tl.float32)
    top = tl.full([BLOCK_M], -1e30, tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    last = position + tl.minimum(first + PACKED, tokens) - 1
    key = tl.arange(0, BLOCK_K)
    oldest = tl.maximum(here - window + 1, 0)
    newest_entry = (here + 1) // ratio - 1
    start = position + first - window + 1
    if PACKED > 1:
        # Positions may be negative here; the shift keeps the division from rounding up.
        start = (start + 2 * window) // BLOCK_K * BLOCK_K - 2 * window
    lead = tl.cdiv(window, BLOCK_K) * BLOCK_K
    own = tl.where(tl.program_id(1) == 0, tl.cdiv(last + 1 - start, BLOCK_K), 0)
    begin = tl.maximum(tl.program_id(1) * chunk - lead, 0)
    end = tl.minimum((tl.program_id(1) + 1) * chunk - lead, (last + 1) // ratio)
    # One loop over both kinds of tiles: a second one would cost registers.
    for tile in tl.range(0, own + tl.cdiv(tl.maximum(end - begin, 0), BLOCK_K)):
        in_window = tile < own
        place = tl.where(in_window, start + tile * BLOCK_K, begin + (tile - own) * BLOCK_K)
        keys = kv.load([place + tl.where(in_window, entries_at - 1 - newest, entries_at), 0])
        least = tl.where(in_window, oldest, 0)
        most = tl.where(in_window, here, newest_entry)
        seen = ((place + key)[None, :] >= least[:, None]) & (
            (place + key)[None, :] <= most[:, None]
        )
        score = tl.dot(query, tl.trans(keys)) * scale
        score = tl.where(seen, score, float("-inf"))
        weight, top, norm, keep = fold(score, top, norm)
        total = tl.dot(weight.to(keys.dtype), keys, total * keep[:, None])
    part = (start_line + line) * chunks + tl.program_id(1)
    tl.store(top_out + part, top, mask=inside)
    tl.store(norm_out + part, norm, mask=inside)
    wanted = (inside & (norm > 0.0))[:, None]
    tl.store(total_out + part[:, None] * D + column[None, :], total, mask=wanted)


def dense_compressed_attention(
    q_RHC: Tensor,
    kv_NC: Tensor,
    sink_H: Tensor,
    cos_RP: Tensor,
    sin_RP: Tensor,
    *,
    position: int,
    entries_at: int,
    window: int,
    ratio: int,
    scale: float,
    chunk: int = CHUNK,
) -> Tensor:
    rows, heads, channels = q_RHC.shape
    lead = triton.cdiv(window, _BLOCK_K) * _BLOCK_K
    if chunk % _BLOCK_K or chunk < lead:
        raise ValueError(
            f"chunk is {chunk}; it must be a multiple of {_BLOCK_K}, not less than the window"
        )
    entries = (position + rows) // ratio
    chunks = triton.cdiv(lead + entries, chunk)
    heads_tile = min(_BLOCK_M, max(8, triton.next_power_of_2(heads)))
    groups = triton.cdiv(heads, heads_tile) * triton.cdiv(rows, _BLOCK_M // heads_tile)
    parts = Parts.empty(q_RHC, chunks)
    launch(
        _dense_attention, (groups, chunks),
        q_RHC, _keys(kv_NC), parts.total, parts.top, parts.norm,
        rows, heads, position, position + rows - 1, entries_at, window, ratio,
        chunk, chunks, scale * LOG2_E,
        HEADS=heads_tile, BLOCK_M=_BLOCK_M, BLOCK_K=_BLOCK_K, D=channels,
        num_warps=8, num_stages=2,
    )  # fmt: skip
    return combine(parts, sink_H, cos_RP, sin_RP, dtype=q_RHC.dtype)


def _keys(rows_NC: Tensor) -> Any:
    return TensorDescriptor.from_tensor(rows_NC, [_BLOCK_K, rows_NC.shape[1]])


def _case(name: str, heads: int, position: int) -> Case:
    fp32 = torch.float32
    rows = 4096
    return Case(
        f"dense_compressed_attention, {name}",
        lambda: dense_compressed_attention(
            meta(rows, heads, 512, dtype=torch.float16),
            meta(rows + 127 + 8192, 512, dtype=torch.float16),
            meta(heads, dtype=fp32),
            meta(rows, 32, dtype=fp32),
            meta(rows, 32, dtype=fp32),
            position=position,
            entries_at=rows + 127,
            window=128,
            ratio=128,
            scale=512**-0.5,
        ),
        {"_dense_attention": "wgmma"},
    )


CASES = (
    _case("Flash", 64, 65_536),
    _case("Flash at a million", 64, 1_044_480),
    _case("Pro at a million", 128, 1_044_480),
    _case("16 heads of a rank at a million", 16, 1_044_480),
    _case("8 heads of a rank", 8, 65_536),
)
