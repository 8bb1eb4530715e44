"""Dense products with a fixed tile; meaning in kernels/reference/linear.py.

Weights stand on the rows of the product and tokens on its columns, as in the experts. A tile walks
all input channels by itself, 64 at a time and in order: no split of the sum, whatever the batch.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.linear import LINEAR_TILE
from kernels.triton.launch import BATCH_SIZES, Case, launch, meta

_STEP = 64
_NEAR = 8
"""Token tiles that walk a weight together, so that it is read from the second-level cache."""


@triton.jit(do_not_specialize=BATCH_SIZES)
def _linear(
    x, weight, out, rows, outputs, inputs, groups, row_tiles,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    span = NEAR * tl.cdiv(outputs, OUTPUTS)
    first_tile = tl.program_id(0) // span * NEAR
    near = tl.minimum(row_tiles - first_tile, NEAR)
    within = tl.program_id(0) % span
    row = (first_tile + within % near) * ROWS + tl.arange(0, ROWS)
    output = within // near * OUTPUTS + tl.arange(0, OUTPUTS)
    x_start = x + (row.to(tl.int64) * groups + group)[:, None] * inputs
    w_start = weight + (group.to(tl.int64) * outputs + output)[:, None] * inputs
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for k in tl.range(0, inputs, STEP):
        column = k + tl.arange(0, STEP)
        known = (column < inputs)[None, :]
        w = tl.load(w_start + column[None, :], mask=(output < outputs)[:, None] & known, other=0.0)
        x_RS = tl.load(x_start + column[None, :], mask=(row < rows)[:, None] & known, other=0.0)
        total = tl.dot(w, tl.trans(x_RS), total)
    at = (row.to(tl.int64) * groups + group)[:, None] * outputs + output[None, :]
    inside = (row < rows)[:, None] & (output < outputs)[None, :]
    tl.store(out + at, tl.trans(total).to(out.dtype.element_ty), mask=inside)


def linear(
    x_RGK: Tensor, weight_GNK: Tensor, *, dtype: torch.dtype, tile: int = LINEAR_TILE
) -> Tensor:
    rows, groups, inputs = x_RGK.shape
    outputs = weight_GNK.shape[1]
    out = torch.empty((rows, groups, outputs), dtype=dtype, device=x_RGK.device)
    wide = 64 if tile < 64 else 128
    row_tiles = triton.cdiv(rows, tile)
    launch(
        _linear, (row_tiles * triton.cdiv(outputs, wide), groups),
        x_RGK.contiguous(), weight_GNK, out, rows, outputs, inputs, groups, row_tiles,
        ROWS=tile, OUTPUTS=wide, STEP=_STEP, NEAR=_NEAR,
        num_warps=8 if tile >= 64 else 4, num_stages=4 if tile <= 64 else 3,
    )  # fmt: skip
    return out


def _case(name: str, rows: int, groups: int, outputs: int, inputs: int, tile: int) -> Case:
    return Case(
        f"linear, {name}, tile {tile}",
        partial(
            linear,
            meta(rows, groups, inputs),
            meta(groups, outputs, inputs),
            dtype=torch.bfloat16,
            tile=tile,
        ),
        {"_linear": "wgmma"},
    )


CASES = (
    _case("Flash queries", 4096, 1, 32768, 1024, 64),
    _case("Flash queries", 4096, 1, 32768, 1024, 128),
    _case("Flash queries", 16, 1, 32768, 1024, 16),
    _case("Flash output groups", 4096, 8, 1024, 4096, 64),
)
