"""Synthetic filler text of many kinds: everything the model reads besides facts.

Pure Python and deterministic by the given `random.Random`: no file of the machine is read, so
training is the same everywhere. A kind is a function `(rng, size_chars) -> str` that returns
roughly `size_chars` characters.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable
from typing import Final

CONSONANTS: Final = "bdfgklmnprstvz"
VOWELS: Final = "aeiou"

_WORDS_TEXT: Final = """
the of and to in a is that for it was on are as with be at by this from or have an they which
one you were all her she there would their we him been has when who will no more if out so up
said what its about than into them can only other time new some could these two may first then
do any like my now over such our man me even most made after also did many off before must well
back through years where much your way down should because long each just state those people too
mr how little good world make very year still see own work men day get here old between both
life being under three never know same last another while us might great go come since against
right came take used himself few house use place during high without again home around small
however found mrs part school thought went say general once upon every does got united left
number course war until always away something fact water though less public put think almost
hand enough far took head yet government system better set told nothing night end why called
eyes find going look asked later knew point next program city business give group toward young
let days room president side social given present several order national second possible rather
per face among form important often things looked early white case large big need four within
felt along children saw best church ever least power development light thing seemed family
interest want members mind area country others turned although done open service certain kind
different began door thus help sense means whole matter perhaps itself york times law human line
above name example action company local show whether five history gave today either act feet
across taken past quite anything seen having death body week money field word car level
information shall license software copyright notice conditions agreement warranty party provided
distribution source table value return function class object string module default option error
file data list index user memory server request response process
"""
WORDS: Final = _WORDS_TEXT.split()

_SUBJECTS_TEXT: Final = """
engineer captain gardener committee river machine teacher merchant court archive
"""
_SUBJECTS: Final = _SUBJECTS_TEXT.split()
_EXTRA_ENDINGS = ("ing", "ed", "s", "ly", "er", "ment", "tion", "ness", "al", "ous")
_KEYWORDS_TEXT: Final = """
if for while return import from class def with raise try except assert yield lambda
"""
_KEYWORDS: Final = _KEYWORDS_TEXT.split()
_LEVELS = ("INFO", "WARN", "ERROR", "DEBUG", "TRACE", "NOTICE")
_LEGAL = (
    "Subject to the terms and conditions of this {a}, each {b} hereby grants to the {c} a "
    "non-exclusive, worldwide {a} to use, copy and distribute the {b}. ",
    "IN NO EVENT SHALL THE {A} BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER {B} "
    "ARISING FROM THE {C}. ",
    "{n}.{m} The {a} shall provide the {b} with written notice within {n} days of the {c}. ",
    '({l}) "{A}" means any {b} that is included in or attached to the {c}; and ',
    "Provided that the {a} has not been modified, the {b} may charge a fee for the {c}, ",
)


def syllables(rng: random.Random, count: int) -> str:
    """A pronounceable lower-case word of `count` consonant-vowel syllables."""
    return "".join(rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(count))


def _invented(rng: random.Random) -> str:
    """A word of random letters, with the shape of a word of some unknown language."""
    letters = string.ascii_lowercase
    parts = [
        rng.choice(("", rng.choice(letters)))
        + rng.choice(VOWELS + "y")
        + rng.choice(("", rng.choice(letters)))
        for _ in range(rng.randint(1, 4))
    ]
    return "".join(parts)


def _word(rng: random.Random) -> str:
    """Common words often, rare ones sometimes (the head of the list is more frequent)."""
    pick = rng.random()
    if pick < 0.45:
        return WORDS[int(len(WORDS) * rng.random() ** 3)]
    if pick < 0.85:
        return rng.choice(WORDS)
    if pick < 0.92:
        return rng.choice(WORDS) + rng.choice(_EXTRA_ENDINGS)
    return _invented(rng)


def _identifier(rng: random.Random) -> str:
    parts = [_word(rng) for _ in range(rng.randint(1, 3))]
    style = rng.random()
    if style < 0.5:
        return "_".join(parts)
    if style < 0.7:
        return parts[0] + "".join(p.title() for p in parts[1:])
    if style < 0.8:
        return "_".join(parts).upper()
    return rng.choice(string.ascii_lowercase) + str(rng.randint(0, 99))


def _repeat(piece: Callable[[random.Random], str], rng: random.Random, size_chars: int) -> str:
    out: list[str] = []
    length = 0
    while length < size_chars:
        out.append(piece(rng))
        length += len(out[-1])
    return "".join(out)


def prose(rng: random.Random, size_chars: int) -> str:
    """Sentences of English-like words with punctuation and paragraphs."""
    width = rng.choice((0, 0, 60, 76, 90))

    def sentence(rng: random.Random) -> str:
        words = [_word(rng) for _ in range(rng.randint(3, 22))]
        if rng.random() < 0.3:
            words.insert(rng.randrange(len(words)), rng.choice(_SUBJECTS))
        if rng.random() < 0.15:
            words.insert(rng.randrange(len(words)), str(rng.randint(0, 3000)))
        if len(words) > 6 and rng.random() < 0.5:
            words[len(words) // 2] += rng.choice((",", ",", ";", ":", " -"))
        if rng.random() < 0.85:
            words[0] = words[0].capitalize()
        end = rng.choice((". ", ". ", ". ", ". ", "? ", "! ", ".\n", ".\n\n", '." '))
        return " ".join(words) + end

    text = _repeat(sentence, rng, size_chars)
    if not width:
        return text
    lines, line = [], ""
    for word in text.split(" "):
        if len(line) + len(word) > width:
            lines.append(line)
            line = ""
        line += word + " "
    return "\n".join([*lines, line])


def invented(rng: random.Random, size_chars: int) -> str:
    """A language made up for this segment: a small random lexicon, random punctuation."""
    lexicon = [_invented(rng) for _ in range(rng.randint(10, 200))]

    def phrase(rng: random.Random) -> str:
        words = rng.choices(lexicon, k=rng.randint(2, 14))
        return " ".join(words) + rng.choice((". ", ", ", "\n", "; ", "! "))

    return _repeat(phrase, rng, size_chars)


def code(rng: random.Random, size_chars: int) -> str:
    """Lines that look like a programming language."""
    braces = rng.random() < 0.4

    def line(rng: random.Random) -> str:
        indent = " " * (4 * rng.randint(0, 4))
        pick = rng.randrange(9)
        a, b, c = _identifier(rng), _identifier(rng), _identifier(rng)
        end = ";" if braces else ""
        if pick == 0:
            return (
                f"{indent}def {a}(self, {b}, {c}=None):\n"
                if not braces
                else f"{indent}int {a}(const char *{b}) {{\n"
            )
        if pick == 1:
            return f"{indent}{rng.choice(_KEYWORDS)} {a}.{b}({c}, {rng.randint(0, 9999)}){end}\n"
        if pick == 2:
            return f'{indent}{a} = "{_word(rng)} {_word(rng)}"{end}\n'
        if pick == 3:
            return f"{indent}{'//' if braces else '#'} {' '.join(_word(rng) for _ in range(6))}\n"
        if pick == 4:
            return f"{indent}{a}[{rng.randint(0, 999)}] = {b} + {rng.randint(0, 9999)}{end}\n"
        if pick == 5:
            return f"{indent}#define {a.upper()} 0x{rng.getrandbits(rng.choice((8, 16, 32))):x}\n"
        if pick == 6:
            return "\n" if rng.random() < 0.7 else f"{indent}}}\n"
        if pick == 7:
            return f"{indent}if {a} == {b} and not {c}.{_word(rng)}:\n"
        return f"{indent}self.{a} = {b}({c}){end}\n"

    return _repeat(line, rng, size_chars)


def logs(rng: random.Random, size_chars: int) -> str:
    """Lines of a log with times, levels, identifiers and numbers."""
    style = rng.randrange(4)

    def line(rng: random.Random) -> str:
        stamp = f"{rng.randint(1990, 2035)}-{rng.randint(1, 12):02d}-{rng.randint(1, 28):02d}"
        clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}:{rng.randint(0, 59):02d}"
        if style == 0:
            head = f"{stamp} {clock} {rng.choice(_LEVELS)} {_identifier(rng)}:"
            return f"{head} {_word(rng)} {_word(rng)} {rng.randint(0, 9999)}\n"
        if style == 1:
            head = f"[{clock}.{rng.randint(0, 999):03d}] pid={rng.randint(1, 65535)}"
            return f"{head} {_word(rng)}={rng.randint(0, 9999)} {_word(rng)}=ok\n"
        if style == 2:
            host = ".".join(str(rng.randint(0, 255)) for _ in range(4))
            path = f"/{_word(rng)}/{rng.randint(0, 9999)}"
            status = f"{rng.choice((200, 404, 500))} {rng.randint(0, 99999)}"
            return f'{host} - - [{stamp}:{clock}] "GET {path} HTTP/1.1" {status}\n'
        level = rng.choice(_LEVELS).lower()
        return f"{level}\t{clock}\t{_identifier(rng)}\t{rng.getrandbits(48):012x}\n"

    return _repeat(line, rng, size_chars)


def tables(rng: random.Random, size_chars: int) -> str:
    """Rows of comma, bar or tab separated cells."""
    separator = rng.choice((",", ", ", " | ", "\t", ";"))
    kinds = [rng.randrange(5) for _ in range(rng.randint(3, 8))]

    def cell(rng: random.Random, kind: int) -> str:
        if kind == 0:
            return str(rng.randint(0, 9999))
        if kind == 1:
            return f"{rng.random() * 1000:.{rng.randint(1, 3)}f}"
        if kind == 2:
            return _word(rng)
        if kind == 3:
            return syllables(rng, rng.randint(2, 5))
        return f"{rng.randint(1000, 9999)}"

    return _repeat(
        lambda r: separator.join(cell(r, kind) for kind in kinds) + "\n", rng, size_chars
    )


def lists(rng: random.Random, size_chars: int) -> str:
    """Markdown-like headings, bullets, JSON-like and key-value lines."""

    def line(rng: random.Random) -> str:
        pick = rng.randrange(7)
        text = " ".join(_word(rng) for _ in range(rng.randint(1, 8)))
        if pick == 0:
            return f"\n{'#' * rng.randint(1, 4)} {text.title()}\n\n"
        if pick == 1:
            return f"- {text}\n"
        if pick == 2:
            return f"{rng.randint(1, 40)}. {text.capitalize()}.\n"
        if pick == 3:
            key = _identifier(rng)
            value = rng.choice((str(rng.randint(0, 9999)), "true", "null"))
            return f'  "{key}": {value},\n'
        if pick == 4:
            return f"{_identifier(rng)} = {text}\n"
        if pick == 5:
            return (
                rng.choice(("---", "====", "* * *", "......", "    ")) * rng.randint(1, 12) + "\n"
            )
        return f'<{_word(rng)} {_word(rng)}="{rng.randint(0, 99)}">{text}</{_word(rng)}>\n'

    return _repeat(line, rng, size_chars)


def legal(rng: random.Random, size_chars: int) -> str:
    """Clauses of contracts and licences."""

    def clause(rng: random.Random) -> str:
        a, b, c = _word(rng), _word(rng), _word(rng)
        return rng.choice(_LEGAL).format(
            a=a,
            b=b,
            c=c,
            A=a.upper(),
            B=b.upper(),
            C=c.upper(),
            n=rng.randint(1, 30),
            m=rng.randint(1, 9),
            l=rng.choice(string.ascii_lowercase),
        ) + ("\n" if rng.random() < 0.2 else "")

    return _repeat(clause, rng, size_chars)


def digits(rng: random.Random, size_chars: int) -> str:
    """Rows of numbers; many have exactly four digits, like a code."""
    width = rng.choice((1, 2, 3, 4, 4, 4, 5, 8, 12))
    separator = rng.choice((" ", " ", ", ", "\n", "-", "."))
    return _repeat(lambda r: f"{r.randrange(10**width):0{width}d}{separator}", rng, size_chars)


def identifiers(rng: random.Random, size_chars: int) -> str:
    """Random identifiers, hexadecimal and base-64 words."""

    def word(rng: random.Random) -> str:
        pick = rng.random()
        if pick < 0.3:
            return f"{rng.getrandbits(64):x} "
        if pick < 0.6:
            alphabet = string.ascii_letters + string.digits + "+/"
            return "".join(rng.choices(alphabet, k=rng.randint(4, 40))) + rng.choice(
                ("= ", "\n", " ")
            )
        return _identifier(rng) + rng.choice((" ", "\n", ".", "/", "->"))

    return _repeat(word, rng, size_chars)


def noise(rng: random.Random, size_chars: int) -> str:
    """Random characters: printable ASCII, control characters or other scripts."""
    pick = rng.random()
    if pick < 0.4:
        return "".join(rng.choices(string.printable, k=size_chars))
    if pick < 0.5:
        return "".join(chr(rng.randrange(1, 256)) for _ in range(size_chars // 2))
    start = rng.choice((0xC0, 0x100, 0x391, 0x410, 0x5D0, 0x627, 0x905, 0x3041, 0x4E00, 0x1F600))
    letters = [chr(start + i) for i in range(rng.randint(8, 60))] + [" ", " ", " ", ", ", ". "]
    return "".join(rng.choices(letters, k=size_chars // 3))


def namelike(rng: random.Random, size_chars: int) -> str:
    """Prose that speaks of syllable words and numbers without giving any code."""

    def phrase(rng: random.Random) -> str:
        name = syllables(rng, rng.randint(2, 5))
        return rng.choice(
            (
                f"{name} {_word(rng)} {_word(rng)} {rng.randint(0, 9999)}. ",
                f"{_word(rng)} {_word(rng)} {name}, ",
                f"{name} and {syllables(rng, rng.randint(2, 5))} {_word(rng)} {_word(rng)}. ",
                f"{name}: {rng.randint(1000, 9999)}\n",
                f"{_word(rng)} of {name} is {_word(rng)}. ",
            )
        )

    return _repeat(phrase, rng, size_chars)


KINDS: Final[tuple[tuple[Callable[[random.Random, int], str], float], ...]] = (
    (prose, 5.0), (invented, 1.5), (code, 2.5), (logs, 1.5), (tables, 1.0), (lists, 1.5),
    (legal, 1.5), (digits, 0.5), (identifiers, 0.7), (noise, 0.4), (namelike, 0.6),
)  # fmt: skip


def segment(rng: random.Random, size_chars: int) -> str:
    """One segment of a kind drawn by weight, about `size_chars` characters."""
    kinds, weights = zip(*KINDS, strict=True)
    kind: Callable[[random.Random, int], str] = rng.choices(kinds, weights)[0]
    return kind(rng, size_chars)
