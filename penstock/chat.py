"""Conversations to token ids. Pure string rules per model family, no templates that run code.

Every encoder cuts a conversation into segments and encodes each alone. So the ids of a longer
conversation begin with the ids of the shorter one, and a cached prefix stays a prefix.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from penstock.errors import InvalidRequestError, ModelLoadError
from penstock.folder import model_folder, read_json
from penstock.tokenizer import Tokenizer

ROLES = ("system", "developer", "user", "assistant")
MOST_MESSAGES = 4096
_CACHED_CHARS_FROM = 1 << 14
_CACHE_TOKENS = 8 << 20


@dataclass(frozen=True)
class Message:
    """One turn. `role` is system, user or assistant (developer means system)."""

    role: str
    text: str


@dataclass(frozen=True)
class Segment:
    """A piece that is encoded alone. `ends_message`: a state is worth keeping behind it."""

    text: str
    ends_message: bool = False
    control: bool = False
    """`text` is the exact spelling of one control token."""


@dataclass(frozen=True)
class Encoded:
    token_ids: list[int]
    boundaries: tuple[int, ...]
    """Positions at which a message (or the document in front of its question) ends, ascending."""


class ChatEncoder(Protocol):
    @property
    def start_ids(self) -> tuple[int, ...]:
        """What a bare text prompt of this model begins with."""

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        scope: bytes = b"",
    ) -> Encoded:
        """Ids of the conversation up to where the answer begins. Thread-safe.

        Long texts are remembered per `scope` (a tenant's namespace), so that the time of an
        encoding tells nobody what another tenant has sent. Raises `InvalidRequestError`.
        """


class _SegmentEncoder:
    """Encodes what a subclass cuts."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache = _SegmentCache()

    @property
    def start_ids(self) -> tuple[int, ...]:
        return ()

    def segments(self, messages: Sequence[Message]) -> Iterable[Segment]:
        raise NotImplementedError

    def encode(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        scope: bytes = b"",
    ) -> Encoded:
        if tools:
            raise InvalidRequestError(
                "tools are not supported by this model's chat encoding; send the request without "
                "them",
                param="tools",
                code="unsupported_value",
            )
        ids: list[int] = []
        boundaries: list[int] = []
        for segment in self.segments(read_messages(messages)):
            if segment.control:
                ids.append(self._control(segment.text))
            elif len(segment.text) < _CACHED_CHARS_FROM:
                ids += self._tokenizer.encode(segment.text)
            else:
                ids += self._cache.encode(self._tokenizer, segment.text, scope)
            if segment.ends_message and len(ids) > (boundaries or (0,))[-1]:
                boundaries.append(len(ids))
        return Encoded(ids, tuple(boundaries))

    def _control(self, spelling: str) -> int:
        token = self._tokenizer.token_id(spelling)
        if token is None:
            raise ModelLoadError(f"the tokenizer has no token {spelling!a}")
        return token


class PlainChat(_SegmentEncoder):
    """Role-tagged lines, for the fake and for models that bring no rule of their own."""

    def segments(self, messages: Sequence[Message]) -> Iterable[Segment]:
        for message in messages:
            yield Segment(f"{message.role}: ")
            yield Segment(message.text)
            yield Segment("\n", ends_message=True)
        yield Segment("assistant: ")


class LedgerChat(_SegmentEncoder):
    """The shipped model's: texts separated by blank lines; the question's subject is restated."""

    def segments(self, messages: Sequence[Message]) -> Iterable[Segment]:
        before, asked = "", ""
        for index, message in enumerate(messages):
            if message.role == "assistant":
                yield Segment(message.text)
                stop = "" if message.text.endswith(".") else "."
                yield Segment(stop, ends_message=True)
            else:
                asked = message.text if message.role == "user" else asked
                yield from self._text(before, message.text)
                if _next_role(messages, index) in ("assistant", None):
                    yield Segment(self._opening(asked))
            before = "\n\n"

    @staticmethod
    def _text(before: str, text: str) -> Iterable[Segment]:
        """The document and its question apart, so that a state is kept between them."""
        at = text.rfind("\n\n" + _QUESTION)
        if at > 0:
            yield Segment(before + text[:at], ends_message=True)
            yield Segment(text[at:], ends_message=True)
        else:
            yield Segment(before + text, ends_message=True)

    @staticmethod
    def _opening(text: str) -> str:
        """What the answer begins with: the subject of the last question, restated."""
        end = len(text)
        while end > 0:
            at = text.rfind("\n" + _QUESTION, 0, end) + 1
            line = text[at:end].split("\n", 1)[0].rstrip()
            if line.startswith(_QUESTION) and line.endswith("?"):
                return f"\nAnswer: {line[len(_QUESTION) : -1]} is "
            end = at - 1
        return "\nAnswer: "


_QUESTION = "Question: what is "


def _next_role(messages: Sequence[Message], index: int) -> str | None:
    return messages[index + 1].role if index + 1 < len(messages) else None


class DeepSeekV4Chat(_SegmentEncoder):
    """DeepSeek-V4's chat mode (release `encoding/`): no thinking, no tools yet."""

    BOS = "<\uff5cbegin\u2581of\u2581sentence\uff5c>"
    EOS = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    USER = "<\uff5cUser\uff5c>"
    ASSISTANT = "<\uff5cAssistant\uff5c>"
    NO_THINKING = "</think>"
    CONTROLS = (BOS, EOS, USER, ASSISTANT, NO_THINKING)

    @property
    def start_ids(self) -> tuple[int, ...]:
        return (self._control(self.BOS),)

    def segments(self, messages: Sequence[Message]) -> Iterable[Segment]:
        yield Segment(self.BOS, control=True)
        for index, message in enumerate(messages):
            if message.role == "assistant":
                if not index or messages[index - 1].role == "assistant":
                    yield from self._opening()
                yield Segment(message.text)
                yield Segment(self.EOS, control=True, ends_message=True)
                continue
            if message.role == "user":
                yield Segment(self.USER, control=True)
            yield Segment(message.text, ends_message=True)
            if _next_role(messages, index) in ("assistant", None):
                yield from self._opening()

    def _opening(self) -> Iterable[Segment]:
        yield Segment(self.ASSISTANT, control=True)
        yield Segment(self.NO_THINKING, control=True)


_ENCODERS: Mapping[str, type[_SegmentEncoder]] = {
    "ledger": LedgerChat,
    "deepseek_v4": DeepSeekV4Chat,
    "plain": PlainChat,
}


def open_chat(model: str, tokenizer: Tokenizer) -> ChatEncoder:
    """The encoder that the model's config.json names (`"penstock": {"chat": ...}`), else DeepSeek's
    if the tokenizer has its tokens, else plain.
    """
    folder = model_folder(model)
    ours = read_json(folder / "config.json").get("penstock", {}) if folder else {}
    name = ours.get("chat") if isinstance(ours, dict) else None
    if name is None:
        has_controls = all(tokenizer.token_id(c) is not None for c in DeepSeekV4Chat.CONTROLS)
        name = "deepseek_v4" if has_controls else "plain"
    if name not in _ENCODERS:
        raise ModelLoadError(
            f"config.json of '{model}' asks for the chat encoding '{name}'; known are "
            f"{', '.join(_ENCODERS)}"
        )
    return _ENCODERS[name](tokenizer)


def read_messages(messages: Sequence[Mapping[str, Any]]) -> list[Message]:
    """Messages in OpenAI's shape, checked. Raises `InvalidRequestError` that names the place."""
    if not messages:
        raise InvalidRequestError("messages is empty; send at least one", param="messages")
    if len(messages) > MOST_MESSAGES:
        raise InvalidRequestError(
            f"messages has {len(messages)} entries; at most {MOST_MESSAGES} are taken",
            param="messages",
        )
    read = [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]
    if read[-1].role == "assistant":
        raise InvalidRequestError(
            "the last message is the assistant's; end the conversation with a user's message",
            param="messages",
        )
    if not any(message.text for message in read):
        raise InvalidRequestError("every message is empty", param="messages")
    return read


def _message(message: Any, place: str) -> Message:
    if not isinstance(message, Mapping):
        raise _wrong_type(place, "an object", message)
    role = message.get("role")
    if not isinstance(role, str):
        raise _wrong_type(f"{place}.role", "a string", role)
    if role not in ROLES:
        raise InvalidRequestError(
            f"{place}.role must be one of {', '.join(ROLES)}, not {role[:40]!a}",
            param=f"{place}.role",
        )
    if message.get("tool_calls") or message.get("function_call"):
        raise InvalidRequestError(
            f"{place} has tool calls, which this server does not support yet",
            param=f"{place}.tool_calls",
            code="unsupported_value",
        )
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    text = content if isinstance(content, str) else _parts(content, f"{place}.content")
    return Message("system" if role == "developer" else role, text)


def _parts(content: Any, place: str) -> str:
    if not isinstance(content, list):
        raise _wrong_type(place, "a string or a list of text parts", content)
    texts = []
    for i, part in enumerate(content):
        here = f"{place}[{i}]"
        if not isinstance(part, Mapping):
            raise _wrong_type(here, "an object", part)
        if part.get("type") != "text":
            raise InvalidRequestError(
                f"{here}.type must be 'text'; this model reads text only", param=f"{here}.type"
            )
        if not isinstance(part.get("text"), str):
            raise _wrong_type(f"{here}.text", "a string", part.get("text"))
        texts.append(part["text"])
    return "".join(texts)


def _wrong_type(place: str, wanted: str, got: Any) -> InvalidRequestError:
    kind = "missing" if got is None else f"of type {type(got).__name__}"
    return InvalidRequestError(
        f"{place} must be {wanted}; it is {kind}", param=place, code="invalid_type"
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
