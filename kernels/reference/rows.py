"""Row formats of the cache: e4m3 + bf16 rows, e2m1 index rows (deepseek-v4.md 3.1, 5.4, T28).

Each format has `round` (the values that attention uses), `encode` and `decode` (the stored bytes).
`encode` is a function of the rounded values: decode(encode(v)) == v for every rounded v, so memory
may hold values and the store bytes. Scales are powers of two rounded up, found by integer
arithmetic on the fp32 exponent.

Shape suffixes: R rows, C channels, G scale groups, B bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference.hadamard import hadamard

FP8_GROUP = 64
FP4_GROUP = 32
ACTIVATION_GROUP = 128
_FP8_MAX = 448.0
_FP8_FLOOR = 1e-4
_FP4_FLOOR = 6.0 * 2.0**-126
# 448 = 1.75 * 2^8 and 6 = 1.5 * 2^2: (mantissa bits, exponent) of the largest code.
_FP8_TOP = (0x600000, 8)
_FP4_TOP = (0x400000, 2)
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _scale_exponent(amax: Tensor, floor: float, top: tuple[int, int]) -> Tensor:
    """ceil(log2(max(amax, floor) / largest code)) as int32."""
    bits = amax.clamp_min(floor).view(torch.int32)
    mantissa, exponent = top
    return (bits >> 23) - 127 - exponent + ((bits & 0x7FFFFF) > mantissa).to(torch.int32)


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def _fp8_codes(nope_RC: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 codes [R, G, 64] and scale exponents [R, G, 1]."""
    rows, channels = nope_RC.shape
    groups = -(-channels // FP8_GROUP)
    x = F.pad(nope_RC, (0, groups * FP8_GROUP - channels)).view(rows, groups, FP8_GROUP)
    exponent = _scale_exponent(x.abs().amax(-1, keepdim=True), _FP8_FLOOR, _FP8_TOP)
    scaled = (x * _power_of_two(-exponent)).clamp(-_FP8_MAX, _FP8_MAX)
    return scaled.to(torch.float8_e4m3fn), exponent


def fp8_round(x_RC: Tensor, nope: int) -> Tensor:
    """First `nope` channels to e4m3 with one scale per 64, the rest to bf16; fp32 values."""
    rope = x_RC[:, nope:].to(torch.bfloat16).float()
    if not nope:
        return rope
    codes, exponent = _fp8_codes(x_RC[:, :nope].contiguous())
    values = (codes.float() * _power_of_two(exponent)).view(x_RC.shape[0], -1)
    return torch.cat((values[:, :nope], rope), 1)


def fp8_row_bytes(dim: int, nope: int) -> int:
    size = nope + 2 * (dim - nope) + -(-nope // FP8_GROUP)
    return -(-size // 8) * 8


def fp8_encode(x_RC: Tensor, nope: int) -> Tensor:
    """uint8 [R, B]: e4m3 nope, bf16 rope, ue8m0 scales, zero padding to 8 bytes."""
    rows, dim = x_RC.shape
    out = torch.zeros((rows, fp8_row_bytes(dim, nope)), dtype=torch.uint8)
    rope_end = nope + 2 * (dim - nope)
    out[:, nope:rope_end] = x_RC[:, nope:].to(torch.bfloat16).contiguous().view(torch.uint8)
    if nope:
        codes, exponent = _fp8_codes(x_RC[:, :nope].contiguous())
        out[:, :nope] = codes.view(torch.uint8).view(rows, -1)[:, :nope]
        out[:, rope_end : rope_end + exponent.shape[1]] = (exponent[..., 0] + 127).to(torch.uint8)
    return out


def fp8_decode(rows_RB: Tensor, dim: int, nope: int) -> Tensor:
    rope_end = nope + 2 * (dim - nope)
    rope = rows_RB[:, nope:rope_end].contiguous().view(torch.bfloat16).float()
    if not nope:
        return rope
    groups = -(-nope // FP8_GROUP)
    exponent = rows_RB[:, rope_end : rope_end + groups].to(torch.int32) - 127
    codes = rows_RB[:, :nope].contiguous().view(torch.float8_e4m3fn).float()
    scale = _power_of_two(exponent).repeat_interleave(FP8_GROUP, 1)[:, :nope]
    return torch.cat((codes * scale, rope), 1)


def _fp4_codes(x_RC: Tensor) -> tuple[Tensor, Tensor]:
    """4-bit codes (sign in bit 3) [R, G, 32] as uint8 and scale exponents [R, G, 1]."""
    x = x_RC.contiguous().view(x_RC.shape[0], -1, FP4_GROUP)
    exponent = _scale_exponent(x.abs().amax(-1, keepdim=True), _FP4_FLOOR, _FP4_TOP)
    size = x.abs() * _power_of_two(-exponent)
    # Round to nearest; a tie goes to the even code, hence the alternation of > and >=.
    code = (size > 0.25).to(torch.uint8)
    for edge in (1.25, 2.5, 5.0):
        code += size > edge
    for edge in (0.75, 1.75, 3.5):
        code += size >= edge
    return code | (torch.signbit(x).to(torch.uint8) << 3), exponent


def _fp4_values(codes: Tensor, exponent: Tensor) -> Tensor:
    table = torch.tensor((*_FP4_VALUES, *(-v for v in _FP4_VALUES)))
    return table[codes.long()] * _power_of_two(exponent)


def fp4_round(x_RC: Tensor) -> Tensor:
    """e2m1 with one power-of-two scale per 32 channels; fp32 values."""
    return _fp4_values(*_fp4_codes(x_RC)).view(x_RC.shape)


def index_round(x_RC: Tensor, signs_CC: Tensor) -> Tensor:
    """Hadamard rotation, then `fp4_round` (2.4, 5.4)."""
    return fp4_round(hadamard(x_RC, signs_CC))


def fp4_row_bytes(dim: int) -> int:
    return dim // 2 + dim // FP4_GROUP


def fp4_encode(x_RC: Tensor) -> Tensor:
    """uint8 [R, B]: two codes a byte (even channel in the low nibble), then ue8m0 scales."""
    codes, exponent = _fp4_codes(x_RC)
    pairs = codes.view(x_RC.shape[0], -1, 2)
    packed = pairs[..., 0] | (pairs[..., 1] << 4)
    return torch.cat((packed, (exponent[..., 0] + 127).to(torch.uint8)), 1)


def fp4_decode(rows_RB: Tensor, dim: int) -> Tensor:
    packed = rows_RB[:, : dim // 2]
    codes = torch.stack((packed & 15, packed >> 4), -1).view(rows_RB.shape[0], -1, FP4_GROUP)
    exponent = rows_RB[:, dim // 2 :].to(torch.int32)[..., None] - 127
    return _fp4_values(codes, exponent).view(rows_RB.shape[0], dim)


def bf16_round(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def activation_round(x_RC: Tensor) -> Tensor:
    """A linear's input to e4m3, one power-of-two scale per row and 128 channels, in x's type (5.2).

    The values are exact in bfloat16, so a bfloat16 product of them is the release's, whose scales
    are powers of two as well, but for the order of its sum.
    """
    rows, channels = x_RC.shape
    x = x_RC.float()
    if missing := -channels % ACTIVATION_GROUP:
        x = F.pad(x, (0, missing))
    x = x.view(rows, -1, ACTIVATION_GROUP)
    exponent = _scale_exponent(x.abs().amax(-1, keepdim=True), _FP8_FLOOR, _FP8_TOP)
    scaled = (x * _power_of_two(-exponent)).clamp_(-_FP8_MAX, _FP8_MAX)
    values = scaled.to(torch.float8_e4m3fn).float() * _power_of_two(exponent)
    return values.view(rows, -1)[:, :channels].to(x_RC.dtype)
