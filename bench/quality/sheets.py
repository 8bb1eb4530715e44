"""Documents with facts at chosen depths and the questions about them. Pure, and no torch.

A sheet is one document and its questions. Every name is held out of training by the rule of
`training.documents.held_out`; all filler is `bench.quality.filler`'s. A seed names a sheet for
good: the same text and the same questions everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bench.quality import filler
from penstock.errors import UsageError
from training import documents

DEPTHS = tuple(step / 10 for step in range(11))
"""Of the fact in the document: 0 at its beginning, 1 at its end."""
_QUESTION_TOKENS = 40
"""Room that the question takes behind the document."""


class Kind(StrEnum):
    """What is asked. The last four have no answer in the document."""

    NEEDLE = "needle"
    """One fact, at a known depth."""
    MANY = "many"
    """One of 16, 256 or 1,000 facts."""
    REPEATED = "repeated"
    """A name that has two or three values: the last one counts."""
    STRANGER = "stranger"
    """A random name that the document has not."""
    NEIGHBOUR = "neighbour"
    """A name one syllable or one letter away from a fact's."""
    CODELESS = "codeless"
    """A name that stands in the document without a code ("the code of X was lost")."""


ANSWERABLE = (Kind.NEEDLE, Kind.MANY, Kind.REPEATED)


@dataclass(frozen=True)
class Question:
    """`fact` are the characters [from, to) of its (last) fact in the document, None without one."""

    kind: Kind
    name: str
    expected: str
    depth: float | None = None
    fact: tuple[int, int] | None = None
    earlier: tuple[str, ...] = ()
    """Values that the name had before, of a repeated name."""

    @property
    def text(self) -> str:
        return f"Question: what is the code of {self.name}?"


@dataclass(frozen=True)
class Sheet:
    """One document; `tokens` as asked for, `facts` that it holds."""

    tokens: int
    facts: int
    seed: int
    text: str
    questions: tuple[Question, ...]


