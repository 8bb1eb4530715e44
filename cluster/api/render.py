"""Events to the bytes of OpenAI's two response formats. Pure; the per-token path is one join."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from cluster.api.parts import AnswerParts
from cluster.contracts import ServedModel
from penstock.request import Finish, Progress, TokenChunk

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def progress_comment(event: Progress) -> bytes:
    return (
        f": prefill {event.tokens_done}/{event.tokens_total} cached {event.cached_tokens}\n\n"
    ).encode()


def sse(data: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def usage_object(finish: Finish, parts: AnswerParts | None) -> dict[str, Any]:
    usage = finish.usage
    cached = min(usage.cached_tokens, usage.prompt_tokens)
    reasoning = parts.reasoning_tokens(finish) if parts is not None else None
    details = {} if reasoning is None else {"reasoning_tokens": reasoning}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": cached},
        **({"completion_tokens_details": details} if details else {}),
        "prompt_cache_hit_tokens": cached,
        "prompt_cache_miss_tokens": usage.prompt_tokens - cached,
    }


@dataclass
class TokenRecord:
    """Ids and logits digests of an answer's tokens, for those who check that two paths agree."""

    ids: list[int] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)

    def add(self, chunk: TokenChunk) -> dict[str, Any]:
        """What a streamed chunk says of its tokens."""
        digests = [d.hex() for d in chunk.logits_digests]
        self.ids += chunk.token_ids
        self.digests += digests
        return {"token_ids": list(chunk.token_ids), "logits_digests": digests}

    def of_answer(self) -> dict[str, Any]:
        return {"token_ids": self.ids, "logits_digests": self.digests}


class Render:
    """One answer's format. Subclasses name the object and say where the text goes."""

    chunk_object = ""
    whole_object = ""

    def __init__(
        self, *, answer_id: str, created: int, model: ServedModel, include_usage: bool = False
    ) -> None:
        self._include_usage = include_usage
        self._head: dict[str, Any] = {
            "id": answer_id,
            "created": created,
            "model": model.name,
            "system_fingerprint": model.fingerprint,
        }
        self._chunk_head = {**self._head, "object": self.chunk_object}
        # With include_usage every chunk but the last carries a null usage (OpenAI's rule).
        self._null = {"usage": None} if include_usage else {}
        before, after = self._around_text()
        head = orjson.dumps(self._chunk_head)[:-1]
        self._prefix = b"data: " + head + b',"choices":[{"index":0,' + before
        tail = b',"usage":null' if include_usage else b""
        self._suffix = after + b"}]" + tail + b"}\n\n"

    def _around_text(self) -> tuple[bytes, bytes]:
        """JSON before and after the text within a choice."""
        raise NotImplementedError

    def _chunk(self, choice: Mapping[str, Any], **more: Any) -> bytes:
        choices = [{"index": 0, **choice}]
        return sse({**self._chunk_head, "choices": choices, **self._null, **more})

    def opening(self) -> bytes:
        """What the stream begins with."""
        return b""

    def text(self, text: str) -> bytes:
        return self._prefix + orjson.dumps(text) + self._suffix

    def text_with(self, text: str, extra: Mapping[str, Any]) -> bytes:
        """A chunk of text with extension fields."""
        raise NotImplementedError

    def delta(self, delta: Mapping[str, Any]) -> bytes:
        """A chunk of an answer that has parts."""
        raise NotImplementedError

    def closing(
        self, finish: Finish, timings: Mapping[str, float], parts: AnswerParts | None = None
    ) -> bytes:
        """The chunk with the reason, the usage if it is wanted, and the end mark."""
        last = self._final(parts.reason(finish.reason) if parts else finish.reason, timings)
        if self._include_usage:
            usage = usage_object(finish, parts)
            last += sse({**self._chunk_head, "choices": [], "usage": usage, "timings": timings})
        return last + DONE

    def _final(self, reason: str, timings: Mapping[str, float]) -> bytes:
        raise NotImplementedError

    def whole(
        self,
        answer: str | AnswerParts,
        finish: Finish,
        timings: Mapping[str, float],
        extra: Mapping[str, Any],
        tokens: TokenRecord | None = None,
    ) -> bytes:
        """The body of a response that is not streamed. `extra`: extension fields of the answer."""
        parts = answer if isinstance(answer, AnswerParts) else None
        choice = {
            "index": 0,
            **self._whole_choice(answer, extra),
            **(tokens.of_answer() if tokens else {}),
            "logprobs": None,
            "finish_reason": parts.reason(finish.reason) if parts else finish.reason,
        }
        return orjson.dumps(
            {
                **self._head,
                "object": self.whole_object,
                "choices": [choice],
                "usage": usage_object(finish, parts),
                "timings": timings,
            }
        )

    def _whole_choice(self, answer: str | AnswerParts, extra: Mapping[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


class ChatRender(Render):
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def _around_text(self) -> tuple[bytes, bytes]:
        return b'"delta":{"content":', b'},"logprobs":null,"finish_reason":null'

    def opening(self) -> bytes:
        return self._open({"role": "assistant", "content": ""})

    def _open(self, delta: Mapping[str, Any]) -> bytes:
        return self._chunk({"delta": delta, "logprobs": None, "finish_reason": None})

    def text_with(self, text: str, extra: Mapping[str, Any]) -> bytes:
        return self._open({"content": text, **extra})

    def delta(self, delta: Mapping[str, Any]) -> bytes:
        return self._open(delta)

    def _final(self, reason: str, timings: Mapping[str, float]) -> bytes:
        choice: dict[str, Any] = {"delta": {}, "logprobs": None, "finish_reason": reason}
        return self._chunk(choice, timings=timings)

    def _whole_choice(self, answer: str | AnswerParts, extra: Mapping[str, Any]) -> dict[str, Any]:
        said = {"content": answer} if isinstance(answer, str) else answer.message()
        return {"message": {"role": "assistant", "refusal": None, **said, **extra}}


class TextRender(Render):
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def _around_text(self) -> tuple[bytes, bytes]:
        return b'"text":', b',"logprobs":null,"finish_reason":null'

    def text_with(self, text: str, extra: Mapping[str, Any]) -> bytes:
        return self._chunk({"text": text, "logprobs": None, "finish_reason": None, **extra})

    def _final(self, reason: str, timings: Mapping[str, float]) -> bytes:
        choice = {"text": "", "logprobs": None, "finish_reason": reason}
        return self._chunk(choice, timings=timings)

    def _whole_choice(self, answer: str | AnswerParts, extra: Mapping[str, Any]) -> dict[str, Any]:
        assert isinstance(answer, str), "a completion has no parts"
        return {"text": answer, **extra}
