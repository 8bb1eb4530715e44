"""Text to token ids and back, for any length of text, without torch.

User text is never allowed to form control tokens: what looks like one is encoded as plain text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from penstock import folder as model_files
from penstock.errors import InvalidRequestError, ModelLoadError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as _Library

_WINDOW_CHARS = 1 << 16
_OVERLAP_CHARS = 1 << 12
_AGREE_TOKENS = 64
_BATCH_WINDOWS = 8
ANSWER_MARKS = ("<think>", "</think>", "\uff5cDSML\uff5c")
"""Control tokens that give an answer its structure. Decoded text always shows them: without them
nobody could tell reasoning from answer, whatever flag the tokenizer file gives them.
"""


class Tokenizer(Protocol):
    """All calls may come from any thread; `encode` of long text takes seconds (call it in one)."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def eos_ids(self) -> frozenset[int]: ...

    @property
    def control_ids(self) -> frozenset[int]:
        """Tokens that no text is ever encoded to."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; control tokens in it are plain text, and none are added."""

    def decode_bytes(self, ids: Iterable[int], *, specials: bool = False) -> bytes:
        """The exact bytes; a prefix of the ids gives a prefix of the bytes. Control tokens give
        nothing unless `specials`. Raises `InvalidRequestError` for an id outside the vocabulary.
        """

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """As `decode_bytes`; what is not UTF-8 becomes U+FFFD."""

    def byte_spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """For each token the byte range that it has in `decode_bytes(ids)`."""

    def token_id(self, token: str) -> int | None:
        """Id of a control token by its exact spelling."""


