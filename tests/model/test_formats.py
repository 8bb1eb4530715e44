"""Stored numbers against decoders made of integers and fractions (tests/model/codes.py)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.reference import rows
from model.convert import repack
from model.formats import (
    BadValueError,
    Fp4Decoder,
    Fp8Decoder,
    fp4_table,
    fp8_table,
    scale_values,
)
from tests.model import codes
from tests.model.codes import Codes

DTYPES = [torch.bfloat16, torch.float32]


def fractions(values: torch.Tensor) -> list[Fraction]:
    return [Fraction(value) for value in values.double().reshape(-1).tolist()]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_of_e4m3_and_e2m1_has_its_value(dtype: torch.dtype) -> None:
    table = fp8_table(dtype).double()
    for code in range(256):
        value = codes.e4m3(code)
        got = table[code].item()
        assert (value is None and got != got) or Fraction(got) == value, code
    pairs = fp4_table(dtype).double()
    for byte in range(256):
        got_pair = [Fraction(v) for v in pairs[byte].tolist()]
        assert got_pair == [codes.e2m1(byte & 15), codes.e2m1(byte >> 4)], byte


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_code_of_e8m0_has_its_value(dtype: torch.dtype) -> None:
    values = scale_values(np.arange(255, dtype=np.uint8), dtype)
    assert fractions(values) == [codes.e8m0(code) for code in range(255)]
    with pytest.raises(BadValueError, match="scale that is NaN"):
        scale_values(np.array([3, 255], np.uint8), dtype)


def drawn_codes(seed: int, shape: tuple[int, int], *, nan: bool = False) -> Codes:
    found = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    if not nan:
        found[(found & 127) == 127] = 0x7E
    return found


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    row=st.sampled_from([0, 1, 127]),
    column=st.sampled_from([0, 3, 64]),
    width=st.sampled_from([1, 64, 128, 140]),
    dtype=st.sampled_from(DTYPES),
    middle=st.integers(3, 245),
)
def test_fp8_weights_and_their_slices_decode_exactly(
    seed: int, row: int, column: int, width: int, dtype: torch.dtype, middle: int
) -> None:
    whole = drawn_codes(seed, (150, column + width))
    scales = drawn_codes(seed + 1, (2, -(-(column + width) // 128))) % 9
    scales = np.clip(scales.astype(int) + middle - 4, 3, 245).astype(np.uint8)
    wanted = codes.fp8_weight(whole, scales)
    decoder = Fp8Decoder(scales, dtype, row=row, column=column)
    for first, last in ((0, 10), (10, 150 - row)):
        got = decoder(whole[row + first : row + last, column:], first)
        part = [value for line in wanted[row + first : row + last] for value in line[column:]]
        assert fractions(got) == part


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    column=st.sampled_from([0, 8, 32]),
    width=st.sampled_from([2, 32, 96, 100]),
    dtype=st.sampled_from(DTYPES),
    middle=st.integers(3, 245),
)
def test_fp4_weights_and_their_slices_decode_exactly(
    seed: int, column: int, width: int, dtype: torch.dtype, middle: int
) -> None:
    whole = drawn_codes(seed, (7, (column + width) // 2), nan=True)
    scales = drawn_codes(seed + 1, (7, -(-(column + width) // 32))) % 9
    scales = np.clip(scales.astype(int) + middle - 4, 3, 245).astype(np.uint8)
    wanted = codes.fp4_weight(whole, scales)
    decoder = Fp4Decoder(scales[:, column // 32 :], dtype, column=column)
    for first, last in ((0, 3), (3, 7)):
        got = decoder(whole[first:last, column // 2 :], first)
        assert fractions(got) == [v for line in wanted[first:last] for v in line[column:]]


def test_numbers_that_no_weight_has_are_refused() -> None:
    zeros = np.zeros((128, 128), np.uint8)
    one = np.full((1, 1), 127, np.uint8)
    nan = zeros.copy()
    nan[5, 5] = 0xFF
    with pytest.raises(BadValueError, match="not finite"):
        Fp8Decoder(one, torch.bfloat16)(nan, 0)
    huge = np.full((128, 128), 0x7E, np.uint8)
    with pytest.raises(BadValueError, match="not finite"):
        Fp8Decoder(np.full((1, 1), 254, np.uint8), torch.bfloat16)(huge, 0)
    tiny = np.full((128, 128), 1, np.uint8)
    with pytest.raises(BadValueError, match="exponents of bfloat16"):
        Fp8Decoder(np.zeros((1, 1), np.uint8), torch.bfloat16)(tiny, 0)
    # A tile of zeros may have any scale.
    for code in (0, 254):
        got = Fp8Decoder(np.full((1, 1), code, np.uint8), torch.bfloat16)(zeros, 0)
        assert not got.any()


def finite_floats(largest: float) -> st.SearchStrategy[float]:
    return st.floats(-largest, largest, width=32, allow_nan=False, allow_subnormal=False)


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(finite_floats(3e4), min_size=96, max_size=96),
    nope=st.sampled_from([0, 64, 80]),
)
def test_a_cache_row_is_rounded_to_the_nearest_code_and_round_trips(
    values: list[float], nope: int
) -> None:
    x = torch.tensor([values])
    rounded = rows.fp8_round(x, nope)
    stored = rows.fp8_encode(rounded, nope)
    exact = fractions(x)
    for start in range(0, nope, 64):
        group = exact[start : min(start + 64, nope)]
        exponent = codes.scale_exponent(group, Fraction(1e-4), Fraction(448))
        size = codes.power(exponent)
        wanted = [size * codes.nearest(value / size, codes.E4M3_LEVELS) for value in group]
        assert fractions(rounded[0, start : start + len(group)]) == wanted
    data = bytes(stored[0].tolist())
    assert codes.kv_row(data, 96, nope) == fractions(rounded)
    assert torch.equal(rows.fp8_decode(stored, 96, nope), rounded)
    assert torch.equal(rows.fp8_round(rounded, nope), rounded)


@settings(max_examples=25, deadline=None)
@given(values=st.lists(finite_floats(100.0), min_size=64, max_size=64))
def test_an_index_row_is_rounded_to_the_nearest_code_and_round_trips(values: list[float]) -> None:
    x = torch.tensor([values])
    rounded = rows.fp4_round(x)
    stored = rows.fp4_encode(rounded)
    exact = fractions(x)
    floor = 6 * codes.power(-126)
    for start in (0, 32):
        group = exact[start : start + 32]
        size = codes.power(codes.scale_exponent(group, floor, Fraction(6)))
        wanted = [size * codes.nearest(value / size, codes.E2M1_LEVELS) for value in group]
        assert fractions(rounded[0, start : start + 32]) == wanted
    assert codes.index_row(bytes(stored[0].tolist()), 64) == fractions(rounded)
    assert torch.equal(rows.fp4_decode(stored, 64), rounded)


@settings(max_examples=10, deadline=None)
@given(
    values=st.lists(finite_floats(1e4), min_size=130, max_size=130),
    dtype=st.sampled_from(DTYPES),
)
def test_t28_activations_are_rounded_per_128_with_the_scale_up(
    values: list[float], dtype: torch.dtype
) -> None:
    x = torch.tensor([values]).to(dtype)
    got = rows.activation_round(x)
    assert got.dtype == dtype
    exact = fractions(x)
    for start, stop in ((0, 128), (128, 130)):
        group = exact[start:stop]
        size = codes.power(codes.scale_exponent(group, Fraction(1e-4), Fraction(448)))
        wanted = [size * codes.nearest(value / size, codes.E4M3_LEVELS) for value in group]
        assert fractions(got[0, start:stop]) == wanted
    assert torch.equal(rows.activation_round(got), got)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    spread=st.integers(0, 14),
    top=st.integers(20, 240),
    shape=st.sampled_from([(128, 64), (130, 80), (3, 16)]),
)
def test_repacked_fp4_weights_are_the_same_numbers(
    seed: int, spread: int, top: int, shape: tuple[int, int]
) -> None:
    packed = drawn_codes(seed, shape, nan=True)
    lower = np.random.default_rng(seed).integers(0, spread + 1, (shape[0], shape[1] // 16))
    scales = (top - lower).astype(np.uint8)
    got, tiles = repack(packed, scales)
    assert tiles.shape == (-(-shape[0] // 128), -(-shape[1] * 2 // 128))
    assert codes.fp8_weight(got, tiles) == codes.fp4_weight(packed, scales)


@given(distance=st.integers(15, 250))
@settings(max_examples=20, deadline=None)
def test_scales_too_far_apart_for_fp8_are_refused_and_not_rounded(distance: int) -> None:
    packed = np.full((128, 64), 0x11, np.uint8)
    scales = np.full((128, 4), 252, np.uint8)
    scales[60, 2] = 252 - distance
    with pytest.raises(BadValueError, match="too far apart"):
        repack(packed, scales)
