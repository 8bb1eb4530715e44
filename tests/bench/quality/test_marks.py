"""Marks and figures of the evaluation: pure arithmetic, checked against counting by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.quality import marks, plot
from bench.quality.marks import LEAD_CHARS, Mark, citation, figures
from bench.quality.sheets import Kind, Question
from training.documents import UNKNOWN
from training.shares import wilson

FACT = "the code of bakilo is 4821."
QUESTION = Question(Kind.NEEDLE, "bakilo", "4821", 0.5, (100, 100 + len(FACT)))
CODE_AT = 100 + FACT.index("4821")


def span(start: int, end: int) -> dict[str, Any]:
    return {"char_start": start, "char_end": end}


@pytest.mark.parametrize(
    ("spans", "want"),
    [
        ([span(CODE_AT - 8, CODE_AT + 6)], (True, True, True)),
        ([span(CODE_AT, CODE_AT + 4)], (True, True, True)),
        ([span(CODE_AT, CODE_AT + 3)], (False, False, False)),
        ([span(0, 50), span(CODE_AT - 8, CODE_AT + 6)], (False, False, True)),
        ([span(None, None)], (False, False, False)),  # type: ignore[arg-type]
        ([], (False, False, False)),
    ],
)
def test_a_citation_must_hold_the_digits_in_their_place(
    spans: list[dict[str, Any]], want: tuple[bool, bool, bool]
) -> None:
    assert citation(QUESTION, spans) == want


def test_a_span_far_right_of_the_name_holds_no_fact() -> None:
    name = "b" * (LEAD_CHARS + 10)
    fact = f"the code of {name} is 4821."
    question = Question(Kind.NEEDLE, name, "4821", 0.5, (0, len(fact)))
    at = fact.index("4821")
    assert citation(question, [span(at, at + 4)]) == (False, True, True)
    assert citation(Question(Kind.STRANGER, name, UNKNOWN), [span(0, 5)]) == (None, None, None)


@given(st.integers(0, 400), st.integers(0, 400))
def test_wilson_holds_the_share_and_narrows(hits: int, more: int) -> None:
    n = hits + more
    low, high = wilson(hits, n)
    assert 0 <= low <= high <= 1
    if n:
        assert low - 1e-4 <= hits / n <= high + 1e-4
        wide = wilson(hits * 4, n * 4)
        assert wide[1] - wide[0] <= high - low + 1e-4


def test_wilson_is_the_published_interval() -> None:
    """Newcombe 1998, table I: 81 of 263 and 15 of 148."""
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=1e-4)


def mark(kind: Kind, expected: str, answer: str, gated: str | None, **more: Any) -> Mark:
    return Mark(1024, 11, kind, more.pop("depth", 0.5), expected, answer, gated, **more)


def test_figures_count_each_kind_for_itself() -> None:
    collected = [
        mark(Kind.NEEDLE, "1234", "1234", "1234", cited=True, cited_code=True, named=True),
        mark(Kind.NEEDLE, "1234", "1235", UNKNOWN, cited=False, cited_code=False, named=True,
             depth=0.9),
        mark(Kind.NEEDLE, "1234", UNKNOWN, UNKNOWN, cited=False, cited_code=False, named=False,
             depth=0.9),
        mark(Kind.STRANGER, UNKNOWN, UNKNOWN, UNKNOWN),
        mark(Kind.NEIGHBOUR, UNKNOWN, "7777", UNKNOWN),
        mark(Kind.REPEATED, "2222", "1111", None, earlier=True),
    ]  # fmt: skip
    got = {figure.name: (figure.hits, figure.n) for figure in figures(collected)}
    assert got["exact match"] == (1, 3)
    assert got["refused although the fact is there"] == (1, 3)
    assert got["exact match, gate on"] == (1, 3)
    assert got["answered without a fact"] == (1, 2)
    assert got["answered without a fact: neighbour"] == (1, 1)
    assert got["answered without a fact, gate on"] == (0, 2)
    assert got["cited span holds the fact"] == (1, 3)
    assert got["any span holds the code"] == (2, 3)
    assert got["repeated names, last value"] == (0, 1)
    assert got["repeated names, an earlier value"] == (1, 1)
    cells = marks.grid(collected)
    assert [(cell["depth"], cell["hits"], cell["n"]) for cell in cells] == [
        (0.5, 1, 1),
        (0.9, 0, 2),
    ]
    worst = marks.worst_cell(cells, 1024)
    assert worst is not None
    assert worst["below_mean"] == pytest.approx(1 / 3, abs=1e-3) and worst["depth"] == 0.9


def test_the_heatmap_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    cells = marks.grid([mark(Kind.NEEDLE, "1", "1", None, depth=d / 10) for d in range(11)])
    path = tmp_path / "heat.png"
    plot.heatmap(cells, "title", path)
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG") and len(data) > 5000
    assert [plot.length_name(n) for n in (512, 1024, 131_072, 1 << 20)] == [
        "512",
        "1k",
        "128k",
        "1M",
    ]
