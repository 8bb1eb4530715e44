"""Row formats: the kernels write the same bytes as the reference, which is bit-exact by intent."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.reference.hadamard import hadamard_matrix
from kernels.reference.pages import IndexPages, KvPages
from tests.kernels.triton.check import REFERENCE, TRITON, Draw, distance, examples

SEEDS = st.integers(0, 2**31)
ROWS = st.sampled_from([1, 3, 8, 17, 65])
LAYOUTS = st.sampled_from([(512, 448, 2), (512, 448, 64), (128, 64, 7), (256, 192, 64)])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@examples(12)
@given(seed=SEEDS, rows=ROWS, layout=LAYOUTS, dtype=DTYPES)
def test_kv_pages_hold_the_reference_bytes(
    seed: int, rows: int, layout: tuple[int, int, int], dtype: torch.dtype
) -> None:
    draw = Draw(seed)
    dim, nope, page_rows = layout
    pages = KvPages(page_rows=page_rows, dim=dim, nope=nope)
    x = draw.rows(rows, dim, dtype=dtype)
    count = -(-2 * rows // page_rows) + 1
    slots = draw.slots(rows, count * page_rows)
    empty = draw.integers(0, 256, count, pages.page_bytes).to(torch.uint8)
    wanted, found = empty.clone(), empty.clone()
    REFERENCE.quantize_kv(x, slots, wanted, pages)
    TRITON.quantize_kv(x, slots, found, pages)
    assert torch.equal(found, wanted)
    back = [ops.dequantize_gather(found, slots, pages, dtype=dtype) for ops in (REFERENCE, TRITON)]
    assert torch.equal(back[0], back[1])
    assert not back[1][slots < 0].any()


@examples(8)
@given(seed=SEEDS, rows=ROWS, channels=st.sampled_from([32, 96, 128, 288]), dtype=DTYPES)
def test_mxfp4_bytes_and_values_are_the_reference_s(
    seed: int, rows: int, channels: int, dtype: torch.dtype
) -> None:
    x = Draw(seed).rows(rows, channels, dtype=dtype)
    x[0, :8] = torch.tensor([0.25, -0.75, 1.25, 1.75, -2.5, 3.5, 5.0, 6.0])
    wanted, found = REFERENCE.mxfp4_encode(x), TRITON.mxfp4_encode(x)
    assert all(map(torch.equal, found, wanted))
    assert torch.equal(
        TRITON.mxfp4_decode(*wanted, dtype=dtype), REFERENCE.mxfp4_decode(*wanted, dtype=dtype)
    )


@examples(6)
@given(seed=SEEDS, rows=ROWS, channels=st.sampled_from([64, 128]))
def test_hadamard_is_as_good_as_fp32(seed: int, rows: int, channels: int) -> None:
    x = Draw(seed).rows(rows, channels)
    matrix = hadamard_matrix(channels)
    found = TRITON.hadamard(x, matrix)
    exact = REFERENCE.hadamard(x.double(), matrix.double())
    for row in range(rows):
        assert distance(found[row], exact[row]) < 1e-6


@examples(8)
@given(seed=SEEDS, rows=ROWS, page_rows=st.sampled_from([2, 64]))
def test_index_rows_are_rotated_rounded_and_stored(seed: int, rows: int, page_rows: int) -> None:
    draw = Draw(seed)
    layout = IndexPages(page_rows=page_rows, dim=128)
    # Small integers rotate without rounding, so codes may be compared bit for bit.
    x = draw.integers(-8, 9, rows, 128).float() * 0.125
    count = -(-2 * rows // page_rows)
    slots = draw.slots(rows, count * page_rows)
    matrix = hadamard_matrix(128)
    wanted = draw.integers(0, 256, count, layout.page_bytes).to(torch.uint8)
    found = wanted.clone()
    REFERENCE.quantize_index(x, matrix, slots, wanted, layout)
    TRITON.quantize_index(x, matrix, slots, found, layout)
    assert torch.equal(found, wanted)


@examples(8)
@given(seed=SEEDS, rows=ROWS)
def test_index_queries_in_e4m3_are_the_fp4_values(seed: int, rows: int) -> None:
    draw = Draw(seed)
    x = draw.integers(-8, 9, rows, 128).float() * 2.0 ** draw.integers(-20, 20, rows, 1)
    x[::4] = 0.0
    matrix = hadamard_matrix(128)
    wanted, found = REFERENCE.round_index(x, matrix), TRITON.round_index(x, matrix)
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[0].float(), wanted[0].float())
    packed = REFERENCE.mxfp4_encode(REFERENCE.hadamard(x, matrix))
    exact = REFERENCE.mxfp4_decode(*packed, dtype=torch.float64)
    # The spread of one row's block scales stays below 2^14 here, so nothing is lost.
    assert torch.equal(found[0].double() * found[1][:, None].double(), exact)