class _Decoding:
    """What follows from each token's bytes."""

    def _piece(self, token: int, specials: bool) -> bytes:
        raise NotImplementedError

    def decode_bytes(self, ids: Iterable[int], *, specials: bool = False) -> bytes:
        return b"".join(self._piece(token, specials) for token in ids)

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        return self.decode_bytes(ids, specials=specials).decode("utf-8", errors="replace")

    def byte_spans(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        borders = accumulate((len(self._piece(token, False)) for token in ids), initial=0)
        return list(pairwise(borders))


class ByteTokenizer(_Decoding):
    """The fake engine's: ids 0-255 are the UTF-8 bytes, 256 is the end."""

    END = 256
    vocab_size = 257
    eos_ids = frozenset({END})
    control_ids = eos_ids

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", errors="replace"))

    def token_id(self, token: str) -> int | None:
        return None

    def _piece(self, token: int, specials: bool) -> bytes:
        if token == self.END:
            return b""
        if not 0 <= token < self.END:
            raise _outside(token, self.vocab_size)
        return bytes((token,))


class HfTokenizer(_Decoding):
    """A `tokenizer.json` read by the tokenizers library."""

    def __init__(
        self,
        library: _Library,
        eos_ids: frozenset[int] = frozenset(),
        hidden_ids: frozenset[int] = frozenset(),
    ) -> None:
        """`hidden_ids` are the control tokens that decoded text leaves out."""
        # Text of users is data: `<|eos|>` in a document must not end it.
        library.encode_special_tokens = True
        self._library = library
        self._eos_ids = eos_ids
        self._hidden_ids = hidden_ids

    @classmethod
    def from_file(cls, path: Path, eos_ids: frozenset[int] = frozenset()) -> HfTokenizer:
        from tokenizers import Tokenizer as Library

        content = model_files.read_json(path)
        hidden = set()
        for token in content.get("added_tokens", ()):
            if token["special"] and token["content"] not in ANSWER_MARKS:
                hidden.add(int(token["id"]))
            # Some control tokens (`<think>`) are not marked special so that they stay visible; in
            # user text they must be as inert as the others.
            token["special"] = token["special"] or _is_control(token["content"])
        try:
            library = Library.from_str(json.dumps(content))
        except Exception as error:  # The library raises nothing narrower.
            raise ModelLoadError(f"cannot read the tokenizer {path}: {error}") from error
        return cls(library, eos_ids, frozenset(hidden))

    @cached_property
    def vocab_size(self) -> int:
        return max(len(self._table), self._library.get_vocab_size(with_added_tokens=True))

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos_ids

    @cached_property
    def control_ids(self) -> frozenset[int]:
        added = self._library.get_added_tokens_decoder()
        return frozenset(index for index, token in added.items() if token.special)

    def token_id(self, token: str) -> int | None:
        found: int | None = self._library.token_to_id(token)
        return found

    def encode(self, text: str) -> list[int]:
        # Windows bound the memory: the library keeps some hundred bytes per token until it is done.
        ids: list[int] = []
        current: _Window = [], []
        for start, following in self._windows(text):
            if start:
                joint = _joint(current, following)
                if joint is None:
                    # Nothing to hold on to, as in a long run of one character: one piece is right.
                    return self._whole(text)
                ids += current[0][: joint[0]]
                following = _cut(following, joint[1])
            current = following
        return ids + current[0]

    def _whole(self, text: str) -> list[int]:
        return list(self._library.encode_batch([text], add_special_tokens=False)[0].ids)

    def _windows(self, text: str) -> Iterator[tuple[int, _Window]]:
        """Overlapping windows with their starts, a batch at a time: the library encodes a batch on
        all cores and lets other threads run.
        """
        step = _WINDOW_CHARS - _OVERLAP_CHARS
        starts = range(0, max(len(text) - _OVERLAP_CHARS, 1), step)
        for first in range(0, len(starts), _BATCH_WINDOWS):
            batch = starts[first : first + _BATCH_WINDOWS]
            pieces = [text[start : start + _WINDOW_CHARS] for start in batch]
            encodings = self._library.encode_batch(pieces, add_special_tokens=False)
            for start, encoding in zip(batch, encodings, strict=True):
                yield start, (encoding.ids, [(a + start, b + start) for a, b in encoding.offsets])

    def _piece(self, token: int, specials: bool) -> bytes:
        try:
            if token < 0:
                raise IndexError
            piece = self._table[token]
        except IndexError:
            raise _outside(token, self.vocab_size) from None
        return b"" if token in self._hidden_ids and not specials else piece

    @cached_property
    def _table(self) -> list[bytes]:
        added = {t.content for t in self._library.get_added_tokens_decoder().values()}
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        table = [b""] * (max(vocabulary.values(), default=-1) + 1)
        back = {char: byte for byte, char in enumerate(byte_alphabet())}
        byte_level = "ByteLevel" in repr(self._library.decoder)
        for token, index in vocabulary.items():
            if token in added:
                table[index] = token.encode()
            elif byte_level and all(char in back for char in token):
                table[index] = bytes(back[char] for char in token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                table[index] = bytes.fromhex(token[3:5])
            else:
                table[index] = token.replace("\u2581", " ").encode()
        return table


_Window = tuple[list[int], list[tuple[int, int]]]
"""Ids and the characters of the whole text that each covers."""


def _joint(left: _Window, right: _Window) -> tuple[int, int] | None:
    """Indices (left, right) from which both windows cut the text in the same way.

    Neither may be trusted near its own edge, where it does not see the neighbouring text; after
    `_AGREE_TOKENS` equal tokens both have forgotten their edges.
    """
    if not right[1]:
        return None
    at = {span: index for index, span in enumerate(right[1])}
    first = len(left[0])
    while first and left[1][first - 1][0] >= right[1][0][0]:
        first -= 1
    for i in range(first, len(left[0]) - _AGREE_TOKENS):
        j = at.get(left[1][i])
        if j is None or not _clean(left, i) or not _clean(right, j):
            continue
        span = _AGREE_TOKENS
        if left[0][i : i + span] == right[0][j : j + span]:
            # The middle is as far as can be from both edges.
            return i + span // 2, j + span // 2
    return None


def _clean(window: _Window, index: int) -> bool:
    """Whether a character begins here (a character may be several byte-level tokens)."""
    return index > 0 and window[1][index - 1][1] == window[1][index][0]


def _cut(window: _Window, index: int) -> _Window:
    return window[0][index:], window[1][index:]


def _is_control(content: str) -> bool:
    return (content.startswith("<") and content.endswith(">")) or "\uff5c" in content


def byte_alphabet() -> list[str]:
    """The printable stand-in of each of the 256 bytes, as every byte-level BPE writes it."""
    keep = {*range(33, 127), *range(161, 173), *range(174, 256)}
    table, extra = [""] * 256, 0
    for byte in range(256):
        if byte in keep:
            table[byte] = chr(byte)
        else:
            table[byte] = chr(256 + extra)
            extra += 1
    return table


def open_tokenizer(model: str) -> Tokenizer | None:
    """The tokenizer of `fake`, of a shipped model or of a model folder; None if it has none."""
    folder = model_files.model_folder(model)
    if folder is None:
        return ByteTokenizer()
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    tokenizer = HfTokenizer.from_file(path, model_files.eos_ids(folder))
    # Built now, so that the first request does not pay for the table.
    tokenizer.decode_bytes(tokenizer.eos_ids, specials=True)
    return tokenizer


def _outside(token: int, size: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"token id {token} is outside the vocabulary of {size}", param="tokens"
    )
