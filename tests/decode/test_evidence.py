"""From a token's selected entries to the spans of an answer."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from decode.evidence import (
    FLOOR,
    MOST_SPAN_TOKENS,
    MOST_SPANS,
    AnswerEvidence,
    Span,
    joined,
    of_prompt,
    of_token,
)
from model.engine import Evidence
from penstock.request import EvidenceSpan


def entry(number: int, mass: float) -> EvidenceSpan:
    """As the engine makes them: a window of 4 tokens and the one before it."""
    return EvidenceSpan(max(number - 1, 0) * 4, (number + 1) * 4, mass)


entries = st.lists(st.builds(entry, st.integers(0, 300), st.floats(FLOOR, 1.0)), max_size=60).map(
    lambda found: list({(e.start, e.end): e for e in found}.values())
)


def covered(spans: list[Span] | list[EvidenceSpan]) -> set[int]:
    return {token for span in spans for token in range(span.start, span.end)}


@given(entries)
def test_joined_spans_are_disjoint_and_lose_no_token_and_no_mass(
    found: list[EvidenceSpan],
) -> None:
    spans = joined(Span(e.start, e.end, e.mass, e.mass) for e in found)
    assert sum(span.end - span.start for span in spans) == len(covered(spans))
    assert covered(spans) == covered(found)
    assert math.isclose(sum(s.total for s in spans), sum(e.mass for e in found), abs_tol=1e-9)
    assert all(0 < span.end - span.start <= MOST_SPAN_TOKENS for span in spans)
    assert all(a.end <= b.start for a, b in pairwise(spans))


@given(entries, st.randoms())
def test_the_order_of_the_entries_does_not_matter(found: list[EvidenceSpan], rng: object) -> None:
    shuffled = list(found)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert [(s.start, s.end) for s in of_token(found)] == [
        (s.start, s.end) for s in of_token(shuffled)
    ]


@given(st.lists(entries, min_size=1, max_size=12))
def test_an_answers_weights_are_means_over_its_tokens(tokens: list[list[EvidenceSpan]]) -> None:
    answer = AnswerEvidence()
    for found in tokens:
        answer.add(found)
    spans = answer.spans()
    assert [s.total for s in spans] == sorted((s.total for s in spans), reverse=True)
    assert len(spans) <= MOST_SPANS
    if len(spans) < MOST_SPANS:
        every = sum(e.mass for found in tokens for e in found) / len(tokens)
        assert math.isclose(sum(answer.weight(s) for s in spans), every, abs_tol=1e-9)
    for span in spans:
        assert 0 < span.mass <= max(e.mass for found in tokens for e in found)


def test_only_what_counts_in_the_prompt_is_told() -> None:
    found = [Evidence(0, 8, 0.5), Evidence(96, 104, 0.3), Evidence(100, 108, 0.2)]
    found += [Evidence(40, 48, FLOOR / 2)]
    assert [(e.start, e.end) for e in of_prompt(found, 100)] == [(0, 8), (96, 100)]


def test_memory_is_bounded_and_what_is_heavy_stays() -> None:
    answer = AnswerEvidence()
    for number in range(20_000):
        answer.add([entry(3 * number, 0.02), entry(50_000, 0.9)])
    assert len(answer._entries) <= 4097
    assert (answer.spans()[0].start, answer.tokens) == (49_999 * 4, 20_000)
    assert math.isclose(answer.weight(answer.spans()[0]), 0.9)
