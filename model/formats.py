"""Stored numbers of weights: e4m3, e2m1 and e8m0 codes to values (deepseek-v4.md 5.1).

Values are exact in bfloat16 and in float32. An e4m3 number has 4 significant bits and an e2m1
number 2, bfloat16 has 8; a scale is a power of two, so it moves only the exponent, and bfloat16 has
float32's exponents. Only a scale at the very ends of e8m0 could push a value over the edge or below
the smallest step; the decoders refuse that.

Shape suffixes: N outputs, K inputs, B bytes of a row, G scale columns.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from model.tensors import FP4_GROUP, FP8_TILE

Bytes = npt.NDArray[np.uint8]

NAN_SCALE = 255
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Scales (biased) for which every code is a normal or exactly subnormal number of bfloat16:
# 448 * 2^118 < 2^127 and 2^-9 * 2^-124 = 2^-133, the smallest step.
_SAFE_SCALES = (3, 245)


class BadValueError(ValueError):
    """Stored numbers that no model has. The message is a phrase behind the tensor's name."""


def fp8_table(dtype: torch.dtype) -> Tensor:
    """[256] value of every e4m3 code."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)


def fp4_table(dtype: torch.dtype) -> Tensor:
    """[256, 2] both values of every byte: the low nibble is the even input."""
    signed = torch.tensor((*FP4_VALUES, *(-value for value in FP4_VALUES)), dtype=dtype)
    byte = torch.arange(256)
    return torch.stack((signed[byte & 15], signed[byte >> 4]), 1)


def scale_values(codes: Bytes, dtype: torch.dtype) -> Tensor:
    """2^(code - 127) of e8m0 codes. Raises `BadValueError` for the NaN code."""
    if codes.size and int(codes.max()) == NAN_SCALE:
        raise BadValueError("has a scale that is NaN")
    exponent = torch.from_numpy(codes.astype(np.int32))
    # Code 0 is 2^-127, a subnormal number: its bit pattern is not an exponent field.
    bits = torch.where(exponent == 0, torch.tensor(1 << 22, dtype=torch.int32), exponent << 23)
    return bits.view(torch.float32).to(dtype)


class Fp8Decoder:
    """e4m3 codes with one scale per 128 x 128, of one weight, block by block of rows."""

    def __init__(
        self, scales_NG: Bytes, dtype: torch.dtype, *, row: int = 0, column: int = 0
    ) -> None:
        """`scales_NG` begins at the tile that holds output `row` and input `column`."""
        self._scales, self._safe = scale_values(scales_NG, dtype), _safe(scales_NG)
        self._row, self._column = row % FP8_TILE, column % FP8_TILE
        self._table = _lookup(fp8_table(dtype))
        self._dtype = dtype

    def __call__(self, codes_NK: Bytes, first: int) -> Tensor:
        """Values [N, K] of rows `first` .. (counted from `row`)."""
        values = torch.from_numpy(self._table[codes_NK]).view(self._dtype)
        rows = (torch.arange(first, first + len(codes_NK)) + self._row) // FP8_TILE
        scales = self._scales.index_select(0, rows)
        return _scaled(values, scales, FP8_TILE, self._column, safe=self._safe)


class Fp4Decoder:
    """e2m1 codes, two a byte, with one scale per 32 inputs of a row."""

    def __init__(self, scales_NG: Bytes, dtype: torch.dtype, *, column: int = 0) -> None:
        """`scales_NG` begins at the first row and at the group that holds input `column`."""
        self._scales, self._safe = scale_values(scales_NG, dtype), _safe(scales_NG)
        self._column = column % FP4_GROUP
        # Both values of a byte are fetched as one number of twice the width.
        self._table = _lookup(fp4_table(dtype), pair=True)
        self._dtype = dtype

    def __call__(self, codes_NB: Bytes, first: int) -> Tensor:
        """Values [N, 2 B] of rows `first` .."""
        values = torch.from_numpy(self._table[codes_NB]).view(self._dtype)
        scales = self._scales[first : first + len(codes_NB)]
        return _scaled(values, scales, FP4_GROUP, self._column, safe=self._safe)


def _scaled(values: Tensor, scales: Tensor, group: int, offset: int, *, safe: bool) -> Tensor:
    """`values` times the scale of each one's group, in place; the first group may be cut."""
    count, width = values.shape
    if safe and not offset and not width % group:
        values.view(count, -1, group).mul_(scales[:, : width // group, None])
    else:
        wide = scales.index_select(1, (torch.arange(width) + offset) // group)
        exact = None if safe else values.double() * wide.double()
        values.mul_(wide)
        if finite(values) and exact is not None and bool((values.double() != exact).any()):
            raise BadValueError("has values outside the exponents of bfloat16")
    if not finite(values):
        raise BadValueError("has values that are not finite")
    return values


def _lookup(table: Tensor, *, pair: bool = False) -> npt.NDArray[np.generic]:
    """The table as integers of the same bits."""
    size = table.element_size() * (2 if pair else 1)
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    found: npt.NDArray[np.generic] = table.contiguous().view(kind).reshape(-1).numpy()
    return found


def _safe(scales: Bytes) -> bool:
    low, high = _SAFE_SCALES
    return not scales.size or (int(scales.min()) >= low and int(scales.max()) <= high)


def finite(values: Tensor) -> bool:
    """No NaN and no infinity: `aminmax` hands a NaN on, so one pass without a copy finds both."""
    if not values.numel():
        return True
    low, high = torch.aminmax(values)
    return bool(torch.isfinite(low)) and bool(torch.isfinite(high))
