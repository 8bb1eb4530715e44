"""One request from worker to worker: its prompt is read and its answer written, whoever fails.

    reading   a prefill worker fails: the next one restores what was committed and goes on there
    writing   a decode worker fails: the next one takes over behind the last token that came here;
              if the store holds nothing to go on from, the prompt and the answer so far are read
              once more

Every token is handed on once: what a worker drew and could not deliver, the next one draws again,
the same (`decode.takeover`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

from cluster.failover.footing import Footing, Ground
from cluster.policy import DECODE, PREFILL
from cluster.workers import DecodeFinished, PrefillFinished, WorkerCalls
from penstock.errors import PenstockError
from penstock.request import Progress, Request, Resume, TokenChunk
from penstock.telemetry import trace


class Relay:
    """Belongs to one request. `read` and `write` run side by side, each once."""

    def __init__(
        self,
        ground: Ground,
        footing: Footing,
        calls: WorkerCalls,
        request: Request,
        resume: Resume,
    ) -> None:
        self.emitted = list(resume.emitted)
        self.prompt_read = asyncio.Event()
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

    async def read(self) -> AsyncIterator[Progress]:
        """Progress of the prompt. Goes on for as long as the answer is written: it may have to be
        read again.
        """
        while True:
            await self._asked.wait()
            self._asked.clear()
            self._reading = self._wanted
            async for progress in self._read_once(tuple(self.emitted)):
                yield progress
            self._reading = None
            self._has_read()

    async def write(self) -> AsyncIterator[TokenChunk | DecodeFinished]:
        """The answer's tokens, each once and in order, and its end."""
        footing = self._footing
        while True:
            worker = footing.route.decode
            resume = Resume(footing.attempt, tuple(self.emitted), self._tell_emitted)
            try:
                with trace.span("decode", worker=worker.worker_id):
                    async for event in self._calls.decode(
                        worker, self._request, resume, self._granted
                    ):
                        footing.patience.progressed()
                        if isinstance(event, DecodeFinished):
                            yield event
                            return
                        if (fresh := self._fresh(event)) is not None:
                            footing.passage.drew(len(fresh.token_ids))
                            yield fresh
                return
            except PenstockError as error:
                await footing.move(DECODE, error)

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
        self.prompt_read.set()

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
                            return
                        if done and not restored:
                            self._ground.lost_tokens += max(0, done - progress.tokens_done)
                        restored = True
                        if progress.tokens_done > done:
                            done = progress.tokens_done
                            footing.patience.progressed()
                        if not emitted and done > self._shown:
                            self._shown = done
                            footing.passage.read(done, progress.cached_tokens)
                            yield replace(progress, tokens_done=done)
                return
            except PenstockError as error:
                if len(self.emitted) > len(emitted):
                    # Decode has all that it needed.
                    return
                await footing.move(PREFILL, error)
