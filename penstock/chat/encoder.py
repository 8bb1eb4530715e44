"""What every chat encoder does: cuts a conversation into segments and encodes each alone.

So the ids of a longer conversation begin with the ids of the shorter one, and a cached prefix stays
a prefix. Control tokens come from segments that say so, never out of a client's text.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from penstock.chat.messages import Message, check_answerable, read_messages
from penstock.errors import InvalidRequestError, ModelLoadError
from penstock.tokenizer import Tokenizer

LONG_CHARS = 1 << 14
"""Texts from this length on are remembered."""
_CACHE_TOKENS = 8 << 20


@dataclass(frozen=True)
class Segment:
    """A piece that is encoded alone. `ends_message`: a state is worth keeping behind it."""

    text: str
    ends_message: bool = False
    control: bool = False
    """`text` is the exact spelling of one control token."""


@dataclass(frozen=True)
class ChatOptions:
    """What a request says beside its messages. None: the model's default."""

    tools: tuple[Mapping[str, Any], ...] = ()
    """Definitions as clients send them, unchecked: `{"type": "function", "function": {...}}`."""
    thinking: bool | None = None
    effort: str | None = None
    """`none`, `minimal`, `low`, `medium`, `high`, `xhigh` or `max`."""
    drop_thinking: bool | None = None
    """Leave out the reasoning of earlier turns."""
    task: str | None = None
    """A quick task instead of an answer."""


@dataclass(frozen=True)
class AnswerForm:
    """How the answer to a prompt is going to read; `penstock.chat.answer` takes it apart."""

    thinking: bool = False
    """It begins with reasoning."""
    calls: bool = False
    """It may hold tool calls."""
    thinking_ends: int | None = None
    """The token that ends the reasoning."""

    @property
    def plain(self) -> bool:
        """All of it is content."""
        return not (self.thinking or self.calls)


@dataclass(frozen=True)
class Encoded:
    token_ids: list[int]
    boundaries: tuple[int, ...]
    """Positions at which a message (or the document in front of its question) ends, ascending."""
    answer: AnswerForm = field(default=AnswerForm())


class ChatEncoder(Protocol):
    refusal: str | None
    """What the model says where the prompt has no answer; None if that is not known."""

    @property
    def start_ids(self) -> tuple[int, ...]:
        """What a bare text prompt of this model begins with."""

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: ChatOptions | None = None,
        *,
        scope: bytes = b"",
    ) -> Encoded:
        """Ids of the conversation up to where the answer begins. Thread-safe.

        Long texts are remembered per `scope` (a tenant's namespace), so that the time of an
        encoding tells nobody what another tenant has sent. Raises `InvalidRequestError`, also for
        an option that this model's encoding does not have.
        """


class SegmentEncoder:
    """Segments to ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache = _SegmentCache()
        self.refusal: str | None = None

    def encode_segments(
        self, segments: Iterable[Segment], scope: bytes
    ) -> tuple[list[int], tuple[int, ...]]:
        """Ids and message boundaries."""
        ids: list[int] = []
        boundaries: list[int] = []
        for segment in segments:
            if segment.control:
                ids.append(self.control(segment.text))
            elif len(segment.text) < LONG_CHARS:
                ids += self._tokenizer.encode(segment.text)
            else:
                ids += self._cache.encode(self._tokenizer, segment.text, scope)
            if segment.ends_message and len(ids) > (boundaries or (0,))[-1]:
                boundaries.append(len(ids))
        return ids, tuple(boundaries)

    def control(self, spelling: str) -> int:
        """Id of a control token. Raises `ModelLoadError` if the tokenizer does not have it."""
        token = self._tokenizer.token_id(spelling)
        if token is None:
            raise ModelLoadError(f"tokenizer.json has no token {spelling!a}")
        return token


class TextChat(SegmentEncoder):
    """A family that has texts and nothing else: no thinking, no tools. Developer means system."""

    @property
    def start_ids(self) -> tuple[int, ...]:
        return ()

    def segments(self, messages: Sequence[Message]) -> Iterable[Segment]:
        raise NotImplementedError

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        options: ChatOptions | None = None,
        *,
        scope: bytes = b"",
    ) -> Encoded:
        _refuse(options or ChatOptions())
        read = [
            Message("system" if message.role == "developer" else message.role, message.text)
            for message in read_messages(messages)
        ]
        check_answerable(read)
        return Encoded(*self.encode_segments(self.segments(read), scope))


def _refuse(options: ChatOptions) -> None:
    asked = {
        "tools": bool(options.tools),
        "reasoning_effort": options.effort not in (None, "none"),
        "chat_template_kwargs.thinking": bool(options.thinking),
        "chat_template_kwargs.task": options.task is not None,
    }
    for name, wanted in asked.items():
        if wanted:
            raise InvalidRequestError(
                f"{name} is not supported by this model's chat encoding; send the request without "
                "it",
                param=name,
                code="unsupported_value",
            )


class _SegmentCache:
    """Ids of long segments, least recently used dropped first, at most `_CACHE_TOKENS` in all.

    A million-token document takes seconds to encode; its second question must not pay that again.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, array[int]] = OrderedDict()
        self._tokens = 0

    def encode(self, tokenizer: Tokenizer, text: str, scope: bytes) -> array[int]:
        raw = text.encode("utf-8", errors="surrogatepass")
        key = hashlib.sha256(len(scope).to_bytes(8, "big") + scope + raw).digest()
        with self._lock:
            found = self._kept.get(key)
            if found is not None:
                self._kept.move_to_end(key)
                return found
        ids = array("i", tokenizer.encode(text))
        with self._lock:
            if key not in self._kept and len(ids) <= _CACHE_TOKENS:
                self._kept[key] = ids
                self._tokens += len(ids)
                while self._tokens > _CACHE_TOKENS:
                    self._tokens -= len(self._kept.popitem(last=False)[1])
        return ids
