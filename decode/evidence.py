"""What an answer was read from: selected entries of one token, and of a whole answer. Pure.

The engine names for each token the compressed entries that its last selecting layer attended to and
the attention mass on each (`Engine.evidence`). Here that becomes spans of the prompt: disjoint,
bounded in number and length, heaviest first. `docs/evidence.md` says what the figures mean.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from model.engine import Evidence
from penstock.request import EvidenceSpan

FLOOR = 0.01
"""Attention mass below which an entry is not told: it did not decide anything."""
MOST_SPANS = 64
"""Told of a whole answer."""
MOST_SPAN_TOKENS = 64
"""Neighbouring entries are joined up to this length; a span as long as a page explains nothing."""
_MOST_ENTRIES = 4096


def of_prompt(found: Iterable[Evidence], prompt_tokens: int) -> list[EvidenceSpan]:
    """The entries of one token that count: inside the prompt, and not below `FLOOR`."""
    return [
        EvidenceSpan(each.start, min(each.end, prompt_tokens), each.mass)
        for each in found
        if each.mass >= FLOOR and each.start < prompt_tokens
    ]


@dataclass
class Span:
    """Prompt tokens `start` to `end` (half-open) and the attention on them."""

    start: int
    end: int
    mass: float
    """The greatest mass that one token gave to one entry in here."""
    total: float
    """Mass of all entries in here, summed over tokens."""


def joined(entries: Iterable[Span]) -> list[Span]:
    """Entries that overlap or touch become one span, up to `MOST_SPAN_TOKENS`. By position.

    The results are disjoint, cover the same tokens, and have the same total mass.
    """
    spans: list[Span] = []
    for entry in sorted(entries, key=lambda entry: (entry.start, entry.end)):
        last = spans[-1] if spans else None
        if last is None or entry.start > last.end:
            spans.append(Span(entry.start, entry.end, entry.mass, entry.total))
            continue
        reach = max(last.end, entry.end)
        if reach - last.start > MOST_SPAN_TOKENS and entry.end > last.end:
            spans.append(Span(last.end, entry.end, entry.mass, entry.total))
            continue
        last.end = reach
        last.mass = max(last.mass, entry.mass)
        last.total += entry.total
    return spans


def of_token(entries: Iterable[EvidenceSpan]) -> list[Span]:
    """The spans of one token, heaviest first."""
    spans = joined(Span(e.start, e.end, e.mass, e.mass) for e in entries)
    return sorted(spans, key=lambda span: (-span.total, span.start))


class AnswerEvidence:
    """Collects over the tokens of an answer. Memory is bounded, however long the answer."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, int], Span] = {}
        self.tokens = 0
        """Of the answer so far, with and without evidence."""

    def add(self, entries: Iterable[EvidenceSpan], tokens: int = 1) -> None:
        """What `tokens` further tokens of the answer attended to."""
        self.tokens += tokens
        for entry in entries:
            known = self._entries.setdefault(
                (entry.start, entry.end), Span(entry.start, entry.end, 0.0, 0.0)
            )
            known.mass = max(known.mass, entry.mass)
            known.total += entry.mass
        if len(self._entries) > _MOST_ENTRIES:
            kept = sorted(self._entries.items(), key=lambda item: -item[1].total)
            self._entries = dict(kept[: _MOST_ENTRIES // 2])

    def weight(self, span: Span) -> float:
        """Mean attention of the answer's tokens on a span."""
        return span.total / max(self.tokens, 1)

    def spans(self) -> list[Span]:
        """Heaviest first, at most `MOST_SPANS`."""
        spans = joined(self._entries.values())
        return sorted(spans, key=lambda span: (-span.total, span.start))[:MOST_SPANS]
