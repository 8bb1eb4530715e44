"""Indexer scores equal their meaning in float64; selection is exact, ties and nan included."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference.hadamard import hadamard_matrix
from kernels.reference.pages import IndexPages
from tests.kernels.triton.check import REFERENCE, TRITON, Draw

SEEDS = st.integers(0, 2**31)
NAN, INFINITY = float("nan"), float("inf")


def keys_in_pages(draw: Draw, pages: int, layout: IndexPages) -> Tensor:
    data = torch.zeros(pages, layout.page_bytes, dtype=torch.uint8)
    slots = torch.arange(pages * layout.page_rows, dtype=torch.int32)
    REFERENCE.quantize_index(draw.rows(len(slots), 128), hadamard_matrix(128), slots, data, layout)
    return data


def queries(draw: Draw, rows: int, heads: int) -> tuple[Tensor, Tensor]:
    q, scale = REFERENCE.round_index(draw.normal(rows * heads, 128), hadamard_matrix(128))
    return q.view(rows, heads, 128), draw.normal(rows, heads) * scale.view(rows, heads)


@settings(max_examples=6, deadline=None)
@given(seed=SEEDS, page_rows=st.sampled_from([2, 64]))
def test_gathered_keys_are_the_stored_ones(seed: int, page_rows: int) -> None:
    draw = Draw(seed)
    layout = IndexPages(page_rows=page_rows, dim=128)
    pages, slots = keys_in_pages(draw, 70, layout), draw.integers(-1, 70 * page_rows, 67)
    found, wanted = (ops.gather_index(pages, slots, layout) for ops in (TRITON, REFERENCE))
    assert torch.equal(found[0].float(), wanted[0].float())
    assert torch.equal(found[1][slots >= 0], wanted[1][slots >= 0])


@settings(max_examples=6, deadline=None)
@given(
    seed=SEEDS,
    rows=st.sampled_from([1, 3, 34]),
    heads=st.sampled_from([4, 64]),
    places=st.sampled_from([1, 3]),
)
def test_index_scores(seed: int, rows: int, heads: int, places: int) -> None:
    draw = Draw(seed)
    layout = IndexPages(page_rows=64, dim=128)
    pages = keys_in_pages(draw, 4, layout)
    tables = draw.integers(0, 4, 1, places).expand(rows, places).contiguous()
    entries = places * 64
    visible = draw.integers(0, entries + 1, rows)
    visible[0] = entries
    q, weight = queries(draw, rows, heads)
    slots = (tables[0].repeat_interleave(64) * 64 + torch.arange(64).repeat(places)).int()
    keys, scale = REFERENCE.gather_index(pages, slots, layout)
    exact = REFERENCE.indexer_logits(q, weight.double(), keys, scale.double(), visible)
    found = TRITON.indexer_logits(q, weight, keys, scale, visible)
    paged = TRITON.indexer_logits_paged(q, weight, pages, tables, layout, visible)
    # Sums may cancel: the error is told against the sum of what was added, without its signs.
    size = REFERENCE.indexer_logits(q, weight.double().abs(), keys, scale.double(), visible)[0]
    for row in range(rows):
        seen, blocks = int(visible[row]), -(-int(visible[row]) // 32)
        for scores, maxima in (found, paged):
            gap = (scores[row, :seen] - exact[0][row, :seen]).abs()
            assert bool((gap <= 1e-6 * size[row, :seen]).all())
            assert torch.equal(maxima[row, :blocks], maxima_of(scores[row : row + 1, :seen])[0])
        # The two forms add the heads in one order, so a key's score has one value.
        assert torch.equal(found[0][row, :seen], paged[0][row, :seen])


def maxima_of(scores: Tensor) -> Tensor:
    missing = -scores.shape[1] % 32
    known = torch.nn.functional.pad(scores, (0, missing), value=-INFINITY).nan_to_num(
        nan=-INFINITY, posinf=INFINITY, neginf=-INFINITY
    )
    return known.view(scores.shape[0], -1, 32).amax(2)


def drawn_scores(draw: Draw, rows: int, entries: int, kind: str) -> Tensor:
    scores = draw.normal(rows, entries)
    if kind == "ties":
        scores = scores.round().relu()
        scores[:, ::3] *= -1.0
    if kind == "strange":
        scores[:, ::3], scores[:, 1::5], scores[:, 2::7] = NAN, INFINITY, -INFINITY
        scores[:, 4::9] = 1e-42
    return scores


@settings(max_examples=20, deadline=None)
@given(
    seed=SEEDS,
    entries=st.sampled_from([1, 31, 130, 700, 5000]),
    k=st.sampled_from([1, 3, 8, 40]),
    kind=st.sampled_from(["normal", "ties", "strange"]),
)
def test_topk_is_exact(seed: int, entries: int, k: int, kind: str) -> None:
    draw = Draw(seed)
    scores = drawn_scores(draw, 2, entries, kind)
    visible = draw.integers(0, entries + 1, 2)
    visible[0] = entries
    maxima = maxima_of(scores.masked_fill(torch.arange(entries) >= visible[:, None], -INFINITY))
    # What may not be selected is never looked at.
    scores.masked_fill_(torch.arange(entries) >= visible[:, None], 1e30)
    found = TRITON.topk_blocks(scores, maxima, visible, k)
    assert torch.equal(found, REFERENCE.topk_blocks(scores, maxima, visible, k))


def test_topk_of_a_million_token_context() -> None:
    """262,144 scores, most of them exactly 0, through the blocks."""
    draw = Draw(9)
    scores = (draw.normal(1, 262_144) - 3.2).relu()
    visible = torch.tensor([262_100], dtype=torch.int32)
    found = TRITON.topk_blocks(scores, maxima_of(scores), visible, 512)
    assert torch.equal(found, REFERENCE.topk_blocks(scores, scores, visible, 512))
