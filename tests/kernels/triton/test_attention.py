"""Attention kernels equal their meaning in float64, and a token's output does not depend on the
tokens beside it or on how a prompt was cut.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference.pages import KvPages
from kernels.reference.rope import cos_sin, frequencies
from tests.kernels.triton.check import REFERENCE, TRITON, Draw, distance

SEEDS = st.integers(0, 2**31)
FREQ = frequencies(32, 160_000.0, None)
HEADS = st.sampled_from([3, 16, 64])
# Products of float16 rows are exact; weights and the result are rounded to 2^-11.
LIMIT = 2e-3


def angles(rows: int, position: int) -> tuple[Tensor, Tensor]:
    return cos_sin(torch.arange(position, position + rows), FREQ)


def doubled(*each: Tensor) -> list[Tensor]:
    return [x.double() for x in each]


@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, rows=st.sampled_from([1, 3]), heads=HEADS, slots=st.sampled_from([5, 64, 100]))
def test_sparse_attention(seed: int, rows: int, heads: int, slots: int) -> None:
    draw = Draw(seed)
    q = draw.normal(rows, heads, 128, dtype=torch.float16)
    kv = draw.normal(40, 128, dtype=torch.float16)
    index, sink = draw.integers(-1, 40, rows, slots), draw.normal(heads, scale=3.0)
    index[-1, slots // 2 :] = -1
    cos, sin = angles(rows, 999_937)
    found = TRITON.sparse_attention(q, kv, index, sink, cos, sin, scale=0.09)
    wide = doubled(q, kv, sink, cos, sin)
    exact = REFERENCE.sparse_attention(wide[0], wide[1], index, *wide[2:], scale=0.09)
    assert found.dtype == torch.float16
    assert distance(found, exact) < LIMIT
    alone = TRITON.sparse_attention(q[-1:], kv, index[-1:], sink, cos[-1:], sin[-1:], scale=0.09)
    assert torch.equal(alone[0], found[-1])


def test_a_row_without_keys_is_zero_whatever_row_nought_holds() -> None:
    draw = Draw(1)
    q, kv = draw.normal(1, 4, 128, dtype=torch.float16), torch.ones(2, 128, dtype=torch.float16)
    index = torch.full((1, 64), -1, dtype=torch.int32)
    found = TRITON.sparse_attention(q, kv, index, torch.zeros(4), *angles(1, 0), scale=1.0)
    assert torch.equal(found, torch.zeros_like(found))


class Prompt:
    """A stretch of one sequence around `position`, as a chunk of its prefill sees it."""

    def __init__(self, seed: int, *, position: int, heads: int, window: int, ratio: int) -> None:
        self.seed, self.position, self.heads = seed, position, heads
        self.window, self.ratio = window, ratio

    def token(self, t: int, *shape: int) -> Tensor:
        return Draw(self.seed + t).normal(*shape, 128, dtype=torch.float16)

    def attend(self, ops: object, start: int, rows: int, chunk: int, *, wide: bool) -> Tensor:
        first = self.position + start
        earlier = min(first, self.window - 1)
        own = [self.token(t) for t in range(first - earlier, first + rows)]
        entries = Draw(self.seed - 1).normal(
            (self.position + 64) // self.ratio + 1, 128, dtype=torch.float16
        )
        q = torch.stack([self.token(t + 1_000_000, self.heads) for t in range(first, first + rows)])
        sink = Draw(self.seed).normal(self.heads)
        tensors = [q, torch.cat((torch.stack(own), entries)), sink, *angles(rows, first)]
        if wide:
            tensors = doubled(*tensors)
        kind = {"window": self.window, "ratio": self.ratio, "chunk": chunk}
        place = {"position": first, "entries_at": len(own)}
        return ops.dense_compressed_attention(*tensors, scale=0.09, **place, **kind)  # type: ignore[attr-defined, no-any-return]


@settings(max_examples=5, deadline=None)
@given(
    seed=st.integers(1, 2**30),
    heads=st.sampled_from([3, 16, 64]),
    position=st.sampled_from([0, 5, 63, 200, 519]),
    rows=st.sampled_from([1, 6]),
    chunk=st.sampled_from([64, 1152]),
)
def test_dense_attention_however_the_prompt_is_cut(
    seed: int, heads: int, position: int, rows: int, chunk: int
) -> None:
    prompt = Prompt(seed, position=position, heads=heads, window=40, ratio=4)
    found = prompt.attend(TRITON, 0, rows, chunk, wide=False)
    exact = prompt.attend(REFERENCE, 0, rows, chunk, wide=True)
    assert distance(found, exact) < LIMIT
    last = prompt.attend(TRITON, rows - 1, 1, chunk, wide=False)
    assert torch.equal(last[0], found[-1])


def caches(draw: Draw) -> tuple[list[KvPages], list[Tensor]]:
    layouts = [KvPages(page_rows=rows, dim=128, nope=64) for rows in (16, 2)]
    pages = []
    for layout in layouts:
        each = torch.zeros(8, layout.page_bytes, dtype=torch.uint8)
        slots = torch.arange(8 * layout.page_rows, dtype=torch.int32)
        REFERENCE.quantize_kv(draw.normal(len(slots), 128), slots, each, layout)
        pages.append(each)
    return layouts, pages


@settings(max_examples=4, deadline=None)
@given(
    seed=SEEDS,
    rows=st.sampled_from([1, 3]),
    heads=HEADS,
    entries=st.sampled_from([0, 64, 128]),
    chunk=st.sampled_from([64, 128, 1152]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
)
def test_decode_attention(
    seed: int, rows: int, heads: int, entries: int, chunk: int, dtype: torch.dtype
) -> None:
    draw = Draw(seed)
    layouts, pages = caches(draw)
    own, heavy = draw.integers(-1, 128, rows, 64), draw.integers(-1, 16, rows, entries)
    own[:, :20] = -1
    heavy[-1] = -1
    q, sink = draw.normal(rows, heads, 128, dtype=dtype), draw.normal(heads, scale=3.0)
    cos, sin = angles(rows, 1_048_000)
    lists = (pages[0], own, layouts[0], pages[1], heavy, layouts[1])
    kind = {"scale": 0.09, "chunk": chunk}
    found = TRITON.decode_attention(q, *lists, sink, cos, sin, **kind)  # type: ignore[arg-type]
    wide = doubled(q, sink, cos, sin)
    exact = REFERENCE.decode_attention(wide[0], *lists, *wide[1:], scale=0.09)
    assert distance(found, exact) < (LIMIT if dtype == torch.float16 else 1.2e-2)
    one = (pages[0], own[-1:], layouts[0], pages[1], heavy[-1:], layouts[1])
    alone = TRITON.decode_attention(q[-1:], *one, sink, cos[-1:], sin[-1:], **kind)  # type: ignore[arg-type]
    assert torch.equal(alone[0], found[-1])
    wider = torch.nn.functional.pad(heavy, (0, 64), value=-1)
    lists = (pages[0], own, layouts[0], pages[1], wider, layouts[1])
    padded = TRITON.decode_attention(q, *lists, sink, cos, sin, **kind)  # type: ignore[arg-type]
    assert torch.equal(padded, found)


@pytest.mark.parametrize("heads", [16, 64])
def test_a_token_read_and_a_token_written_agree(heads: int) -> None:
    """Prompt rows gathered to float16 and decode rows straight from the pages; the channels are
    summed in one order, but in products of other widths, hence the slack of the last bit.
    """
    draw = Draw(heads)
    layouts, pages = caches(draw)
    own, heavy = draw.integers(-1, 128, 2, 64), draw.integers(-1, 16, 2, 128)
    q, sink = draw.normal(2, heads, 128, dtype=torch.float16), draw.normal(heads)
    cos, sin = angles(2, 7)
    rows = [
        TRITON.dequantize_gather(
            each, torch.arange(n, dtype=torch.int32), layout, dtype=torch.float16
        )
        for each, n, layout in zip(pages, (128, 16), layouts, strict=True)
    ]
    index = torch.cat((own, torch.where(heavy < 0, -1, heavy + 128)), 1)
    read = TRITON.sparse_attention(q, torch.cat(rows), index, sink, cos, sin, scale=0.09)
    lists = (pages[0], own, layouts[0], pages[1], heavy, layouts[1])
    written = TRITON.decode_attention(q, *lists, sink, cos, sin, scale=0.09)
    assert distance(written, read) < 1e-3
    assert float((written != read).float().mean()) < 0.02


def test_widths_that_no_tile_fits_are_refused() -> None:
    draw = Draw(2)
    layouts, pages = caches(draw)
    q, sink = draw.normal(1, 4, 128, dtype=torch.float16), draw.normal(4)
    own, heavy = draw.integers(0, 9, 1, 60), draw.integers(0, 9, 1, 64)
    lists = (pages[0], own, layouts[0], pages[1], heavy, layouts[1])
    with pytest.raises(ValueError, match="lists are 60 and 64 slots wide"):
        TRITON.decode_attention(q, *lists, sink, *angles(1, 0), scale=1.0)
    lists = (pages[0], heavy, layouts[0], pages[1], heavy, layouts[1])
    with pytest.raises(ValueError, match="tile_heads is 64"):
        TRITON.decode_attention(q, *lists, sink, *angles(1, 0), scale=1.0, tile_heads=64)
    with pytest.raises(ValueError, match="chunk is 100"):
        Prompt(1, position=0, heads=4, window=8, ratio=4).attend(TRITON, 0, 1, 100, wide=False)


def test_decode_attention_of_a_released_row() -> None:
    """512 = 448 + 64 channels, the row of both released models."""
    draw = Draw(3)
    layout = KvPages(page_rows=64, dim=512, nope=448)
    pages = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
    slots = torch.arange(128, dtype=torch.int32)
    REFERENCE.quantize_kv(draw.normal(128, 512), slots, pages, layout)
    own, heavy = draw.integers(-1, 128, 1, 128), draw.integers(-1, 128, 1, 64)
    q, sink = draw.normal(1, 16, 512, dtype=torch.float16), draw.normal(16)
    cos, sin = angles(1, 5)
    lists = (pages, own, layout, pages, heavy, layout)
    found = TRITON.decode_attention(q, *lists, sink, cos, sin, scale=512**-0.5)
    wide = doubled(q, sink, cos, sin)
    exact = REFERENCE.decode_attention(wide[0], *lists, *wide[1:], scale=512**-0.5)
    assert distance(found, exact) < LIMIT
