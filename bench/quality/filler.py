"""Text that evaluation hides its facts in. Training never sees any of it.

Training's filler (`training/filler.py`) is made of its own word list and its own templates; this
one shares neither: other words, other kinds of text (letters, recipes, headers of C, games of
chess, mail, stock lists, minutes, verse). Deterministic by the given `random.Random`; no file of
the machine is read, so that a seed is the same document everywhere.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

_WORDS_TEXT: Final = """
ancient apple arrow autumn basket beach bell bird blanket blossom bottle branch bread bridge bright
brother bucket butter candle carpet castle cattle chair cheese cherry chimney circle cloud coffee
copper corner cotton cousin cradle crane cricket curtain daisy dance desert dinner dragon eagle
evening fabric feather fence fiddle finger flame flour forest fountain fox frost fruit giant ginger
glass goat golden grain grass hammer harbour harvest hazel heron honey horse island ivory jacket
jewel juniper kettle kitchen kitten ladder lantern leather lemon lighthouse linen lizard maple
marble meadow melon mirror moss mountain mushroom needle nephew oak oats olive onion orchard otter
oyster paddle palace parsley peach pebble pepper pigeon pillow planet plough pocket pond poppy
potato pottery pumpkin quarry quilt rabbit raven ribbon roof rope saddle salmon sandal scarf
seed shell shepherd silk silver sister slate snow soap sparrow spoon spruce squirrel stable statue
stone storm straw sugar summer swallow tailor tea thistle thunder timber tower trumpet tulip
turnip twig uncle valley velvet village vinegar violin wagon walnut waterfall weaver wheat whistle
willow window winter wolf wooden wool yarn zinc
"""
WORDS: Final = _WORDS_TEXT.split()
_VERBS: Final = (
    "carried",
    "folded",
    "painted",
    "mended",
    "borrowed",
    "counted",
    "polished",
    "planted",
    "sold",
    "hid",
)
_PLACES: Final = (
    "Ashford",
    "Brinley",
    "Corwen",
    "Dunmore",
    "Elgin",
    "Farlow",
    "Glenrothes",
    "Holt",
    "Ingleby",
    "Kelso",
)
_PEOPLE: Final = (
    "Agnes",
    "Bernard",
    "Clara",
    "Dietrich",
    "Edith",
    "Fergus",
    "Greta",
    "Harold",
    "Imogen",
    "Jasper",
)


def _word(rng: random.Random) -> str:
    return rng.choice(WORDS)


def _repeat(piece: Callable[[random.Random], str], rng: random.Random, size_chars: int) -> str:
    parts: list[str] = []
    length = 0
    while length < size_chars:
        parts.append(piece(rng))
        length += len(parts[-1])
    return "".join(parts)


def letters(rng: random.Random) -> str:
    """A sentence of a letter."""
    a, b, c = _word(rng), _word(rng), _word(rng)
    who, where = rng.choice(_PEOPLE), rng.choice(_PLACES)
    return rng.choice((
        f"{who} {rng.choice(_VERBS)} the {a} beside the {b} at {where}. ",
        f"Dear {who}, the {a} arrived yesterday, wrapped in {b}; {c} followed by rail.\n\n",
        f'"Never {rng.choice(_VERBS)} a {a} indoors," whispered {who}, holding her {b}. ',
        f"Between {where} and the {a} stood an empty {b}, green with {c}. ",
        f"My {a} ached; nevertheless {who} insisted upon {b} soup.\n",
    ))  # fmt: skip


def recipes(rng: random.Random) -> str:
    """A line of a recipe."""
    a, b = _word(rng), _word(rng)
    return rng.choice((
        f"- {rng.randint(1, 950)} g {a}, finely chopped\n",
        f"Simmer {rng.randint(5, 90)} minutes, then fold in {a} together with {b}.\n",
        f"## {a.title()} with {b}\n\nServes {rng.randint(2, 9)}; oven {rng.randint(140, 240)} C.\n",
        f"Whisk {a}, sprinkle {b}, rest overnight.\n",
    ))  # fmt: skip


def header(rng: random.Random) -> str:
    """Lines of a C header."""
    a, b = _word(rng), _word(rng)
    return rng.choice((
        f"#define {a.upper()}_{b.upper()} 0x{rng.getrandbits(24):06x}u\n",
        f"extern int {a}_{b}(struct {a} *restrict {b}, size_t n{rng.randint(1, 9)});\n",
        f"typedef struct {a} {{ uint32_t {b}; const char *tag; }} {a}_t;\n",
        f"#ifndef {a.upper()}_H\n#include <{b}/{a}.h>\n#endif /* {a.upper()}_H */\n",
        f"/* {a}: callers hold the {b} lock. */\n",
    ))  # fmt: skip


def chess(rng: random.Random) -> str:
    """Moves of a game that nobody played."""
    number = rng.randint(1, 60)
    moves = [f"{rng.choice('NBRQK')}{rng.choice('abcdefgh')}{rng.randint(1, 8)}" for _ in range(2)]
    return f"{number}. {moves[0]} {moves[1]}{rng.choice(('+', '', '', '!?'))} "


def mail(rng: random.Random) -> str:
    """Headers and quoted lines of mail."""
    a, b = _word(rng), _word(rng)
    who = rng.choice(_PEOPLE)
    return rng.choice((
        f"From: {who} <{who.lower()}@{a}.example>\nSubject: Re: {b}\n",
        f"Message-Id: <{rng.getrandbits(48):012x}@{a}.example>\n",
        f"> {a} {b}?\nYes: {rng.choice(_PLACES)}, platform {rng.randint(1, 24)}.\n",
    ))  # fmt: skip


def stock(rng: random.Random) -> str:
    """Rows of a stock list: many numbers of four digits."""
    return (
        f"{_word(rng)};{_word(rng)};{rng.randint(0, 9999):04d};{rng.uniform(0, 99):.2f};"
        f"{rng.choice(_PLACES)}\n"
    )


def minutes(rng: random.Random) -> str:
    """Minutes of a meeting."""
    who, a, b = rng.choice(_PEOPLE), _word(rng), _word(rng)
    return (
        f"[{rng.randint(8, 18):02d}:{rng.randint(0, 59):02d}] {who}: {a} budget "
        f"{rng.choice(('approved', 'postponed', 'rejected'))}, see annex {rng.randint(1, 40)} "
        f"({b}).\n"
    )


def verse(rng: random.Random) -> str:
    """Two lines of verse."""
    return f"O {_word(rng)}, {_word(rng)} {_word(rng)},\n  thy {_word(rng)} sleeps;\n"


def markup(rng: random.Random) -> str:
    """A piece of XML."""
    a, b = _word(rng), _word(rng)
    return f'<{a} id="{a[0]}{rng.randint(1, 9999)}" {b}="{rng.randint(0, 99)}%">{b}</{a}>\n'


KINDS: Final[tuple[tuple[Callable[[random.Random], str], float], ...]] = (
    (letters, 4.0), (recipes, 1.5), (header, 2.0), (chess, 0.7), (mail, 1.0), (stock, 1.0),
    (minutes, 1.5), (verse, 0.8), (markup, 1.0),
)  # fmt: skip


def segment(rng: random.Random, size_chars: int) -> str:
    """At least `size_chars` characters of one kind, drawn by weight."""
    kinds, weights = zip(*KINDS, strict=True)
    piece: Callable[[random.Random], str] = rng.choices(kinds, weights)[0]
    return _repeat(piece, rng, size_chars)
