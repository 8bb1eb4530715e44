"""The 512-entry tokenizer of `ledger` as one Hugging Face `tokenizer.json`.

A regular expression cuts the text into pieces; a BPE model with no merges (`ignore_merges`) looks
the pieces up and falls back to bytes. What the cut guarantees: a digit is one token, a name is one
token per syllable in every context, and the full stop is always alone (it ends an answer).
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from typing import Any, Final

from tokenizers import Tokenizer

from training import documents, filler

SIZE: Final = 512
SPECIALS: Final = ("<|pad|>", "<|bos|>", "<|eos|>")
SYLLABLES: Final = tuple(c + v for c in filler.CONSONANTS for v in filler.VOWELS)
TEMPLATE_WORDS: Final = ("Question: ", "Answer: ", "the ", "code ", "of ", "is ", "what ")
IS: Final = " is "
RUNS: Final = (", ", "\n\n", "    ", "  ", "--", "==", "\n    ", "; ", ': "', '": ')
_NAME: Final = re.compile(r"(?:[bdfgklmnprstvz][aeiou])+")
_VOWELS: Final = "aeiou"


def byte_alphabet() -> list[str]:
    """The printable stand-in of each of the 256 bytes, as every byte-level BPE writes it."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table, extra = [""] * 256, 0
    for byte in range(256):
        if byte in keep:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(256 + extra)
            extra += 1
    return table


def _written(piece: str, table: list[str]) -> str:
    return "".join(table[byte] for byte in piece.encode())


def _corpus(seed: int, size_chars: int) -> str:
    rng = random.Random(f"vocabulary {seed}")
    kinds = (filler.prose, filler.prose, filler.prose, filler.code, filler.lists)
    return "".join(kind(rng, size_chars // len(kinds)) for kind in kinds)


def choose_pieces(count: int, seed: int = 0, size_chars: int = 600_000) -> list[str]:
    """The words (with their trailing space) and letter clusters that save most tokens.

    A cluster must end in a consonant; the cut takes it only where no vowel follows, so it can never
    cut into the syllables of a name.
    """
    text = _corpus(seed, size_chars)
    gains: Counter[str] = Counter()
    for word in re.findall(r"(?<![A-Za-z])([A-Za-z]?[a-z]{1,9}) ", text):
        if not _NAME.fullmatch(word) and word + " " not in TEMPLATE_WORDS:
            saved = len(word) - sum(1 for _ in re.finditer(r"[bdfgklmnprstvz][aeiou]", word))
            gains[word + " "] += saved
    for size in (2, 3, 4):
        for match in re.finditer(rf"(?=([A-Za-z]{{{size}}})(?![aeiou]))", text):
            cluster = match.group(1)
            if cluster[-1].lower() not in _VOWELS and not cluster.isupper():
                gains[cluster] += (size - 1) if size < 4 else 2
    # Clusters overlap each other and the words, so their count overstates what they save.
    scored = {p: g if p.endswith(" ") else g * 0.35 for p, g in gains.items()}
    return sorted(scored, key=lambda piece: (-scored[piece], piece))[:count]


def pattern(words: list[str], clusters: list[str]) -> str:
    """The expression that cuts a text; alternatives are tried in this order at each character."""

    def alternatives(pieces: list[str]) -> str:
        return "|".join(re.escape(p).replace("\\ ", " ").replace("\\\n", "\\n") for p in pieces)

    longest_first = sorted(clusters, key=lambda c: (-len(c), c))
    runs = sorted(RUNS, key=lambda r: (-len(r), r))
    return "|".join(
        (
            documents.UNKNOWN,
            IS,
            rf"(?<![A-Za-z])(?:{alternatives(sorted(words))})",
            alternatives(runs),
            rf"(?:{alternatives(longest_first)})(?![aeiou])",
            "[bdfgklmnprstvz][aeiou]",
            r"[\s\S]",
        )
    )


def build() -> dict[str, Any]:
    """The content of `tokenizer.json`; deterministic."""
    table = byte_alphabet()
    fixed = [*SPECIALS, documents.UNKNOWN]
    free = SIZE - len(fixed) - 256 - len(SYLLABLES) - len(TEMPLATE_WORDS) - 1 - len(RUNS)
    chosen = choose_pieces(free)
    words = [*TEMPLATE_WORDS, *(p for p in chosen if p.endswith(" "))]
    clusters = [p for p in chosen if not p.endswith(" ")]
    pieces = [*(bytes([b]) for b in range(256))]
    vocabulary: dict[str, int] = {name: i for i, name in enumerate(fixed)}
    for piece in pieces:
        vocabulary[table[piece[0]]] = len(vocabulary)
    for text in (*SYLLABLES, *TEMPLATE_WORDS, IS, *RUNS, *chosen):
        vocabulary[_written(text, table)] = len(vocabulary)
    if len(vocabulary) != SIZE:
        raise ValueError(f"the vocabulary has {len(vocabulary)} entries instead of {SIZE}")
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}
            for i, name in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern(words, clusters)},
             "behavior": "Isolated", "invert": False},
            level,
        ]},
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
                  "vocab": vocabulary, "merges": []},
    }  # fmt: skip


def as_json() -> str:
    """`tokenizer.json` as ASCII text."""
    return json.dumps(build(), ensure_ascii=True, indent=None, separators=(",", ":")) + "\n"


def tokenizer() -> Tokenizer:
    """The tokenizer itself, built in memory."""
    return Tokenizer.from_str(as_json())
