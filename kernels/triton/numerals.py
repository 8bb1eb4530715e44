"""Device functions that several kernels share: scale exponents, e2m1 codes, RoPE, exact splits.

Every function takes and returns fp32 (or integers); nothing computes in bfloat16.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def power_of_two(exponent):
    """2 ** exponent for -126 <= exponent <= 127, exact."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def fp8_exponent(amax):
    """ceil(log2(max(amax, 1e-4) / 448)) on integers: log2 is approximate on a GPU (T28)."""
    bits = tl.maximum(amax, 1e-4).to(tl.int32, bitcast=True)
    return (bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)


@triton.jit
def fp4_exponent(amax):
    """ceil(log2(max(amax, 6 * 2^-126) / 6))."""
    bits = tl.maximum(amax, 7.052966104933725e-38).to(tl.int32, bitcast=True)
    return (bits >> 23) - 129 + ((bits & 0x7FFFFF) > 0x400000).to(tl.int32)


@triton.jit
def fp8_scale(x, ROWS: tl.constexpr, D: tl.constexpr, GROUP: tl.constexpr):
    """Scale exponents [ROWS, D / GROUP] of x [ROWS, D] and x divided by its scale, within 448."""
    groups = tl.reshape(x, (ROWS, D // GROUP, GROUP))
    exponent = fp8_exponent(tl.max(tl.abs(groups), 2))
    scaled = groups * power_of_two(-exponent)[:, :, None]
    scaled = tl.minimum(tl.maximum(scaled, -448.0), 448.0)
    return exponent, tl.reshape(scaled, (ROWS, D))


@triton.jit
def fp4_codes(x, ROWS: tl.constexpr, C: tl.constexpr):
    """e2m1 codes uint8-valued int32 [ROWS, C] and exponents [ROWS, C / 32]; ties to even codes."""
    groups = tl.reshape(x, (ROWS, C // 32, 32))
    exponent = fp4_exponent(tl.max(tl.abs(groups), 2))
    size = tl.abs(groups) * power_of_two(-exponent)[:, :, None]
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32)
    code += (size > 1.25).to(tl.int32) + (size >= 1.75).to(tl.int32)
    code += (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32) + (size > 5.0).to(tl.int32)
    sign = (groups.to(tl.int32, bitcast=True) >> 28) & 8
    return tl.reshape(code | sign, (ROWS, C)), exponent


@triton.jit
def fp4_value(code):
    """fp32 value of 4-bit codes (any integer type of 32 bits)."""
    size = code & 7
    normal = ((size + 252) << 22).to(tl.float32, bitcast=True)
    value = tl.where(size < 2, size.to(tl.float32) * 0.5, normal)
    return tl.where((code & 8) != 0, -value, value)


@triton.jit
def rotated(x, x_other, cos, sin, even, SIGN: tl.constexpr):
    """One element of an interleaved pair: `x_other` is its partner, `even` says which it is.

    SIGN +1 rotates forward, -1 back (2.2, T1, T8).
    """
    s = sin * SIGN
    return tl.where(even, x * cos - x_other * s, x_other * s + x * cos)


@triton.jit
def split3(x):
    """Three bfloat16 tensors whose sum is the fp32 `x` to its last bit (24 = 3 * 8 bits)."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    mid = rest.to(tl.bfloat16)
    low = (rest - mid.to(tl.float32)).to(tl.bfloat16)
    return high, mid, low


@triton.jit
def rotate_signs(x, signs, C: tl.constexpr):
    """x @ signs / sqrt(C) to fp32 accuracy on bfloat16 tensor cores: +-1 is exact there."""
    high, mid, low = split3(x)
    total = tl.dot(low, signs)
    total = tl.dot(mid, signs, total)
    total = tl.dot(high, signs, total)
    return total * (C**-0.5)
