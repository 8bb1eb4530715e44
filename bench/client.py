"""A streaming client of any OpenAI-compatible server: one answer with the time of each event."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson

from bench.stats import gaps
from penstock.errors import PenstockError, UnavailableError


class Refused(PenstockError):
    """The server said no before any text."""

    def __init__(
        self, text: str, *, status: int, retry_after_s: float | None, reason: str, took_s: float
    ) -> None:
        super().__init__(f"the server refused ({status}): {text}")
        self.status, self.after_s, self.why, self.took_s = status, retry_after_s, reason, took_s


@dataclass
class Answer:
    """Times are seconds of the monotonic clock. An event is one chunk that carries text."""

    sent_s: float
    event_times_s: list[float] = field(default_factory=list)
    ended_s: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    evidence_spans: int = 0
    """Named with the tokens of the answer."""

    @property
    def ttft_s(self) -> float:
        return self.event_times_s[0] - self.sent_s

    @property
    def event_gaps_s(self) -> list[float]:
        return gaps(self.event_times_s)


class Client:
    """Belongs to one event loop. `model` "" asks the server for the first one it serves."""

    def __init__(
        self, url: str, *, model: str = "", api_key: str | None = None, timeout_s: float = 300.0
    ) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self._http = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(timeout_s, connect=10.0),
            limits=httpx.Limits(max_connections=None),
            trust_env=False,
        )

    async def __aenter__(self) -> Client:
        if not self.model:
            try:
                answer = await self._http.get("/v1/models")
                self.model = str(answer.raise_for_status().json()["data"][0]["id"])
            except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
                await self._http.aclose()
                raise UnavailableError(
                    f"no OpenAI-compatible server answers at {self.url}: {error}; check --url"
                ) from error
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def chat(
        self,
        content: str,
        *,
        max_tokens: int,
        begun: Callable[[], None] | None = None,
        answer: Answer | None = None,
        **fields: Any,
    ) -> Answer:
        """`begun` is called when the first text has come; `answer` is filled as it comes.

        Raises PenstockError if the server refuses, breaks off, or answers without text.
        """
        messages = [{"role": "user", "content": content}]
        body = {"messages": messages, "max_tokens": max_tokens}
        return await self._stream("/v1/chat/completions", body | fields, begun, answer)

    async def complete(self, tokens: Sequence[int], *, max_tokens: int, **fields: Any) -> Answer:
        """A prompt of these token ids, without a template. Raises as `chat`."""
        body = {"prompt": tokens, "max_tokens": max_tokens}
        return await self._stream("/v1/completions", body | fields)

    async def _stream(
        self,
        path: str,
        body: dict[str, Any],
        begun: Callable[[], None] | None = None,
        answer: Answer | None = None,
    ) -> Answer:
        common = {
            "model": self.model,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        raw = orjson.dumps(common | body)
        headers = {"Content-Type": "application/json"}
        answer = answer or Answer(0.0)
        answer.sent_s = time.monotonic()
        try:
            async with self._http.stream("POST", path, content=raw, headers=headers) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")[:300]
                    after = response.headers.get("Retry-After", "")
                    raise Refused(
                        text,
                        status=response.status_code,
                        retry_after_s=float(after) if after.isdigit() else None,
                        reason=response.headers.get("X-Penstock-Reason", ""),
                        took_s=time.monotonic() - answer.sent_s,
                    )
                rest = b""
                async for piece in response.aiter_bytes():
                    now = time.monotonic()
                    *lines, rest = (rest + piece).split(b"\n")
                    silent = not answer.event_times_s
                    for line in lines:
                        _read(line, answer, now)
                    if silent and answer.event_times_s and begun is not None:
                        begun()
        except httpx.TransportError as error:
            raise UnavailableError(f"the connection to {self.url} broke: {error!r}") from error
        answer.ended_s = time.monotonic()
        if not answer.event_times_s:
            raise PenstockError("the server answered without text; a benchmark needs some")
        # A server without usage in streams: an event counts as a token.
        answer.completion_tokens = answer.completion_tokens or len(answer.event_times_s)
        return answer


def _read(line: bytes, answer: Answer, now_s: float) -> None:
    if not line.startswith(b"data:") or line.strip() == b"data: [DONE]":
        return
    event = orjson.loads(line[5:])
    if "error" in event:
        raise PenstockError(f"the server failed: {event['error'].get('message')}")
    for choice in event.get("choices", ()):
        delta = choice.get("delta", {})
        if delta.get("content") or delta.get("reasoning_content") or choice.get("text"):
            answer.event_times_s.append(now_s)
        answer.evidence_spans += len(delta.get("evidence") or ())
    usage = event.get("usage")
    if usage:
        answer.prompt_tokens = usage.get("prompt_tokens", 0)
        answer.completion_tokens = usage.get("completion_tokens", 0)
        details = usage.get("prompt_tokens_details") or {}
        answer.cached_tokens = details.get("cached_tokens") or 0
