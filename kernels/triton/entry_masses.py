"""Attention probability of each key of a list; meaning in kernels/reference/entry_masses.py.

Only the rows whose evidence is wanted come here, so scores are computed twice rather than kept.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import Case, launch, meta
from kernels.triton.softmax import LOG2_E, denominator, fold
from kernels.triton.sparse_attention import tile_heads, whole_blocks

_BLOCK_K = 64


@triton.jit
def keys_of(kv, row, column, D: tl.constexpr):
    return tl.load(kv + (tl.maximum(row, 0).to(tl.int64) * D)[:, None] + column[None, :])


@triton.jit
def _entry_masses(
    q, kv, index, sink, out, heads, slots, scale: tl.float32, LOG2_E: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    head = group * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = head < heads
    column = tl.arange(0, D)
    at = (token * heads + head)[:, None] * D + column[None, :]
    query = tl.load(q + at, mask=inside[:, None], other=0.0)
    top = tl.full([BLOCK_H], -1e30, tl.float32)
    norm = tl.zeros([BLOCK_H], tl.float32)
    key = index + token * slots + tl.arange(0, BLOCK_K)
    for start in tl.range(0, slots, BLOCK_K):
        row = tl.load(key + start)
        score = tl.dot(query, tl.trans(keys_of(kv, row, column, D))) * scale
        score = tl.where((row >= 0)[None, :], score, float("-inf"))
        _weight, top, norm, _keep = fold(score, top, norm)
    total = denominator(norm, top, tl.load(sink + head, mask=inside, other=0.0) * LOG2_E)
    mine = out + (token * tl.num_programs(1) + group) * slots + tl.arange(0, BLOCK_K)
    for start in tl.range(0, slots, BLOCK_K):
        row = tl.load(key + start)
        score = tl.dot(query, tl.trans(keys_of(kv, row, column, D))) * scale
        mass = tl.exp2(score - top[:, None]) / total[:, None] / heads
        mass = tl.where(inside[:, None] & (row >= 0)[None, :], mass, 0.0)
        tl.store(mine + start, tl.sum(mass, 0))


def entry_masses(
    q_RHC: Tensor, kv_NC: Tensor, index_RK: Tensor, sink_H: Tensor, *, scale: float
) -> Tensor:
    rows, heads, channels = q_RHC.shape
    index = whole_blocks(index_RK)
    block_h = tile_heads(heads)
    groups = triton.cdiv(heads, block_h)
    shape = (rows, groups, index.shape[1])
    out = torch.empty(shape, dtype=torch.float32, device=q_RHC.device)
    launch(
        _entry_masses, (rows, groups),
        q_RHC, kv_NC, index, sink_H, out, heads, index.shape[1], scale * LOG2_E,
        LOG2_E=LOG2_E, BLOCK_H=block_h, BLOCK_K=_BLOCK_K, D=channels,
        num_warps=8 if block_h > 16 else 4, num_stages=2,
    )  # fmt: skip
    total = out[:, 0]
    for group in range(1, groups):
        total = total + out[:, group]
    return total[:, : index_RK.shape[1]]


def _case(name: str, heads: int, slots: int) -> Case:
    return Case(
        f"entry_masses, {name}",
        lambda: entry_masses(
            meta(16, heads, 512, dtype=torch.float16),
            meta(262144, 512, dtype=torch.float16),
            meta(16, slots, dtype=torch.int32),
            meta(heads, dtype=torch.float32),
            scale=512**-0.5,
        ),
    )


CASES = (_case("Flash", 64, 640), _case("Pro", 128, 1152))
