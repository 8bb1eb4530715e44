"""Attention rows into and out of the paged FP8 cache; meaning in kernels/reference/quantize_kv.py.

Both directions move bytes and nothing else: a warp takes a row, a program takes eight.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.pages import KvPages
from kernels.triton.launch import Case, launch, meta
from kernels.triton.numerals import fp8_scale, power_of_two

_ROWS = 8


@triton.jit
def store_kv(
    x, slot, pages, page_bytes, page_rows,
    ROWS: tl.constexpr, D: tl.constexpr, NOPE: tl.constexpr,
):  # fmt: skip
    """Round x [ROWS, D] and write it at slot [ROWS]; slot -1 writes nothing."""
    DATA: tl.constexpr = 2 * D - NOPE
    column = tl.arange(0, D)
    wanted = slot >= 0
    page = pages + (slot // page_rows).to(tl.int64) * page_bytes
    row = slot % page_rows
    # The last group may be cut short by the bfloat16 channels, which have no part in its scale.
    exponent, scaled = fp8_scale(tl.where((column < NOPE)[None, :], x, 0.0), ROWS, D, 64)
    data = page + row.to(tl.int64) * DATA
    nope = wanted[:, None] & (column < NOPE)[None, :]
    code = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(data[:, None] + column[None, :], code, mask=nope)
    rope = (data + NOPE).to(tl.pointer_type(tl.bfloat16))
    rest = wanted[:, None] & (column >= NOPE)[None, :]
    tl.store(rope[:, None] + (column - NOPE)[None, :], x.to(tl.bfloat16), mask=rest)
    scales = page + page_rows * DATA + row * 8
    group = tl.arange(0, D // 64)
    byte = tl.where((group < (NOPE + 63) // 64)[None, :], exponent + 127, 0).to(tl.uint8)
    tl.store(scales[:, None] + group[None, :], byte, mask=wanted[:, None] & (group < 8)[None, :])
    if D < 512:
        pad = tl.arange(0, 8)
        zero = tl.zeros([ROWS, 8], tl.uint8)
        unused = wanted[:, None] & (pad >= D // 64)[None, :]
        tl.store(scales[:, None] + pad[None, :], zero, mask=unused)


@triton.jit
def load_kv(
    slot, pages, page_bytes, page_rows, DTYPE: tl.constexpr, D: tl.constexpr, NOPE: tl.constexpr
):
    """[len(slot), D] values in DTYPE; slot must be valid (clamp it and mask the result)."""
    DATA: tl.constexpr = 2 * D - NOPE
    column = tl.arange(0, D)
    page = pages + (slot // page_rows).to(tl.int64) * page_bytes
    row = slot % page_rows
    data = page + row.to(tl.int64) * DATA
    code = tl.load(data[:, None] + column[None, :], mask=(column < NOPE)[None, :], other=0)
    # The eight scales of a row are one load; byte gathers would be 64 times as many.
    scales = tl.load((page + page_rows * DATA + row * 8).to(tl.pointer_type(tl.int64)))
    shift = tl.minimum(column // 64, 7) * 8
    byte = ((scales[:, None] >> shift[None, :]) & 255).to(tl.int32)
    value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * power_of_two(byte - 127)
    pointer = (data + NOPE).to(tl.pointer_type(tl.bfloat16))
    rest = (column >= NOPE)[None, :]
    rope = tl.load(pointer[:, None] + (column - NOPE)[None, :], mask=rest, other=0.0)
    return tl.where(rest, rope.to(tl.float32), value).to(DTYPE)


@triton.jit
def _quantize_kv(
    x, slots, pages, rows, page_bytes, page_rows,
    ROWS: tl.constexpr, D: tl.constexpr, NOPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    slot = tl.load(slots + row, mask=row < rows, other=-1)
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    value = tl.load(x + at, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
    store_kv(value, slot, pages, page_bytes, page_rows, ROWS, D, NOPE)


@triton.jit
def _dequantize_gather(
    pages, slots, out, rows, page_bytes, page_rows,
    ROWS: tl.constexpr, D: tl.constexpr, NOPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, D)
    slot = tl.load(slots + row, mask=row < rows, other=-1)
    value = load_kv(tl.maximum(slot, 0), pages, page_bytes, page_rows, tl.float32, D, NOPE)
    value = tl.where((slot >= 0)[:, None], value, 0.0)
    at = row.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=(row < rows)[:, None])


def quantize_kv(x_RD: Tensor, slots_R: Tensor, pages_PB: Tensor, layout: KvPages) -> None:
    rows = x_RD.shape[0]
    launch(
        _quantize_kv,
        (triton.cdiv(rows, _ROWS),),
        x_RD.contiguous(),
        slots_R,
        pages_PB,
        rows,
        pages_PB.stride(0),
        layout.page_rows,
        ROWS=_ROWS,
        D=layout.dim,
        NOPE=layout.nope,
        num_warps=8,
        num_stages=1,
    )


def dequantize_gather(
    pages_PB: Tensor,
    slots_R: Tensor,
    layout: KvPages,
    *,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    rows = slots_R.shape[0]
    if out is None:
        out = torch.empty((rows, layout.dim), dtype=dtype, device=pages_PB.device)
    launch(
        _dequantize_gather,
        (triton.cdiv(rows, _ROWS),),
        pages_PB,
        slots_R,
        out,
        rows,
        pages_PB.stride(0),
        layout.page_rows,
        ROWS=_ROWS,
        D=layout.dim,
        NOPE=layout.nope,
        num_warps=8,
        num_stages=1,
    )
    return out


_LAYOUT = KvPages(page_rows=64, dim=512, nope=448)
_PAGES = (1024, _LAYOUT.page_bytes)

CASES = (
    Case(
        "quantize_kv, 512",
        lambda: quantize_kv(
            meta(4096, 512),
            meta(4096, dtype=torch.int32),
            meta(*_PAGES, dtype=torch.uint8),
            _LAYOUT,
        ),
    ),
    Case(
        "dequantize_gather, 512",
        lambda: dequantize_gather(
            meta(*_PAGES, dtype=torch.uint8),
            meta(65536, dtype=torch.int32),
            _LAYOUT,
            dtype=torch.bfloat16,
        ),
    ),
)
