"""Token ids to text, one at a time, without ever showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from penstock.errors import InvalidRequestError

DecodeBytes = Callable[[Sequence[int]], bytes]
"""The exact bytes of some tokens; those of a sequence are those of its tokens, joined."""


class Detokenizer:
    """UTF-8 that ends inside a character is kept back; bytes that are none become U+FFFD."""

    def __init__(self, decode_bytes: DecodeBytes) -> None:
        self._decode_bytes = decode_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """Text that is complete with this token."""
        try:
            raw = self._decode_bytes((token,))
        except InvalidRequestError:
            # Models pad their vocabulary beyond the tokenizer's: such a token has no text.
            raw = b""
        return self._decoder.decode(raw)

    def flush(self) -> str:
        """What is left at the end: a character that will not be completed is U+FFFD."""
        return self._decoder.decode(b"", final=True)
