"""One response on its way out: runs `Service.generate`, streams or collects, cancels on disconnect.

The status line waits for the first event, so that a refusal keeps its HTTP status; it does not wait
for the first token. Three tasks share a response: the pump, a watcher that cancels the pump when
the client goes away, and a ticker that breaks long silences.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from cluster.api import errors
from cluster.api.choices import Choice, Total, run
from cluster.api.logprobs import Entry
from cluster.api.reconnect import Kept
from cluster.api.render import KEEP_ALIVE, Render, progress_comment, sse
from cluster.contracts import Service
from penstock.errors import DeadlineError, PenstockError, UnavailableError
from penstock.request import Finish, Progress, TokenChunk
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
    """All that is needed to produce one response."""

    answer_id: str
    choices: Sequence[Choice]
    render: Render
    meter: RequestMeter
    stream: bool
    keep_alive_s: float
    timeout_s: float
    kept: Kept | None = None
    """Set if its client can go on reading after a front died; then there is one choice."""

    def opening(self) -> bytes:
        return self.numbered(0, self.render.opening(self.choices))

    def numbered(self, position: int, data: bytes) -> bytes:
        """Events with their ids, if the stream is kept."""
        return data if self.kept is None else self.kept.ids.number(position, data)

    def note(self, event: Progress | TokenChunk) -> None:
        if self.kept is not None:
            self.kept.note(event)


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
            helpers.append(asyncio.create_task(_tick(wire, self._answer)))
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
            _log.exception("request %s failed", self._answer.answer_id)
            await self._fail(errors.unexpected(), wire, scope, receive)

    async def _fail(
        self, error: PenstockError, wire: _Wire, scope: Scope, receive: Receive
    ) -> None:
        self._answer.meter.fail(error)
        await wire.fail(error, scope, receive)

    def _events(self) -> Any:
        """As a closing context: leaving it cancels the request."""
        return aclosing(run(self._service, self._answer.choices))

    async def _stream(self, wire: _Wire) -> None:
        answer, total = self._answer, Total()
        left = len(answer.choices)
        async with self._events() as events:
            async for choice, event in events:
                if not wire.started:
                    await wire.start_stream(answer.opening())
                if isinstance(event, TokenChunk):
                    answer.note(event)
                    position = event.index + len(event.token_ids)
                    data = answer.numbered(position, self._chunk(choice, event))
                    if data:
                        await wire.write(data)
                        if event.arrived_s is not None:
                            answer.meter.handed_over(event.arrived_s)
                elif isinstance(event, Progress):
                    answer.note(event)
                    if choice.leads:
                        await wire.write(progress_comment(event))
                else:
                    total.add(choice, event)
                    left -= 1
                    timings = {**event.timings, **answer.meter.timings()}
                    last = self._last(choice, event) + answer.render.final(choice, event, timings)
                    if left:
                        await wire.write(last)
                        continue
                    answer.meter.end(total.reason, total.usage, total.timings)
                    if answer.kept is not None:
                        answer.kept.end()
                    last += answer.render.closing(total, timings)
                    await wire.end(answer.numbered(event.usage.completion_tokens + 1, last))
                    return
        raise errors.unexpected()

    def _chunk(self, choice: Choice, event: TokenChunk) -> bytes:
        """What goes out with these tokens; perhaps nothing."""
        render = self._answer.render
        if event.text:
            self._answer.meter.text()
        entries = choice.logprobs.feed(event) if choice.logprobs is not None else ()
        extra = self._extra(choice, event)
        if choice.parts is not None:
            return self._deltas(choice, choice.parts.feed(event), extra, entries)
        if extra or entries:
            return render.text_with(choice, event.text, extra, entries)
        return render.text(choice, event.text) if event.text else b""

    def _deltas(
        self,
        choice: Choice,
        deltas: list[dict[str, Any]],
        extra: dict[str, Any],
        entries: Sequence[Entry],
    ) -> bytes:
        """Extension fields and log probabilities go with the first delta, or alone."""
        render = self._answer.render
        if extra or entries:
            deltas = [{**deltas[0], **extra}, *deltas[1:]] if deltas else [extra]
        return b"".join(
            render.delta(choice, delta, () if i else entries) for i, delta in enumerate(deltas)
        )

    def _extra(self, choice: Choice, chunk: TokenChunk) -> dict[str, Any]:
        """Extension fields that the client asked for; usually none."""
        extra: dict[str, Any] = {}
        if choice.evidence is not None:
            found = choice.evidence.add(chunk)
            if found:
                extra["evidence"] = found
        if choice.tokens is not None:
            extra |= choice.tokens.add(chunk)
        return extra

    def _last(self, choice: Choice, finish: Finish) -> bytes:
        """What was held back until the end, and what is known only then."""
        render = self._answer.render
        entries = choice.logprobs.close(finish.text) if choice.logprobs is not None else ()
        if choice.parts is not None:
            last = self._deltas(choice, choice.parts.close(finish), {}, entries)
        elif entries:
            last = render.text_with(choice, finish.text, {}, entries)
        else:
            last = render.text(choice, finish.text) if finish.text else b""
        told = choice.told("answer_evidence")
        if not told:
            return last
        if choice.parts is not None:
            return last + render.delta(choice, told)
        return last + render.text_with(choice, "", told, ())

    async def _collect(self, wire: _Wire) -> None:
        answer, total = self._answer, Total()
        texts: dict[int, list[str]] = {choice.index: [] for choice in answer.choices}
        ends: dict[int, Finish] = {}
        async with self._events() as events:
            async for choice, event in events:
                if isinstance(event, TokenChunk):
                    if event.text:
                        answer.meter.text()
                    texts[choice.index].append(event.text)
                    if choice.logprobs is not None:
                        choice.logprobs.feed(event)
                    if choice.parts is not None:
                        choice.parts.feed(event)
                    self._extra(choice, event)
                elif isinstance(event, Finish):
                    texts[choice.index].append(event.text)
                    ends[choice.index] = event
                    if choice.logprobs is not None:
                        choice.logprobs.close(event.text)
                    if choice.parts is not None:
                        choice.parts.close(event)
                    total.add(choice, event)
                    if len(ends) == len(answer.choices):
                        # Before the events are closed: that may have to wait for the cluster.
                        answers = [
                            (c, "".join(texts[c.index]), ends[c.index]) for c in answer.choices
                        ]
                        timings = {**total.timings, **answer.meter.timings()}
                        answer.meter.end(total.reason, total.usage, total.timings)
                        await wire.whole(answer.render.whole(answers, total, timings))
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


async def _tick(wire: _Wire, answer: Answer) -> None:
    clock = asyncio.get_running_loop().time
    with contextlib.suppress(OSError):
        while True:
            wait_s = wire.last_s + answer.keep_alive_s - clock()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
                continue
            await wire.start_stream(answer.opening())
            await wire.write(KEEP_ALIVE)
