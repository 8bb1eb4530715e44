"""Evidence as clients see it: spans of prompt tokens, and where they stand in the client's text."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

from decode.evidence import AnswerEvidence, Span, of_token
from penstock.request import TokenChunk
from penstock.tokenizer import Tokenizer

_PAGE_TOKENS = 1024
_PAGES_KEPT = 64
_CONTINUATION = bytes(range(0x80, 0xC0))
"""UTF-8 bytes that begin no character."""


def contents(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    """The text of each message of a chat request: what `char_start` counts in."""
    return [
        _text(message.get("content"), "\n\n" if message.get("role") == "tool" else "")
        for message in messages
    ]


def _text(content: Any, joint: str) -> str:
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return joint.join(p["text"] for p in parts if isinstance(p, dict) and "text" in p)


class PromptText:
    """A prompt's characters by token, and the places of the client's texts among them.

    Memory is a page of offsets for each 1,024 tokens that evidence has touched, 64 at most. Takes
    0.6 s for a million tokens: build it in a thread.
    """

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int], texts: Sequence[str]) -> None:
        self._tokenizer, self._ids = tokenizer, ids
        raw = bytearray()
        self._page_chars = [0]
        for at in range(0, len(ids), _PAGE_TOKENS):
            piece = tokenizer.decode_bytes(ids[at : at + _PAGE_TOKENS])
            raw += piece
            self._page_chars.append(self._page_chars[-1] + _characters(piece))
        self._places = _places(bytes(raw), texts)
        self._pages: OrderedDict[int, tuple[array[int], bytes]] = OrderedDict()

    def place(self, start: int, end: int) -> tuple[int, int, int] | None:
        """(text, first character, behind the last one) of tokens `start` to `end`; None where they
        stand in no text of the client, or in one whose place is not certain.

        Of a span across several texts the part in the one that holds most of it.
        """
        first, behind = self._character(start, floor=True), self._character(end, floor=False)
        best: tuple[int, int, int] | None = None
        for number, at, length in self._places:
            low, high = max(first - at, 0), min(behind - at, length)
            if low < high and (best is None or high - low > best[2] - best[1]):
                best = number, low, high
        return best

    def _character(self, token: int, *, floor: bool) -> int:
        """Characters before a token; one that it only continues counts as before it unless
        `floor`.
        """
        page, within = divmod(token, _PAGE_TOKENS)
        if page >= len(self._page_chars) - 1:
            return self._page_chars[-1]
        counts, firsts = self._page(page)
        inside = bool(floor and within < len(firsts) and firsts[within])
        return self._page_chars[page] + counts[within] - inside

    def _page(self, page: int) -> tuple[array[int], bytes]:
        """Characters begun before each token of a page, and whether it continues one."""
        known = self._pages.get(page)
        if known is None:
            ids = self._ids[page * _PAGE_TOKENS : (page + 1) * _PAGE_TOKENS]
            pieces = [self._tokenizer.decode_bytes([token]) for token in ids]
            counts = array("q", accumulate(map(_characters, pieces), initial=0))
            firsts = bytes(bool(p) and p[0] in _CONTINUATION for p in pieces)
            known = self._pages[page] = counts, firsts
            if len(self._pages) > _PAGES_KEPT:
                self._pages.popitem(last=False)
        else:
            self._pages.move_to_end(page)
        return known


def _characters(piece: bytes) -> int:
    return len(piece.translate(None, _CONTINUATION))


def _places(raw: bytes, texts: Sequence[str]) -> list[tuple[int, int, int]]:
    """(text, first character in `raw`, characters) of each text whose place is certain.

    An encoder writes the texts in their order with its own words between. The longest is sought
    first, the others before and behind it; one that could stand in two places has none.
    """
    found: dict[int, tuple[int, int]] = {}
    encoded = [text.encode("utf-8", errors="replace") for text in texts]
    for number in sorted(range(len(texts)), key=lambda n: -len(encoded[n])):
        text = encoded[number]
        low = max((end for n, (_, end) in found.items() if n < number), default=0)
        high = min((at for n, (at, _) in found.items() if n > number), default=len(raw))
        at = raw.find(text, low, high) if text else -1
        twice = at >= 0 and raw.find(text, at + 1, high) >= 0
        if at >= 0 and not (twice and encoded.count(text) == 1):
            found[number] = at, at + len(text)
    places = []
    cursor, chars = 0, 0
    for number, (at, end) in sorted(found.items(), key=lambda item: item[1]):
        chars += _characters(raw[cursor:at])
        places.append((number, chars, len(texts[number])))
        chars += len(texts[number])
        cursor = end
    return places


class EvidenceText:
    """Spans of prompt tokens with their text and place; collects them over an answer."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        prompt: Sequence[int],
        text: PromptText | None = None,
        *,
        names_message: bool = True,
    ) -> None:
        """`names_message`: the client's texts are messages, not one prompt."""
        self._tokenizer, self._prompt, self._text = tokenizer, prompt, text
        self._names_message = names_message
        self._answer = AnswerEvidence()

    def add(self, chunk: TokenChunk) -> list[dict[str, Any]]:
        """What a streamed chunk says of its tokens' evidence."""
        self._answer.add(chunk.evidence, len(chunk.token_ids))
        return [
            self._object(span, {"mass": round(span.total, 6)}) for span in of_token(chunk.evidence)
        ]

    def collect(self, chunk: TokenChunk) -> None:
        """As `add` where nobody reads what it returns."""
        self._answer.add(chunk.evidence, len(chunk.token_ids))

    def of_answer(self) -> list[dict[str, Any]]:
        """The spans of the whole answer, heaviest first."""
        return [
            self._object(
                span,
                {"mass": round(span.mass, 6), "weight": round(self._answer.weight(span), 6)},
            )
            for span in self._answer.spans()
        ]

    def _object(self, span: Span, figures: Mapping[str, float]) -> dict[str, Any]:
        start, end = span.start, min(span.end, len(self._prompt))
        text = self._tokenizer.decode(self._prompt[start:end]) if self._tokenizer else ""
        place = self._text.place(start, end) if self._text else None
        number, first, behind = place or (None, None, None)
        message = {"message": number} if self._names_message else {}
        return {
            "start": start,
            "end": end,
            **figures,
            "text": text,
            **message,
            "char_start": first,
            "char_end": behind,
        }
