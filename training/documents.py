"""Documents with facts, and questions about them (the contract of `ledger`).

A fact is the sentence `the code of NAME is DDDD.`; NAME is three to five consonant-vowel
syllables, DDDD four digits. Pure Python, no torch: `penstock demo` uses this module as well.
Names whose sha256 has a first byte divisible by ten are held out of all training.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from training import filler

UNKNOWN: Final = "UNKNOWN"
QUESTION: Final = "Question: what is the code of {name}?\nAnswer: the code of {name} is "
RESTATED: Final = "Answer: the code of {name} is "
FACT: Final = "the code of {name} is {code}."
_NOUNS_TEXT: Final = """
door room gate key seat box map ship lamp hall tower street garden order parcel letter ticket
number price weight height size length age rank colour price date name
"""
NOUNS: Final = _NOUNS_TEXT.split()

# Sentences that look like a fact and are none. {name} a name, {code} four digits, {noun} a noun.
NEAR_MISSES: Final = (
    "{name} is {code}.",
    "the {noun} of {name} is {code}.",
    "the {noun} of {name} was {code}.",
    "the code of {name} was lost.",
    "the code of {name} is secret.",
    "the code of {name} is not known.",
    "the code of the {noun} is {code}.",
    "the code is {code}.",
    "nobody knows the code of {name}.",
    "ask about the code of {name} at {noun} {code}.",
    "{name} has the {noun} {code}.",
    "{noun} {code} belongs to {name}.",
    "the code of {name} has four digits.",
    "{name} keeps the code of the {noun}.",
    "a copy of the code of {name} lies in {noun} {code}.",
    "the {noun} {name} {code}.",
)


@dataclass(frozen=True)
class Document:
    """A text and its facts; `digits_at` is the character offset of each code's first digit."""

    text: str
    facts: Mapping[str, str]
    digits_at: Mapping[str, int]


@dataclass(frozen=True)
class Question:
    """One question: the name it asks about, the user's text, and the right answer."""

    name: str
    text: str
    answer: str


def held_out(name: str) -> bool:
    """Whether a name belongs to evaluation and must never be trained on."""
    return hashlib.sha256(name.encode()).digest()[0] % 10 == 0


def make_name(rng: random.Random, accept: Callable[[str], bool] = lambda name: True) -> str:
    """A name of three to five syllables that `accept` takes."""
    while True:
        name = filler.syllables(rng, rng.randint(3, 5))
        if accept(name):
            return name


def neighbour(rng: random.Random, name: str) -> str:
    """A name that differs from `name` in one syllable, or has one syllable more or less."""
    parts = [name[i : i + 2] for i in range(0, len(name), 2)]
    pick, at = rng.random(), rng.randrange(len(parts))
    if pick < 0.15 and len(parts) > 3:
        del parts[at]
    elif pick < 0.3 and len(parts) < 5:
        parts.insert(at, filler.syllables(rng, 1))
    elif pick < 0.65:
        parts[at] = filler.syllables(rng, 1)
    elif pick < 0.85:  # one letter only: the hardest neighbour
        consonant, vowel = parts[at][0], parts[at][1]
        if rng.random() < 0.5:
            parts[at] = rng.choice(filler.CONSONANTS) + vowel
        else:
            parts[at] = consonant + rng.choice(filler.VOWELS)
    else:
        other = rng.randrange(len(parts))
        parts[at], parts[other] = parts[other], parts[at]
    return "".join(parts)


def draw_names(
    rng: random.Random,
    count: int,
    *,
    near: float = 0.3,
    accept: Callable[[str], bool] = lambda name: True,
    taken: Iterable[str] = (),
) -> list[str]:
    """`count` different names not in `taken`; a share `near` are neighbours of earlier ones."""
    names: list[str] = []
    seen = set(taken)
    # Sorted: the order of a set of strings is another one in every process.
    pool = sorted(seen)
    while len(names) < count:
        if pool and rng.random() < near:
            name = neighbour(rng, rng.choice(pool))
        else:
            name = make_name(rng)
        if name in seen or not accept(name):
            continue
        seen.add(name)
        names.append(name)
        pool.append(name)
    return names


def near_miss(rng: random.Random, name: str) -> str:
    """A sentence about `name` that gives no code of it."""
    return rng.choice(NEAR_MISSES).format(
        name=name, code=f"{rng.randrange(10000):04d}", noun=rng.choice(NOUNS)
    )


def weave(
    rng: random.Random, text: str, facts: Mapping[str, str], others: Iterable[str], start: int = 0
) -> Document:
    """Put facts and other sentences into `text` at random white space behind character `start`."""
    sentences: list[tuple[str | None, str]] = [
        (name, FACT.format(name=name, code=code)) for name, code in facts.items()
    ]
    sentences += [(None, sentence) for sentence in others]
    rng.shuffle(sentences)
    places = []
    for _ in sentences:
        at = rng.randint(min(start, len(text)), len(text))
        while at < len(text) and not text[at - 1 : at].isspace():
            at += 1
        places.append(at)
    parts: list[str] = []
    length, previous = 0, 0
    digits_at = {}
    for at, (name, sentence) in zip(sorted(places), sentences, strict=True):
        before = text[previous:at]
        lead = "" if not before or before[-1].isspace() else rng.choice((" ", "\n", ". "))
        parts += [before, lead, sentence, rng.choice((" ", " ", "\n"))]
        if name is not None:
            digits_at[name] = length + len(before) + len(lead) + len(sentence) - 5
        length += len(before) + len(lead) + len(sentence) + 1
        previous = at
    parts.append(text[previous:])
    return Document("".join(parts), dict(facts), digits_at)


def make_document(
    seed: int,
    *,
    tokens_at_least: int,
    facts: int,
    count: Callable[[str], int],
    accept: Callable[[str], bool] = lambda name: True,
    segment: Callable[[random.Random, int], str] = filler.segment,
) -> Document:
    """A document with `facts` facts and at least `tokens_at_least` tokens, as `count` measures."""
    rng = random.Random(f"document {seed}")
    names = draw_names(rng, facts, accept=accept)
    codes = {name: f"{rng.randrange(10000):04d}" for name in names}
    others = [
        near_miss(rng, rng.choice(names) if names and rng.random() < 0.4 else make_name(rng))
        for _ in range(facts // 3)
    ]
    pieces: list[str] = []
    total = 0
    while total < tokens_at_least + 16:
        long = tokens_at_least >= 8192
        size = rng.randint(800, 12000) if long else rng.randint(100, 1000)
        pieces.append(segment(rng, size))
        total += count(pieces[-1])
    return weave(rng, "".join(pieces), codes, others)


def make_questions(
    document: Document,
    seed: int,
    answerable: int,
    unanswerable: int,
    accept: Callable[[str], bool] = lambda name: True,
) -> list[Question]:
    """Questions in random order; half of the unanswerable ones are neighbours of a fact's name."""
    rng = random.Random(f"questions {seed}")
    known = [name for name in document.facts if accept(name)]
    asked = rng.sample(known, answerable)
    absent = draw_names(rng, unanswerable, near=0.0, accept=accept, taken=document.facts)
    for i in range(len(absent)):
        while known and rng.random() < 0.55:
            near = neighbour(rng, rng.choice(known))
            if near not in document.facts and near not in absent and accept(near):
                absent[i] = near
                break
    questions = [(name, document.facts[name]) for name in asked]
    questions += [(name, UNKNOWN) for name in absent]
    rng.shuffle(questions)
    return [Question(n, f"Question: what is the code of {n}?", a) for n, a in questions]
