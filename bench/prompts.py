"""Prompts of a given length that no cache has seen."""

from __future__ import annotations

import random

_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def prompt(chars: int, *, seed: int) -> str:
    """At least `chars` characters of words; another seed differs from the first word on."""
    rng = random.Random(seed)
    words: list[str] = []
    length = 0
    while length < chars:
        words.append("".join(rng.choices(_SYLLABLES, k=rng.randint(2, 4))))
        length += len(words[-1]) + 1
    return " ".join(words)
