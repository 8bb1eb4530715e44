"""Sparse attention of prompt tokens; meaning in kernels/reference/sparse_attention.py.

A program takes 64 heads of one token: two warpgroups share its [64, 512] accumulator, half of a
multiprocessor's registers. Keys are gathered 64 at a time by pipelined copies; a key row is loaded
once and is both operands. Absent keys read row 0 and are hidden in the score.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import Case, launch, meta
from kernels.triton.softmax import LOG2_E, denominator, fold, rotate_back

_BLOCK_K = 64


@triton.jit
def _sparse_attention(
    q, kv, index, sink, cos, sin, out, heads, slots, scale: tl.float32, LOG2_E: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    groups = tl.cdiv(heads, BLOCK_H)
    token = tl.program_id(0) // groups
    head = tl.program_id(0) % groups * BLOCK_H + tl.arange(0, BLOCK_H)
    column = tl.arange(0, D)
    at = (token.to(tl.int64) * heads + head)[:, None] * D + column[None, :]
    inside = (head < heads)[:, None]
    query = tl.load(q + at, mask=inside, other=0.0)
    total = tl.zeros([BLOCK_H, D], tl.float32)
    top = tl.full([BLOCK_H], -1e30, tl.float32)
    norm = tl.zeros([BLOCK_H], tl.float32)
    key = index + token.to(tl.int64) * slots + tl.arange(0, BLOCK_K)
    for start in tl.range(0, slots, BLOCK_K):
        row = tl.load(key + start)
        place = tl.maximum(row, 0).to(tl.int64) * D
        rows = tl.load(kv + place[:, None] + column[None, :], eviction_policy="evict_last")
        score = tl.dot(query, tl.trans(rows)) * scale
        score = tl.where((row >= 0)[None, :], score, float("-inf"))
        weight, top, norm, keep = fold(score, top, norm)
        total = tl.dot(weight.to(rows.dtype), rows, total * keep[:, None])
    sink_log2 = tl.load(sink + head, mask=head < heads, other=0.0) * LOG2_E
    total = total / denominator(norm, top, sink_log2)[:, None]
    angle = tl.full([1], 0, tl.int32) + token
    total = rotate_back(total, angle, cos, sin, BLOCK_H, D, 0, D, PAIRS)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def sparse_attention(
    q_RHC: Tensor,
    kv_NC: Tensor,
    index_RK: Tensor,
    sink_H: Tensor,
    cos_RP: Tensor,
    sin_RP: Tensor,
    *,
    scale: float,
) -> Tensor:
    rows, heads, channels = q_RHC.shape
    out = torch.empty_like(q_RHC)
    index = whole_blocks(index_RK)
    block_h = tile_heads(heads)
    launch(
        _sparse_attention, (triton.cdiv(heads, block_h) * rows,),
        q_RHC, kv_NC, index, sink_H, cos_RP, sin_RP, out,
        heads, index.shape[1], scale * LOG2_E,
        LOG2_E=LOG2_E, BLOCK_H=block_h, D=channels, PAIRS=cos_RP.shape[1], **_TILES[block_h],
    )  # fmt: skip
    return out


def whole_blocks(index_RK: Tensor) -> Tensor:
    """The lists, 64 slots or a multiple wide: a mask in the loop would cost registers."""
    missing = -index_RK.shape[1] % _BLOCK_K
    return F.pad(index_RK, (0, missing), value=-1) if missing else index_RK


def tile_heads(heads: int) -> int:
    """Rows of a tile: 64 fills a Hopper tensor-core instruction, 16 is the least of the older."""
    return min(64, max(16, int(triton.next_power_of_2(heads))))


_TILES: dict[int, dict[str, Any]] = {
    64: {"BLOCK_K": _BLOCK_K, "num_warps": 8, "num_stages": 2},
    32: {"BLOCK_K": _BLOCK_K, "num_warps": 8, "num_stages": 2},
    16: {"BLOCK_K": _BLOCK_K, "num_warps": 4, "num_stages": 2},
}


def _case(name: str, heads: int, slots: int, units: str) -> Case:
    fp32 = torch.float32
    return Case(
        f"sparse_attention, {name}",
        lambda: sparse_attention(
            meta(4096, heads, 512, dtype=torch.float16),
            meta(262144, 512, dtype=torch.float16),
            meta(4096, slots, dtype=torch.int32),
            meta(heads, dtype=fp32),
            meta(4096, 32, dtype=fp32),
            meta(4096, 32, dtype=fp32),
            scale=512**-0.5,
        ),
        {"_sparse_attention": units},
    )


CASES = (
    _case("Flash", 64, 640, "wgmma"),
    _case("Pro", 128, 1152, "wgmma"),
    _case("32 heads of a rank", 32, 1152, "mma"),
    _case("16 heads of a rank", 16, 1152, "mma"),
    _case("8 heads of a rank", 8, 640, "mma"),
)
