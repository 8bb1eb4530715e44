"""Events to the bytes of OpenAI's two response formats. Pure; the per-token path is one join."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from cluster.api.choices import Choice, Total
from cluster.api.logprobs import Entry
from cluster.contracts import ServedModel
from penstock.request import Finish, Progress

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"


def progress_comment(event: Progress) -> bytes:
    return (
        f": prefill {event.tokens_done}/{event.tokens_total} cached {event.cached_tokens}\n\n"
    ).encode()


def sse(data: Mapping[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def usage_object(total: Total) -> dict[str, Any]:
    usage = total.usage
    reasoning = total.reasoning_tokens
    details = {} if reasoning is None else {"reasoning_tokens": reasoning}
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        **({"completion_tokens_details": details} if details else {}),
        "prompt_cache_hit_tokens": usage.cached_tokens,
        "prompt_cache_miss_tokens": usage.prompt_tokens - usage.cached_tokens,
    }


class Render:
    """One response's format. Subclasses name the object and say where the text goes."""

    chunk_object = ""
    whole_object = ""

    def __init__(
        self,
        *,
        answer_id: str,
        created: int,
        model: ServedModel,
        include_usage: bool = False,
        choices: int = 1,
        top_logprobs: int | None = None,
    ) -> None:
        self._include_usage = include_usage
        self._choices = choices
        self._top_logprobs = top_logprobs
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
        head = b"data: " + orjson.dumps(self._chunk_head)[:-1] + b',"choices":[{"index":'
        self._prefixes = [head + b"%d," % index + before for index in range(choices)]
        tail = b',"usage":null' if include_usage else b""
        self._suffix = after + b"}]" + tail + b"}\n\n"

    def _around_text(self) -> tuple[bytes, bytes]:
        """JSON before and after the text within a choice."""
        raise NotImplementedError

    def _chunk(self, index: int, choice: Mapping[str, Any], **more: Any) -> bytes:
        choices = [{"index": index, **choice}]
        return sse({**self._chunk_head, "choices": choices, **self._null, **more})

    def opening(self, choices: Sequence[Choice]) -> bytes:
        """What the stream begins with."""
        raise NotImplementedError

    def text(self, choice: Choice, text: str) -> bytes:
        return self._prefixes[choice.index] + orjson.dumps(text) + self._suffix

    def text_with(
        self, choice: Choice, text: str, extra: Mapping[str, Any], entries: Sequence[Entry]
    ) -> bytes:
        """A chunk of text with extension fields and log probabilities."""
        raise NotImplementedError

    def delta(
        self, choice: Choice, delta: Mapping[str, Any], entries: Sequence[Entry] = ()
    ) -> bytes:
        """A chunk of an answer that has parts."""
        raise NotImplementedError

    def final(self, choice: Choice, finish: Finish, timings: Mapping[str, float]) -> bytes:
        """The chunk with the reason why this choice ends."""
        raise NotImplementedError

    def closing(self, total: Total, timings: Mapping[str, float]) -> bytes:
        """The usage if it is wanted, and the end mark."""
        if not self._include_usage:
            return DONE
        usage = usage_object(total)
        return sse({**self._chunk_head, "choices": [], "usage": usage, "timings": timings}) + DONE

    def whole(
        self,
        answers: Sequence[tuple[Choice, str, Finish]],
        total: Total,
        timings: Mapping[str, float],
    ) -> bytes:
        """The body of a response that is not streamed: each choice with its text."""
        choices = [
            {
                "index": choice.index,
                **self._whole_choice(choice, text),
                **(choice.tokens.of_answer() if choice.tokens else {}),
                "logprobs": self._logprobs(
                    choice, choice.logprobs.entries if choice.logprobs else ()
                ),
                "finish_reason": reason_of(choice, finish),
            }
            for choice, text, finish in answers
        ]
        return orjson.dumps(
            {
                **self._head,
                "object": self.whole_object,
                "choices": choices,
                "usage": usage_object(total),
                "timings": timings,
            }
        )

    def _whole_choice(self, choice: Choice, text: str) -> dict[str, Any]:
        raise NotImplementedError

    def _logprobs(self, choice: Choice, entries: Sequence[Entry]) -> dict[str, Any] | None:
        raise NotImplementedError


def reason_of(choice: Choice, finish: Finish) -> str:
    return choice.parts.reason(finish.reason) if choice.parts else finish.reason


class ChatRender(Render):
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def _around_text(self) -> tuple[bytes, bytes]:
        return b'"delta":{"content":', b'},"logprobs":null,"finish_reason":null'

    def opening(self, choices: Sequence[Choice]) -> bytes:
        return b"".join(self.delta(c, {"role": "assistant", "content": ""}) for c in choices)

    def text_with(
        self, choice: Choice, text: str, extra: Mapping[str, Any], entries: Sequence[Entry]
    ) -> bytes:
        return self.delta(choice, {"content": text, **extra}, entries)

    def delta(
        self, choice: Choice, delta: Mapping[str, Any], entries: Sequence[Entry] = ()
    ) -> bytes:
        logprobs = self._logprobs(choice, entries) if entries else None
        return self._chunk(
            choice.index, {"delta": delta, "logprobs": logprobs, "finish_reason": None}
        )

    def final(self, choice: Choice, finish: Finish, timings: Mapping[str, float]) -> bytes:
        reason = reason_of(choice, finish)
        last: dict[str, Any] = {"delta": {}, "logprobs": None, "finish_reason": reason}
        return self._chunk(choice.index, last, timings=timings)

    def _whole_choice(self, choice: Choice, text: str) -> dict[str, Any]:
        said = {"content": text} if choice.parts is None else choice.parts.message()
        told = choice.told("evidence")
        return {"message": {"role": "assistant", "refusal": None, **said, **told}}

    def _logprobs(self, choice: Choice, entries: Sequence[Entry]) -> dict[str, Any] | None:
        return choice.logprobs.chat(entries) if choice.logprobs is not None else None


class TextRender(Render):
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def _around_text(self) -> tuple[bytes, bytes]:
        return b'"text":', b',"logprobs":null,"finish_reason":null'

    def opening(self, choices: Sequence[Choice]) -> bytes:
        return b"".join(self.text(c, c.echo) for c in choices if c.echo)

    def text_with(
        self, choice: Choice, text: str, extra: Mapping[str, Any], entries: Sequence[Entry]
    ) -> bytes:
        logprobs = self._logprobs(choice, entries) if entries else None
        chunk = {"text": text, "logprobs": logprobs, "finish_reason": None, **extra}
        return self._chunk(choice.index, chunk)

    def final(self, choice: Choice, finish: Finish, timings: Mapping[str, float]) -> bytes:
        last = {"text": "", "logprobs": None, "finish_reason": finish.reason}
        return self._chunk(choice.index, last, timings=timings)

    def _whole_choice(self, choice: Choice, text: str) -> dict[str, Any]:
        return {"text": choice.echo + text, **choice.told("evidence")}

    def _logprobs(self, choice: Choice, entries: Sequence[Entry]) -> dict[str, Any] | None:
        if choice.logprobs is None:
            return None
        return choice.logprobs.text(entries, offset=len(choice.echo), top=self._top_logprobs or 0)
