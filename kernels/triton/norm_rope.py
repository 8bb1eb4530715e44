"""RMSNorm and RoPE in one pass; meaning in kernels/reference/norm_rope.py.

A pair's partner is read a second time (it is in the first-level cache) instead of being shuffled
between lanes.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.pages import KvPages
from kernels.triton.launch import BATCH_SIZES, Case, launch, meta
from kernels.triton.numerals import rotated
from kernels.triton.quantize_kv import store_kv

_ROWS = 8


@triton.jit
def turn(x, x_other, angle_row, cos, sin, C: tl.constexpr, PAIRS: tl.constexpr, SIGN: tl.constexpr):
    """x [n, C] with its last 2 PAIRS channels rotated; x_other holds every channel's partner."""
    column = tl.arange(0, C)
    pair = (column - (C - 2 * PAIRS)) // 2
    inside = (column >= C - 2 * PAIRS)[None, :]
    at = angle_row.to(tl.int64)[:, None] * PAIRS + pair[None, :]
    c = tl.load(cos + at, mask=inside, other=1.0)
    s = tl.load(sin + at, mask=inside, other=0.0)
    return rotated(x, x_other, c, s, (column % 2 == 0)[None, :], SIGN)


@triton.jit
def normed(
    x, weight, row, rows, cos, sin, heads, eps,
    C: tl.constexpr, PAIRS: tl.constexpr, WEIGHTED: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, C)
    start = row.to(tl.int64)[:, None] * C
    inside = (row < rows)[:, None]
    value = tl.load(x + start + column[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x + start + (column ^ 1)[None, :], mask=inside, other=0.0).to(tl.float32)
    if NORMED:
        factor = 1.0 / tl.sqrt_rn(tl.sum(value * value, 1) / C + eps)
        value, other = value * factor[:, None], other * factor[:, None]
    if WEIGHTED:
        value = value * tl.load(weight + column).to(tl.float32)[None, :]
        other = other * tl.load(weight + (column ^ 1)).to(tl.float32)[None, :]
    angle_row = tl.minimum(row, rows - 1) // heads
    return turn(value, other, angle_row, cos, sin, C, PAIRS, 1)


@triton.jit(do_not_specialize=BATCH_SIZES)
def _norm_rope(
    x, weight, cos, sin, out, rows, heads, eps: tl.float32,
    ROWS: tl.constexpr, C: tl.constexpr, PAIRS: tl.constexpr, WEIGHTED: tl.constexpr,
    NORMED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = normed(x, weight, row, rows, cos, sin, heads, eps, C, PAIRS, WEIGHTED, NORMED)
    at = row.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=(row < rows)[:, None])


@triton.jit(do_not_specialize=BATCH_SIZES)
def _norm_rope_quantize(
    x, weight, cos, sin, slots, pages, rows, page_bytes, page_rows, eps: tl.float32,
    ROWS: tl.constexpr, C: tl.constexpr, NOPE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    value = normed(x, weight, row, rows, cos, sin, 1, eps, C, PAIRS, True, True)
    slot = tl.load(slots + row, mask=row < rows, other=-1)
    store_kv(value, slot, pages, page_bytes, page_rows, ROWS, C, NOPE)


@triton.jit
def _rms_norm(x, weight, out, width, inverse: tl.float32, eps: tl.float32, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    column = tl.arange(0, COLUMNS)
    inside = column < width
    value = tl.load(x + row + column, mask=inside, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt_rn(tl.sum(value * value, 0) * inverse + eps)
    value = value * factor * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row + column, value.to(out.dtype.element_ty), mask=inside)


def norm_rope(
    x_RHC: Tensor,
    weight_C: Tensor | None,
    cos_RP: Tensor,
    sin_RP: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    return _turned(x_RHC, weight_C, cos_RP, sin_RP, eps=eps, dtype=dtype, normed=True)


def rope(x_RHC: Tensor, cos_RP: Tensor, sin_RP: Tensor, *, dtype: torch.dtype) -> Tensor:
    return _turned(x_RHC, None, cos_RP, sin_RP, eps=0.0, dtype=dtype, normed=False)


def _turned(
    x_RHC: Tensor,
    weight_C: Tensor | None,
    cos_RP: Tensor,
    sin_RP: Tensor,
    *,
    eps: float,
    dtype: torch.dtype,
    normed: bool,
) -> Tensor:
    rows, heads, channels = x_RHC.shape
    out = torch.empty((rows, heads, channels), dtype=dtype, device=x_RHC.device)
    launch(
        _norm_rope, (triton.cdiv(rows * heads, _ROWS),),
        x_RHC.contiguous(), weight_C, cos_RP, sin_RP, out, rows * heads, heads, eps,
        ROWS=_ROWS, C=channels, PAIRS=cos_RP.shape[1], WEIGHTED=weight_C is not None,
        NORMED=normed, num_warps=8, num_stages=1,
    )  # fmt: skip
    return out


def rms_norm(x_RD: Tensor, weight_D: Tensor, *, eps: float, dtype: torch.dtype) -> Tensor:
    rows, width = x_RD.shape
    out = torch.empty((rows, width), dtype=dtype, device=x_RD.device)
    launch(
        _rms_norm, (rows,), x_RD.contiguous(), weight_D, out, width, 1.0 / width, eps,
        COLUMNS=triton.next_power_of_2(width), num_warps=4 if width <= 4096 else 8, num_stages=1,
    )  # fmt: skip
    return out


def norm_rope_quantize(
    x_RC: Tensor,
    weight_C: Tensor,
    cos_RP: Tensor,
    sin_RP: Tensor,
    slots_R: Tensor,
    pages_PB: Tensor,
    layout: KvPages,
    *,
    eps: float,
) -> None:
    rows = x_RC.shape[0]
    launch(
        _norm_rope_quantize, (triton.cdiv(rows, _ROWS),),
        x_RC.contiguous(), weight_C, cos_RP, sin_RP, slots_R, pages_PB,
        rows, pages_PB.stride(0), layout.page_rows, eps,
        ROWS=_ROWS, C=layout.dim, NOPE=layout.nope, PAIRS=cos_RP.shape[1],
        num_warps=8, num_stages=1,
    )  # fmt: skip


_LAYOUT = KvPages(page_rows=256, dim=512, nope=448)


def _angles(rows: int) -> Tensor:
    return meta(rows, 32, dtype=torch.float32)


CASES = (
    Case(
        "norm_rope, 64 heads",
        lambda: norm_rope(
            meta(4096, 64, 512), None, _angles(4096), _angles(4096), eps=1e-6, dtype=torch.bfloat16
        ),
    ),
    Case(
        "rope, 64 heads of 128",
        lambda: rope(meta(4096, 64, 128), _angles(4096), _angles(4096), dtype=torch.float32),
    ),
    *(
        Case(
            f"rms_norm, {width}",
            partial(
                rms_norm,
                meta(4096, width),
                meta(width, dtype=torch.float32),
                eps=1e-6,
                dtype=torch.bfloat16,
            ),
        )
        for width in (1024, 4096, 7168)
    ),
    Case(
        "norm_rope_quantize, 512",
        lambda: norm_rope_quantize(
            meta(4096, 512),
            meta(512, dtype=torch.float32),
            _angles(4096),
            _angles(4096),
            meta(4096, dtype=torch.int32),
            meta(16, _LAYOUT.page_bytes, dtype=torch.uint8),
            _LAYOUT,
            eps=1e-6,
        ),
    ),
)