def filler_text(rng: random.Random, tokens: int, count: Callable[[str], int]) -> str:
    """Segments of the evaluation's kinds, `tokens` tokens or a little fewer, never more."""
    pieces: list[str] = []
    total = 0
    while total < tokens:
        size = min(rng.randint(300, 6000), 2 * (tokens - total) + 64)
        piece = filler.segment(rng, size)
        cost = count(piece)
        if total + cost > tokens:
            piece = piece[: max(1, len(piece) * (tokens - total) // cost)]
            pieces.append(piece)
            break
        pieces.append(piece)
        total += cost
    return "".join(pieces)


def place(text: str, sentences: Sequence[tuple[float, str]]) -> tuple[str, list[int]]:
    """`text` with each sentence put in at its depth, and the character where each begins.

    Equal depths keep their order. A sentence stands between white space.
    """
    order = sorted(range(len(sentences)), key=lambda number: sentences[number][0])
    parts: list[str] = []
    length, previous = 0, 0
    starts = [0] * len(sentences)
    for number in order:
        depth, sentence = sentences[number]
        at = max(previous, round(depth * len(text)))
        while at < len(text) and not text[at - 1 : at].isspace():
            at += 1
        before = text[previous:at]
        lead = "" if not (before or parts) or (before and before[-1].isspace()) else "\n"
        parts += [before, lead, sentence, "\n"]
        starts[number] = length + len(before) + len(lead)
        length += len(before) + len(lead) + len(sentence) + 1
        previous = at
    parts.append(text[previous:])
    return "".join(parts), starts


def _codes(rng: random.Random, count: int) -> list[str]:
    return [f"{rng.randrange(10_000):04d}" for _ in range(count)]


def _absent(
    rng: random.Random, known: Sequence[str], each: int, codeless: Sequence[str]
) -> list[Question]:
    """`each` questions of every kind that has no answer."""
    taken = {*known, *codeless}
    questions = [Question(Kind.CODELESS, name, documents.UNKNOWN) for name in codeless]
    for kind in (Kind.STRANGER, Kind.NEIGHBOUR):
        for _ in range(each):
            while True:
                name = (
                    documents.make_name(rng)
                    if kind is Kind.STRANGER
                    else documents.neighbour(rng, rng.choice(known))
                )
                if name not in taken and documents.held_out(name):
                    break
            taken.add(name)
            questions.append(Question(kind, name, documents.UNKNOWN))
    return questions


def needle_sheet(tokens: int, seed: int, count: Callable[[str], int], *, absent: int = 4) -> Sheet:
    """One fact at each of `DEPTHS`, `absent` questions of each kind without an answer."""
    rng = random.Random(f"evaluation needle {tokens} {seed}")
    names = documents.draw_names(rng, len(DEPTHS) + absent, accept=documents.held_out)
    known, codeless = names[: len(DEPTHS)], names[len(DEPTHS) :]
    codes = dict(zip(known, _codes(rng, len(known)), strict=True))
    rng.shuffle(known)
    sentences = [
        (depth, documents.FACT.format(name=name, code=codes[name]))
        for depth, name in zip(DEPTHS, known, strict=True)
    ]
    without = [text for text in documents.NEAR_MISSES if "code of {name}" in text]
    sentences += [
        (rng.random(), rng.choice(without).format(
            name=name, code=_codes(rng, 1)[0], noun=rng.choice(documents.NOUNS)))
        for name in codeless
    ]  # fmt: skip
    sentences += [(rng.random(), documents.near_miss(rng, rng.choice(known))) for _ in range(4)]
    text, starts = _document(rng, tokens, sentences, count)
    questions = [
        Question(Kind.NEEDLE, name, codes[name], depth, (at, at + len(sentence)))
        for (depth, sentence), name, at in zip(
            sentences[: len(known)], known, starts[: len(known)], strict=True
        )
    ]
    questions += _absent(rng, known, absent, codeless)
    rng.shuffle(questions)
    return Sheet(tokens, len(known), seed, text, tuple(questions))


def many_sheet(
    tokens: int, seed: int, count: Callable[[str], int], *, facts: int, asked: int = 25
) -> Sheet:
    """`facts` facts at random depths; `asked` of them are asked for."""
    rng = random.Random(f"evaluation many {tokens} {facts} {seed}")
    names = documents.draw_names(rng, facts, accept=documents.held_out)
    codes = dict(zip(names, _codes(rng, facts), strict=True))
    depths = [rng.random() for _ in names]
    sentences = [
        (depth, documents.FACT.format(name=name, code=codes[name]))
        for depth, name in zip(depths, names, strict=True)
    ]
    text, starts = _document(rng, tokens, sentences, count)
    picked = rng.sample(range(facts), min(asked, facts))
    questions = [
        Question(Kind.MANY, names[i], codes[names[i]], depths[i],
                 (starts[i], starts[i] + len(sentences[i][1])))
        for i in picked
    ]  # fmt: skip
    return Sheet(tokens, facts, seed, text, tuple(questions))


def repeated_sheet(
    tokens: int, seed: int, count: Callable[[str], int], *, names: int = 12
) -> Sheet:
    """`names` names, each with two or three different values at random depths."""
    rng = random.Random(f"evaluation repeated {tokens} {seed}")
    subjects = documents.draw_names(rng, names, accept=documents.held_out)
    sentences: list[tuple[float, str]] = []
    values: dict[str, list[str]] = {}
    last: dict[str, int] = {}
    for name in subjects:
        depths = sorted(rng.random() for _ in range(rng.choice((2, 2, 3))))
        codes: list[str] = []
        while len(codes) < len(depths):
            code = _codes(rng, 1)[0]
            if code not in codes:
                codes.append(code)
        values[name] = codes
        for depth, code in zip(depths, codes, strict=True):
            last[name] = len(sentences)
            sentences.append((depth, documents.FACT.format(name=name, code=code)))
    text, starts = _document(rng, tokens, sentences, count)
    questions = []
    for name in subjects:
        number = last[name]
        begin = starts[number]
        questions.append(Question(
            Kind.REPEATED, name, values[name][-1], sentences[number][0],
            (begin, begin + len(sentences[number][1])), tuple(values[name][:-1]),
        ))  # fmt: skip
    return Sheet(tokens, len(sentences), seed, text, tuple(questions))


def _document(
    rng: random.Random,
    tokens: int,
    sentences: Sequence[tuple[float, str]],
    count: Callable[[str], int],
) -> tuple[str, list[int]]:
    """The sentences in as much filler as makes `tokens` tokens with the question."""
    spent = count("\n".join(sentence for _, sentence in sentences)) + _QUESTION_TOKENS
    room = tokens - spent
    if room < len(sentences):
        raise UsageError(
            f"{len(sentences)} sentences do not fit into a document of {tokens} tokens; ask for a "
            "greater length"
        )
    return place(filler_text(rng, room, count), sentences)


def fits(tokens: int, facts: int) -> bool:
    """Whether `facts` facts leave half of the document for other text."""
    return 15 * facts <= tokens // 2


SUITES = ("needle", "multi-needle", "unanswerable", "evidence", "all")
FACTS = (16, 256, 1000)


def sheets(
    suite: str, tokens: int, questions: int, seed: int, count: Callable[[str], int]
) -> Iterator[Sheet]:
    """The sheets of one length, with at least `questions` answerable questions for each figure."""
    parts = {
        "needle": {"needle"},
        "multi-needle": {"many", "repeated"},
        "unanswerable": {"absent"},
        "evidence": {"needle"},
        "all": {"needle", "absent", "many", "repeated"},
    }[suite]
    if parts & {"needle", "absent"}:
        per = len(DEPTHS) if "needle" in parts else 12
        for number in range(-(-questions // per)):
            whole = needle_sheet(tokens, seed + number, count)
            kept = [
                q for q in whole.questions
                if ("needle" if q.kind is Kind.NEEDLE else "absent") in parts
            ]  # fmt: skip
            yield Sheet(whole.tokens, whole.facts, whole.seed, whole.text, tuple(kept))
    if "many" in parts:
        for facts in FACTS:
            if fits(tokens, facts):
                asked = min(25, facts)
                for number in range(-(-questions // asked)):
                    yield many_sheet(tokens, seed + number, count, facts=facts, asked=asked)
    if "repeated" in parts:
        for number in range(-(-questions // 12)):
            yield repeated_sheet(tokens, seed + number, count)
