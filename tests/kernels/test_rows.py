"""Row formats: encode is a function of the rounded value, and rounding is what the release does."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.reference import rows

SHAPES = st.sampled_from([(512, 448), (128, 64), (96, 64), (96, 48), (128, 0), (40, 33)])
SCALES = st.integers(-40, 40)


def values(seed: int, count: int, exponent: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, generator=generator) * 2.0**exponent
    # Zeros, sign zeros and equal values happen in real rows too.
    x[::7] = 0.0
    x[3::11] = -0.0
    return x


@settings(max_examples=60, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 2**31), exponent=SCALES)
def test_fp8_bytes_hold_the_rounded_row(shape: tuple[int, int], seed: int, exponent: int) -> None:
    dim, nope = shape
    x = values(seed, 5 * dim, exponent).view(5, dim)
    rounded = rows.fp8_round(x, nope)
    data = rows.fp8_encode(rounded, nope)
    assert data.shape == (5, rows.fp8_row_bytes(dim, nope))
    assert torch.equal(rows.fp8_decode(data, dim, nope), rounded)
    assert torch.equal(rows.fp8_round(rounded, nope), rounded)
    assert torch.equal(rows.fp8_encode(rows.fp8_decode(data, dim, nope), nope), data)


@settings(max_examples=60, deadline=None)
@given(dim=st.sampled_from([32, 64, 128]), seed=st.integers(0, 2**31), exponent=SCALES)
def test_fp4_bytes_hold_the_rounded_row(dim: int, seed: int, exponent: int) -> None:
    x = values(seed, 5 * dim, exponent).view(5, dim)
    rounded = rows.fp4_round(x)
    data = rows.fp4_encode(rounded)
    assert data.shape == (5, rows.fp4_row_bytes(dim))
    assert torch.equal(rows.fp4_decode(data, dim), rounded)
    assert torch.equal(rows.fp4_round(rounded), rounded)
    assert torch.equal(rows.fp4_encode(rows.fp4_decode(data, dim)), data)


@settings(max_examples=200, deadline=None)
@given(amax=st.floats(2.0**-20, 2.0**20, width=32))
def test_t28_scales_are_powers_of_two_rounded_up(amax: float) -> None:
    x = torch.zeros(1, 128)
    x[0, 5] = amax
    byte = int(rows.fp8_encode(x, 64)[0, 64 + 2 * 64])
    assert byte - 127 == math.ceil(math.log2(max(amax, 1e-4) / 448))
    code = int(rows.fp4_encode(x)[0, 64])
    assert code - 127 == math.ceil(math.log2(amax / 6))


def test_t28_a_row_of_zeros_takes_the_floors() -> None:
    zero = torch.zeros(1, 128)
    assert int(rows.fp8_encode(zero, 64)[0, 192]) - 127 == math.ceil(math.log2(1e-4 / 448))
    assert int(rows.fp4_encode(zero)[0, 64]) == 1


def test_fp4_rounds_to_nearest_even_with_the_even_channel_in_the_low_nibble() -> None:
    x = torch.zeros(1, 32)
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0]
    x[0, : len(ties)] = torch.tensor(ties)
    assert rows.fp4_round(x)[0, : len(ties)].tolist() == [0, 1, 1, 2, 2, 4, 4, 6]
    assert rows.fp4_encode(x)[0, :4].tolist() == [0x20, 0x42, 0x64, 0x76]


@pytest.mark.parametrize(("dim", "nope", "size"), [(512, 448, 584), (128, 64, 200), (96, 48, 152)])
def test_row_sizes(dim: int, nope: int, size: int) -> None:
    assert rows.fp8_row_bytes(dim, nope) == size
