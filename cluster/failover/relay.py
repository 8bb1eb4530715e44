"""One request from worker to worker: its prompt is read and its answer written, whoever fails.

    reading   a prefill worker fails: the next one restores what was committed and goes on there
    writing   a decode worker fails: the next one takes over behind the last token that came here;
              if the store holds nothing to go on from, the prompt and the answer so far are read
              once more

Every token is handed on once: what a worker drew and could not deliver, the next one draws again,
the same (`decode.takeover`).

Until the first token comes, two workers have something to tell; from then on whoever asks for the
next event reads the decode worker's stream itself. A queue in between would let every token of a
worker's step wait until all of them are read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace

from cluster.failover.footing import Footing, Ground
from cluster.policy import DECODE, PREFILL
from cluster.workers import Cancellable, DecodeFinished, PrefillFinished, WorkerCalls
from penstock.errors import PenstockError, WorkerUnavailableError
from penstock.request import Progress, Request, Resume, TokenChunk
from penstock.telemetry import trace

Told = Progress | TokenChunk | DecodeFinished

_QUEUE_EVENTS = 256
"""Of progress, for a client that is slow to read it."""


class Relay:
    """Belongs to one request. `events` is asked for once."""

    def __init__(
        self,
        ground: Ground,
        footing: Footing,
        calls: WorkerCalls,
        request: Request,
    ) -> None:
        resume = request.resume
        self.emitted = list(resume.emitted)
        self.cached_tokens = resume.cached_tokens
        """Of the prompt, by the first worker: what a second restores, the first has computed."""
        self._prompt_read = asyncio.Event()
        """Set once a prefill worker has read the prompt to its end, or needs not."""
        self.timings: dict[str, float] = {}
        self._started = time.monotonic()
        self._ground = ground
        self._footing = footing
        self._calls = calls
        self._request = request
        self._tell_emitted = resume.tell_emitted
        self._told = 0 if resume.tell_emitted else len(resume.emitted)
        """Tokens handed on from here."""
        self._asked = asyncio.Event()
        self._wanted: int | None = None
        """Emitted tokens that prefill must read besides the prompt, the last one excepted."""
        self._reading: int | None = None
        self._shown = -1
        """Prompt tokens that were told to be ready."""
        self._answering = False
        self._call: Cancellable | None = None
        self._broken: Exception | None = None
        """Why the prompt cannot be read, if so."""

    async def events(self) -> AsyncGenerator[Told]:
        """Progress of the prompt, then the answer's tokens, each once and in order, and its end.

        Raises the first error that no other worker can mend. Closing it cancels both calls.
        """
        queue: asyncio.Queue[Told | Exception] = asyncio.Queue(_QUEUE_EVENTS)
        async with aclosing(self._write()) as written:
            tasks = (
                asyncio.create_task(self._tell_progress(queue)),
                asyncio.create_task(_tell_first(written, queue)),
            )
            try:
                while not self._answering:
                    event = await queue.get()
                    if isinstance(event, Exception):
                        raise event
                    self._answering = not isinstance(event, Progress)
                    if not isinstance(event, DecodeFinished):
                        yield event
                        continue
                    yield await self._ended(event)
                async for event in written:
                    yield await self._ended(event) if isinstance(event, DecodeFinished) else event
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _ended(self, event: DecodeFinished) -> DecodeFinished:
        """The count of cached tokens is prefill's; its stream ends with the hand-over."""
        await self._prompt_read.wait()
        return event

    async def _tell_progress(self, queue: asyncio.Queue[Told | Exception]) -> None:
        try:
            async for progress in self._read():
                if not self._answering:
                    await queue.put(progress)
        except Exception as error:
            self._broken = error
            self._prompt_read.set()
            if not self._answering:
                await queue.put(error)
            elif self._call is not None:
                # Whoever waits for a token hears it from there.
                self._call.cancel()

    async def _read(self) -> AsyncIterator[Progress]:
        """Goes on for as long as the answer is written: the prompt may have to be read again."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._reading = self._wanted
            async for progress in self._read_once(tuple(self.emitted)):
                yield progress
            self._reading = None
            self._has_read()

    async def _write(self) -> AsyncGenerator[TokenChunk | DecodeFinished]:
        footing = self._footing
        while True:
            if self._broken is not None:
                raise self._broken
            worker = footing.route.decode
            resume = Resume(footing.attempt, tuple(self.emitted), self._tell_emitted)
            try:
                with trace.span("decode", worker=worker.worker_id):
                    async for event in self._calls.decode(
                        worker, self._request, resume, self._granted, self._calling
                    ):
                        footing.patience.progressed()
                        if isinstance(event, DecodeFinished):
                            yield event
                            return
                        if (fresh := self._fresh(event)) is not None:
                            footing.passage.drew(len(fresh.token_ids))
                            yield fresh
                raise WorkerUnavailableError(
                    f"the decode worker {worker.worker_id} ended its stream before the answer's end"
                )
            except asyncio.CancelledError:
                if self._broken is None:
                    raise
                raise self._broken from None
            except PenstockError as error:
                await footing.move(DECODE, error)

    def _calling(self, call: Cancellable) -> None:
        self._call = call

    def _fresh(self, chunk: TokenChunk) -> TokenChunk | None:
        """The chunk if it is new. Raises if it leaves a gap: then a token would be lost."""
        if chunk.index + len(chunk.token_ids) <= self._told:
            return None
        if chunk.index != self._told:
            raise PenstockError(
                f"a decode worker sent token {chunk.index} where {self._told} was next"
            )
        self._told += len(chunk.token_ids)
        self.emitted += chunk.token_ids[max(0, len(self.emitted) - chunk.index) :]
        return chunk

    def _granted(self, needs_prefill: bool) -> None:
        """A decode worker has reserved; does it wait for something to be read?"""
        self.timings.setdefault("reserve_s", time.monotonic() - self._started)
        self._footing.passage.granted()
        if not needs_prefill:
            self._has_read()
            return
        count = len(self.emitted)
        if self._reading != count:
            self._wanted = count
            self._asked.set()

    def _has_read(self) -> None:
        self.timings.setdefault("prefill_s", time.monotonic() - self._started)
        self._prompt_read.set()

    async def _read_once(self, emitted: tuple[int, ...]) -> AsyncIterator[Progress]:
        footing, done = self._footing, 0
        whole = Resume(emitted=emitted).absorbed(self._request.token_ids)
        request = replace(self._request, token_ids=whole)
        while True:
            worker, restored = footing.route.prefill, False
            try:
                with trace.span("prefill", worker=worker.worker_id):
                    async for progress in self._calls.prefill(worker, request, footing.attempt):
                        if isinstance(progress, PrefillFinished):
                            if not emitted:
                                cached, took_s = progress.cached_tokens, progress.compute_s
                                footing.passage.computed(cached, took_s)
                            continue
                        if self.cached_tokens is None:
                            self.cached_tokens = progress.cached_tokens
                        if done and not restored:
                            self._ground.lost_tokens += max(0, done - progress.tokens_done)
                        restored = True
                        if progress.tokens_done > done:
                            done = progress.tokens_done
                            footing.patience.progressed()
                        if not emitted and done > self._shown:
                            self._shown = done
                            footing.passage.read(done, progress.cached_tokens)
                            yield replace(
                                progress, tokens_done=done, cached_tokens=self.cached_tokens
                            )
                return
            except PenstockError as error:
                if len(self.emitted) > len(emitted):
                    # Decode has all that it needed.
                    return
                await footing.move(PREFILL, error)


async def _tell_first(
    written: AsyncGenerator[TokenChunk | DecodeFinished], queue: asyncio.Queue[Told | Exception]
) -> None:
    try:
        await queue.put(await anext(written))
    except Exception as error:
        await queue.put(error)
