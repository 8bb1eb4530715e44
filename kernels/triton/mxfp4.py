"""MXFP4 encode and decode, and the indexer's rounding; meaning in kernels/reference/mxfp4.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.pages import IndexPages
from kernels.triton.hadamard import load_signs
from kernels.triton.launch import Case, launch, meta
from kernels.triton.numerals import fp4_codes, fp4_value, power_of_two, rotate_signs

_ROWS = 16
_COLUMNS = 128
_ROTATED_ROWS = 64


@triton.jit
def _mxfp4_encode(x, codes, scales, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < channels)[None, :]
    start = row.to(tl.int64)[:, None]
    value = tl.load(x + start * channels + column[None, :], mask=inside, other=0.0)
    code, exponent = fp4_codes(value.to(tl.float32), ROWS, COLUMNS)
    low, high = tl.split(tl.reshape(code, (ROWS, COLUMNS // 2, 2)))
    at = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    inside = (row < rows)[:, None] & (at < channels // 2)[None, :]
    byte = (low | (high << 4)).to(tl.uint8)
    tl.store(codes + start * (channels // 2) + at[None, :], byte, mask=inside)
    at = tl.program_id(1) * (COLUMNS // 32) + tl.arange(0, COLUMNS // 32)
    inside = (row < rows)[:, None] & (at < channels // 32)[None, :]
    byte = (exponent + 127).to(tl.uint8)
    tl.store(scales + start * (channels // 32) + at[None, :], byte, mask=inside)


@triton.jit
def _mxfp4_decode(codes, scales, out, rows, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    pair = tl.program_id(1) * (COLUMNS // 2) + tl.arange(0, COLUMNS // 2)
    inside = (row < rows)[:, None] & (pair < channels // 2)[None, :]
    start = row.to(tl.int64)[:, None]
    byte = tl.load(codes + start * (channels // 2) + pair[None, :], mask=inside, other=0)
    scale = tl.load(scales + start * (channels // 32) + (pair // 16)[None, :], mask=inside, other=0)
    factor = power_of_two(scale.to(tl.int32) - 127)
    byte = byte.to(tl.int32)
    low, high = fp4_value(byte & 15) * factor, fp4_value(byte >> 4) * factor
    value = tl.reshape(tl.join(low, high), (ROWS, COLUMNS))
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < channels)[None, :]
    at = start * channels + column[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _quantize_index(
    x, matrix, slots, pages, rows, page_bytes, page_rows, ROWS: tl.constexpr, C: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]
    value = tl.load(x + at, mask=(row < rows)[:, None], other=0.0).to(tl.float32)
    code, exponent = fp4_codes(rotate_signs(value, load_signs(matrix, C), C), ROWS, C)
    slot = tl.load(slots + row, mask=row < rows, other=-1)
    wanted = (slot >= 0)[:, None]
    page = pages + (slot // page_rows).to(tl.int64) * page_bytes
    place = slot % page_rows
    low, high = tl.split(tl.reshape(code, (ROWS, C // 2, 2)))
    at = (page + place * (C // 2))[:, None] + tl.arange(0, C // 2)[None, :]
    tl.store(at, (low | (high << 4)).to(tl.uint8), mask=wanted)
    at = (page + page_rows * (C // 2) + place * (C // 32))[:, None] + tl.arange(0, C // 32)[None, :]
    tl.store(at, (exponent + 127).to(tl.uint8), mask=wanted)


@triton.jit
def _round_index(x, matrix, out, scales, rows, ROWS: tl.constexpr, C: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = row.to(tl.int64)[:, None] * C + tl.arange(0, C)[None, :]
    inside = (row < rows)[:, None]
    value = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    code, exponent = fp4_codes(rotate_signs(value, load_signs(matrix, C), C), ROWS, C)
    # The largest block's codes reach 6 * 64 = 384; -120 keeps the scale a normal number.
    top = tl.maximum(tl.max(exponent, 1), -120) - 6
    values = tl.reshape(fp4_value(code), (ROWS, C // 32, 32))
    shift = tl.maximum(exponent - top[:, None], -126)
    values = tl.reshape(values * power_of_two(shift)[:, :, None], (ROWS, C))
    tl.store(out + at, values.to(tl.float8e4nv), mask=inside)
    tl.store(scales + row, power_of_two(top), mask=row < rows)


def mxfp4_encode(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    rows, channels = x_RC.shape
    codes = torch.empty((rows, channels // 2), dtype=torch.uint8, device=x_RC.device)
    scales = torch.empty((rows, channels // 32), dtype=torch.uint8, device=x_RC.device)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(channels, _COLUMNS))
    x = x_RC.contiguous()
    launch(
        _mxfp4_encode, grid, x, codes, scales, rows, channels,
        ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return codes, scales


def mxfp4_decode(codes_RX: Tensor, scales_RX: Tensor, *, dtype: torch.dtype) -> Tensor:
    rows, channels = codes_RX.shape[0], 2 * codes_RX.shape[1]
    out = torch.empty((rows, channels), dtype=dtype, device=codes_RX.device)
    grid = (triton.cdiv(rows, _ROWS), triton.cdiv(channels, _COLUMNS))
    launch(
        _mxfp4_decode, grid, codes_RX, scales_RX, out, rows, channels,
        ROWS=_ROWS, COLUMNS=_COLUMNS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def quantize_index(
    x_RC: Tensor, matrix_CC: Tensor, slots_R: Tensor, pages_PB: Tensor, layout: IndexPages
) -> None:
    rows = x_RC.shape[0]
    launch(
        _quantize_index, (triton.cdiv(rows, _ROTATED_ROWS),),
        x_RC.contiguous(), matrix_CC, slots_R, pages_PB,
        rows, pages_PB.stride(0), layout.page_rows,
        ROWS=_ROTATED_ROWS, C=layout.dim, num_warps=4, num_stages=1,
    )  # fmt: skip


def round_index(x_RC: Tensor, matrix_CC: Tensor) -> tuple[Tensor, Tensor]:
    rows, channels = x_RC.shape
    out = torch.empty((rows, channels), dtype=torch.float8_e4m3fn, device=x_RC.device)
    scales = torch.empty(rows, dtype=torch.float32, device=x_RC.device)
    launch(
        _round_index, (triton.cdiv(rows, _ROTATED_ROWS),),
        x_RC.contiguous(), matrix_CC, out, scales, rows,
        ROWS=_ROTATED_ROWS, C=channels, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out, scales


_LAYOUT = IndexPages(page_rows=64, dim=128)


def _bytes(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.uint8)


CASES = (
    Case("mxfp4_encode, 4096", lambda: mxfp4_encode(meta(4096, 4096))),
    Case(
        "mxfp4_decode, 4096",
        lambda: mxfp4_decode(_bytes(4096, 2048), _bytes(4096, 128), dtype=torch.bfloat16),
    ),
    Case(
        "quantize_index, 128",
        lambda: quantize_index(
            meta(4096, 128),
            meta(128, 128, dtype=torch.float32),
            meta(4096, dtype=torch.int32),
            _bytes(1024, _LAYOUT.page_bytes),
            _LAYOUT,
        ),
        {"_quantize_index": "wgmma"},
    ),
    Case(
        "round_index, 128",
        lambda: round_index(meta(262144, 128), meta(128, 128, dtype=torch.float32)),
        {"_round_index": "wgmma"},
    ),
)
