"""From-scratch decoders of the stored number formats: integers and fractions only (deepseek-v4.md
3.1, 5.1). Nothing here uses torch's or the product's idea of a format.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache

import numpy as np
import numpy.typing as npt

NAN = None
Number = Fraction | None
Codes = npt.NDArray[np.uint8]


@cache
def power(exponent: int) -> Fraction:
    return Fraction(2) ** exponent


@cache
def e4m3(code: int) -> Number:
    """1 sign, 4 exponent (bias 7), 3 mantissa bits; only S.1111.111 is NaN, no infinity."""
    sign = -1 if code >> 7 else 1
    exponent, mantissa = (code >> 3) & 15, code & 7
    if exponent == 15 and mantissa == 7:
        return NAN
    if exponent == 0:
        return sign * Fraction(mantissa, 8) * power(-6)
    return sign * (1 + Fraction(mantissa, 8)) * power(exponent - 7)


@cache
def e2m1(code: int) -> Fraction:
    """1 sign, 2 exponent (bias 1), 1 mantissa bit."""
    sign = -1 if code >> 3 else 1
    exponent, mantissa = (code >> 1) & 3, code & 1
    if exponent == 0:
        return sign * Fraction(mantissa, 2)
    return sign * (1 + Fraction(mantissa, 2)) * power(exponent - 1)


@cache
def e8m0(code: int) -> Number:
    """An exponent with bias 127 and nothing else; 255 is NaN."""
    return NAN if code == 255 else power(code - 127)


def bf16(low: int, high: int) -> Number:
    """1 sign, 8 exponent (bias 127), 7 mantissa bits, little-endian; finite ones only."""
    bits = low | (high << 8)
    sign = -1 if bits >> 15 else 1
    exponent, mantissa = (bits >> 7) & 255, bits & 127
    if exponent == 255:
        return NAN
    if exponent == 0:
        return sign * Fraction(mantissa, 128) * power(-126)
    return sign * (1 + Fraction(mantissa, 128)) * power(exponent - 127)


def fp8_weight(codes: Codes, scales: Codes) -> list[list[Fraction]]:
    """[N][K] of an FP8 weight with one scale per 128 x 128."""
    return [
        [_value(e4m3(int(code)), int(scales[n // 128, k // 128])) for k, code in enumerate(row)]
        for n, row in enumerate(codes)
    ]


def fp4_weight(codes: Codes, scales: Codes) -> list[list[Fraction]]:
    """[N][K] of an FP4 weight: two a byte, the low nibble first, one scale per 32."""
    out = []
    for n, row in enumerate(codes):
        nibbles = [nibble for byte in row for nibble in (int(byte) & 15, int(byte) >> 4)]
        out.append([_value(e2m1(code), int(scales[n, k // 32])) for k, code in enumerate(nibbles)])
    return out


def kv_row(data: bytes, dim: int, nope: int) -> list[Fraction]:
    """A cache row: `nope` e4m3 codes, then bf16, then a scale per 64 codes, padded to 8 bytes."""
    rope_end = nope + 2 * (dim - nope)
    row = [_value(e4m3(data[c]), data[rope_end + c // 64]) for c in range(nope)]
    for at in range(nope, rope_end, 2):
        value = bf16(data[at], data[at + 1])
        assert value is not None
        row.append(value)
    groups = -(-nope // 64)
    assert not any(data[rope_end + groups :])
    assert len(data) % 8 == 0
    return row


def index_row(data: bytes, dim: int) -> list[Fraction]:
    """An index key: dim / 2 bytes of e2m1 pairs, then a scale per 32."""
    assert len(data) == dim // 2 + dim // 32
    nibbles = [nibble for byte in data[: dim // 2] for nibble in (byte & 15, byte >> 4)]
    return [_value(e2m1(code), data[dim // 2 + c // 32]) for c, code in enumerate(nibbles)]


@cache
def _value(code: Number, scale: int) -> Fraction:
    size = e8m0(scale)
    assert code is not None and size is not None
    return code * size


def scale_exponent(values: list[Fraction], floor: Fraction, largest: Fraction) -> int:
    """ceil(log2(max(amax, floor) / largest)) by doubling and halving."""
    top = max([floor, *(abs(value) for value in values)]) / largest
    exponent = 0
    while power(exponent) < top:
        exponent += 1
    while power(exponent - 1) >= top:
        exponent -= 1
    return exponent


def nearest(value: Fraction, levels: dict[Fraction, int]) -> Fraction:
    """The closest level; between two, the one with the even code."""
    return min(levels, key=lambda level: (abs(level - value), levels[level] & 1))


E4M3_LEVELS = {
    value: code for code in range(256) if (value := e4m3(code)) is not None and code != 128
}
E2M1_LEVELS = {e2m1(code): code for code in range(16) if code != 8}
