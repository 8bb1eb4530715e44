"""What came back for a question, and the figures that many of them make. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bench.quality.sheets import ANSWERABLE, Kind, Question
from training.documents import UNKNOWN
from training.shares import wilson

LEAD_CHARS = 32
"""The cited span is read from here on the left: an entry holds 8 tokens, a fact up to 14."""


@dataclass(frozen=True)
class Mark:
    """One question, asked without the gate and (where asked) with it."""

    tokens: int
    facts: int
    kind: Kind
    depth: float | None
    expected: str
    answer: str
    gated: str | None = None
    """The answer under `grounding: "strict"`; None if that was not asked."""
    cited: bool | None = None
    """The heaviest span holds name and code of the fact; None without a fact."""
    cited_code: bool | None = None
    """The heaviest span holds the code's digits at the fact's place."""
    named: bool | None = None
    """Any span of the answer holds the code's digits."""
    earlier: bool = False
    """The answer is a value that the name had before."""
    prompt_tokens: int = 0

    @property
    def right(self) -> bool:
        return self.answer == self.expected

    @property
    def refused(self) -> bool:
        return self.answer == UNKNOWN


@dataclass(frozen=True)
class Figure:
    """`hits` of `n`, with Wilson's 95 % interval."""

    name: str
    tokens: int
    hits: int
    n: int

    @property
    def share(self) -> float | None:
        return self.hits / self.n if self.n else None

    def row(self) -> dict[str, Any]:
        low, high = wilson(self.hits, self.n)
        share = None if self.share is None else round(self.share, 4)
        return asdict(self) | {"share": share, "low": low, "high": high}


def citation(
    question: Question, spans: Sequence[Mapping[str, Any]]
) -> tuple[bool | None, bool | None, bool | None]:
    """(heaviest span holds the fact, holds its code, any span holds its code)."""
    if question.fact is None:
        return None, None, None
    end = question.fact[1] - 1
    code = (end - 4, end)
    name_at = question.fact[0] + len("the code of ")

    def holds(span: Mapping[str, Any], begin: int) -> bool:
        low, high = span.get("char_start"), span.get("char_end")
        return low is not None and high is not None and low <= begin and high >= code[1]

    heaviest = spans[0] if spans else {}
    holds_code = holds(heaviest, code[0])
    return (
        holds_code and int(heaviest["char_start"]) - LEAD_CHARS <= name_at,
        holds_code,
        any(holds(span, code[0]) for span in spans),
    )


def _shares(marks: Iterable[Mark], name: str, tokens: int, hit: Callable[[Mark], bool]) -> Figure:
    marks = list(marks)
    return Figure(name, tokens, sum(hit(mark) for mark in marks), len(marks))


def figures(marks: Sequence[Mark]) -> list[Figure]:
    """All figures of every length, in the order of the lengths. Those of nothing are left out."""
    out: list[Figure] = []
    for tokens in sorted({mark.tokens for mark in marks}):
        here = [mark for mark in marks if mark.tokens == tokens]
        needle = [m for m in here if m.kind is Kind.NEEDLE]
        absent = [m for m in here if m.kind not in ANSWERABLE]
        gated = [m for m in here if m.gated is not None]
        out += [
            _shares(needle, "exact match", tokens, lambda m: m.right),
            _shares(needle, "refused although the fact is there", tokens, lambda m: m.refused),
            _shares(
                (m for m in gated if m.kind is Kind.NEEDLE), "exact match, gate on", tokens,
                lambda m: m.gated == m.expected,
            ),
            _shares(absent, "answered without a fact", tokens, lambda m: not m.refused),
        ]  # fmt: skip
        for kind in (Kind.STRANGER, Kind.NEIGHBOUR, Kind.CODELESS):
            part = [m for m in absent if m.kind is kind]
            name = f"answered without a fact: {kind.value}"
            out.append(_shares(part, name, tokens, lambda m: not m.refused))
        out.append(_shares(
            (m for m in gated if m.kind not in ANSWERABLE), "answered without a fact, gate on",
            tokens, lambda m: m.gated != UNKNOWN,
        ))  # fmt: skip
        told = [m for m in needle if m.cited is not None]
        out += [
            _shares(told, "cited span holds the fact", tokens, lambda m: bool(m.cited)),
            _shares(told, "cited span holds the code", tokens, lambda m: bool(m.cited_code)),
            _shares(told, "any span holds the code", tokens, lambda m: bool(m.named)),
        ]
        many = [m for m in here if m.kind is Kind.MANY]
        for facts in sorted({m.facts for m in many}):
            part = [m for m in many if m.facts == facts]
            out.append(_shares(part, f"exact match, {facts} facts", tokens, lambda m: m.right))
        repeated = [m for m in here if m.kind is Kind.REPEATED]
        out += [
            _shares(repeated, "repeated names, last value", tokens, lambda m: m.right),
            _shares(repeated, "repeated names, an earlier value", tokens, lambda m: m.earlier),
        ]
    return [figure for figure in out if figure.n]


def grid(marks: Sequence[Mark]) -> list[dict[str, Any]]:
    """Exact match by length and depth, of single facts."""
    cells: dict[tuple[int, float], list[Mark]] = {}
    for mark in marks:
        if mark.kind is Kind.NEEDLE and mark.depth is not None:
            cells.setdefault((mark.tokens, mark.depth), []).append(mark)
    return [
        {"tokens": tokens, "depth": depth} | Figure(
            "exact match", tokens, sum(m.right for m in part), len(part)
        ).row()
        for (tokens, depth), part in sorted(cells.items())
    ]  # fmt: skip


def worst_cell(cells: Sequence[Mapping[str, Any]], tokens: int) -> dict[str, Any] | None:
    """Worst depth against the mean of one length."""
    here = [cell for cell in cells if cell["tokens"] == tokens]
    if not here:
        return None
    worst = min(here, key=lambda cell: (cell["share"], cell["depth"]))
    mean = sum(cell["hits"] for cell in here) / sum(cell["n"] for cell in here)
    return {
        "tokens": tokens, "depth": worst["depth"], "worst": worst["share"], "n": worst["n"],
        "mean": round(mean, 4), "below_mean": round(mean - worst["share"], 4),
    }  # fmt: skip
