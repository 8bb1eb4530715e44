"""One answer on its way out: runs `Service.generate`, streams or collects, cancels on disconnect.

The status line waits for the first event, so that a refusal keeps its HTTP status; it does not wait
for the first token. Three tasks share a response: the pump, a watcher that cancels the pump when
the client goes away, and a ticker that breaks long silences.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, cast

from fastapi import Response
from starlette.types import Receive, Scope, Send

from cluster.api import errors
from cluster.api.evidence import EvidenceText
from cluster.api.grounding import Grounding
from cluster.api.parts import AnswerParts
from cluster.api.render import (
    KEEP_ALIVE,
    Render,
    TokenRecord,
    progress_comment,
    sse,
)
from cluster.contracts import Service
from penstock.errors import DeadlineError, PenstockError, UnavailableError
from penstock.request import Event, Finish, Progress, Request, TokenChunk
from penstock.telemetry import RequestMeter

_log = logging.getLogger(__name__)
_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Proxies of the nginx family would hold the stream back.
    (b"x-accel-buffering", b"no"),
]


@dataclass(frozen=True)
class Answer:
    """All that is needed to produce one answer."""

    request: Request
    render: Render
    evidence: EvidenceText | None
    grounding: Grounding | None
    """The answer is held back until it is checked."""
    tokens: TokenRecord | None
    parts: AnswerParts | None
    """None: the text is the content."""
    meter: RequestMeter
    stream: bool
    keep_alive_s: float
    timeout_s: float


class AnswerResponse(Response):
    """The ASGI side of an `Answer`. `on_end` is called once, whatever happened.

    It is called before the last byte goes: a client with as many connections as there are places is
    not refused for what its own last answer still cleans up.
    """

    def __init__(self, service: Service, answer: Answer, on_end: Callable[[], None]) -> None:
        super().__init__()
        self._service = service
        self._answer = answer
        self._on_end: Callable[[], None] | None = on_end

    def _ends(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        wire = _Wire(send, self._ends)
        work = self._stream if self._answer.stream else self._collect
        pump = asyncio.create_task(self._pump(work, wire, scope, receive))
        watcher = asyncio.create_task(_gone(receive))
        helpers = [watcher]
        if self._answer.stream:
            helpers.append(
                asyncio.create_task(_tick(wire, self._answer.keep_alive_s, self._answer.render))
            )
        try:
            await asyncio.wait({pump, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not pump.done():
                pump.cancel()
            await asyncio.wait({pump})
        except asyncio.CancelledError:
            # The server stops and its grace is over: the client hears why, not just silence.
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
            stopping = UnavailableError("the server is stopping; send the request again")
            await self._fail(stopping, wire, scope, receive)
            raise
        finally:
            for task in (pump, *helpers):
                task.cancel()
            await asyncio.gather(pump, *helpers, return_exceptions=True)
            # Counts only if nothing else has: then the client went away.
            self._answer.meter.end("cancelled")
            self._ends()

    async def _pump(
        self,
        work: Callable[[_Wire], Awaitable[None]],
        wire: _Wire,
        scope: Scope,
        receive: Receive,
    ) -> None:
        try:
            try:
                async with asyncio.timeout(self._answer.timeout_s):
                    await work(wire)
            except TimeoutError:
                raise DeadlineError(
                    f"the answer was not ready after {self._answer.timeout_s:.0f} s; ask for less "
                    "or raise front.request_timeout_s"
                ) from None
        except PenstockError as error:
            await self._fail(error, wire, scope, receive)
        except OSError:
            # The transport broke while sending: the client is gone.
            return
        except Exception:
            _log.exception("request %s failed", self._answer.request.request_id)
            await self._fail(errors.unexpected(), wire, scope, receive)

    async def _fail(
        self, error: PenstockError, wire: _Wire, scope: Scope, receive: Receive
    ) -> None:
        self._answer.meter.fail(error)
        await wire.fail(error, scope, receive)

    def _events(self) -> Any:
        """As a closing context: leaving it cancels the request."""
        # Every `generate` is an async generator; the contract promises an iterator with aclose.
        events = self._service.generate(self._answer.request)
        if self._answer.grounding is not None:
            events = self._answer.grounding.events(events)
        return aclosing(cast(Any, events))

    async def _stream(self, wire: _Wire) -> None:
        render, meter = self._answer.render, self._answer.meter
        async with self._events() as events:
            async for event in cast(AsyncIterator[Event], events):
                if not wire.started:
                    await wire.start_stream(render.opening())
                if isinstance(event, TokenChunk):
                    extra = self._extra(event)
                    if event.text:
                        meter.text()
                    if self._answer.parts is not None:
                        await self._write_parts(self._answer.parts.feed(event), extra, wire)
                    elif extra:
                        await wire.write(render.text_with(event.text, extra))
                    elif event.text:
                        await wire.write(render.text(event.text))
                elif isinstance(event, Progress):
                    await wire.write(progress_comment(event))
                else:
                    await self._finish(event, wire)
                    return
        raise errors.unexpected()

    async def _write_parts(
        self, deltas: list[dict[str, Any]], extra: dict[str, Any], wire: _Wire
    ) -> None:
        """Extension fields go with the first delta, or alone."""
        render = self._answer.render
        if extra:
            deltas = [{**deltas[0], **extra}, *deltas[1:]] if deltas else [extra]
        if deltas:
            await wire.write(b"".join(render.delta(delta) for delta in deltas))

    def _extra(self, chunk: TokenChunk) -> dict[str, Any]:
        """Extension fields that the client asked for; usually none."""
        extra: dict[str, Any] = {}
        answer = self._answer
        if answer.evidence:
            found = answer.evidence.add(chunk)
            if found:
                extra["evidence"] = found
        if answer.tokens is not None:
            extra |= answer.tokens.add(chunk)
        return extra

    async def _finish(self, finish: Finish, wire: _Wire) -> None:
        answer = self._answer
        if answer.parts is None:
            last = answer.render.text(finish.text) if finish.text else b""
        else:
            last = b"".join(answer.render.delta(delta) for delta in answer.parts.close(finish))
        last += self._summary()
        timings = {**finish.timings, **answer.meter.timings()}
        answer.meter.end(finish.reason, finish.usage, finish.timings)
        await wire.end(last + answer.render.closing(finish, timings, answer.parts))

    def _summary(self) -> bytes:
        """A chunk with what is known only at the end: evidence of the whole answer, grounding."""
        answer = self._answer
        extra: dict[str, Any] = {}
        if answer.evidence is not None:
            extra["answer_evidence"] = answer.evidence.of_answer()
        if answer.grounding is not None:
            extra["grounding"] = answer.grounding.told
        if not extra:
            return b""
        if answer.parts is None:
            return answer.render.text_with("", extra)
        return answer.render.delta(extra)

    async def _collect(self, wire: _Wire) -> None:
        answer = self._answer
        texts: list[str] = []
        async with self._events() as events:
            async for event in cast(AsyncIterator[Event], events):
                if isinstance(event, TokenChunk):
                    if event.text:
                        answer.meter.text()
                    if answer.parts is not None:
                        answer.parts.feed(event)
                    elif event.text:
                        texts.append(event.text)
                    self._extra(event)
                elif isinstance(event, Finish):
                    if answer.parts is not None:
                        answer.parts.close(event)
                    else:
                        texts.append(event.text)
                    timings = {**event.timings, **answer.meter.timings()}
                    extra: dict[str, Any] = {}
                    if answer.evidence is not None:
                        extra["evidence"] = answer.evidence.of_answer()
                    if answer.grounding is not None:
                        extra["grounding"] = answer.grounding.told
                    answer.meter.end(event.reason, event.usage, event.timings)
                    message = answer.parts or "".join(texts)
                    await wire.whole(
                        answer.render.whole(message, event, timings, extra, answer.tokens)
                    )
                    return
        raise errors.unexpected()


class _Wire:
    """Serialises what pump and ticker send, and knows when the last byte went."""

    def __init__(self, send: Send, before_last: Callable[[], None]) -> None:
        self.raw = send
        self._before_last = before_last
        self.started = False
        self._ended = False
        self.last_s = asyncio.get_running_loop().time()
        self._clock = asyncio.get_running_loop().time
        self._lock = asyncio.Lock()

    async def start_stream(self, first: bytes) -> None:
        async with self._lock:
            if self.started:
                return
            self.started = True
            await self.raw(
                {"type": "http.response.start", "status": 200, "headers": list(_SSE_HEADERS)}
            )
            await self._body(first, more=True)

    async def write(self, data: bytes) -> None:
        async with self._lock:
            await self._body(data, more=True)

    async def end(self, data: bytes) -> None:
        async with self._lock:
            await self._body(data, more=False)

    async def whole(self, body: bytes) -> None:
        async with self._lock:
            self.started = True
            headers = [
                (b"content-type", b"application/json"),
                (b"content-length", str(len(body)).encode()),
            ]
            await self.raw({"type": "http.response.start", "status": 200, "headers": headers})
            await self._body(body, more=False)

    async def fail(self, error: PenstockError, scope: Scope, receive: Receive) -> None:
        """A whole error response, or an error event if the stream has begun."""
        async with self._lock:
            if self.started:
                await self._body(sse(errors.body(error)), more=False)
            else:
                self.started = self._ended = True
                self._before_last()
                await errors.response(error)(scope, receive, self.raw)

    async def _body(self, data: bytes, *, more: bool) -> None:
        if self._ended:
            return
        self._ended = not more
        if self._ended:
            self._before_last()
        self.last_s = self._clock()
        await self.raw({"type": "http.response.body", "body": data, "more_body": more})


async def _gone(receive: Receive) -> None:
    """Returns when the client has gone. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        continue


async def _tick(wire: _Wire, interval_s: float, render: Render) -> None:
    clock = asyncio.get_running_loop().time
    with contextlib.suppress(OSError):
        while True:
            wait_s = wire.last_s + interval_s - clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                continue
            await wire.start_stream(render.opening())
            await wire.write(KEEP_ALIVE)
