"""One request, on one page.

    encode -> route -> reserve -> prefill -> hand over -> decode -> parse and stream

The API has encoded the chat already (`penstock.chat`); parsing and streaming are its job again at
the end. In between:

  route      `cluster.router` picks a prefill and a decode worker of one fingerprint.
  reserve    The decode worker grants memory and a slot *before* any prefill starts.
  prefill    The prefill worker restores the longest resumable prefix from the store, computes the
  rest in chunks and
             publishes each chunk's blocks while the next one runs.
  hand over  Nothing passes through here: the decode worker has been fetching committed blocks from
  the store all along
             and needs only the last ones and the state at the prompt's end.
  decode     Tokens stream straight from the decode worker to this process.

A worker that fails is replaced and the story goes on where it stood (`cluster.failover.relay`,
docs/failover.md): nothing committed is computed again, no token is lost, repeated or another.

Closing the generator walks the arrows backwards: both calls are cancelled, and the workers free
what they hold. A slow client stops the workers' streams, it never fills memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from cluster.contracts import Readiness, ServedModel, WorkerView
from cluster.failover.footing import Ground
from cluster.failover.relay import Relay
from cluster.policy import DECODE, PREFILL
from cluster.router import Router
from cluster.routing.told import Told
from cluster.workers import DecodeFinished, Hold, StoreNode, WorkerCalls
from penstock.errors import UnavailableError, WorkerUnavailableError
from penstock.request import Event, Finish, Request, TokenChunk, Usage


class Flow:
    """`cluster.contracts.Service` over the workers in the directory."""

    def __init__(
        self,
        *,
        router: Router,
        calls: WorkerCalls,
        store: StoreNode,
        served_name: str,
        hold: Hold,
        failover_timeout_s: float = 30.0,
    ) -> None:
        self.ground = Ground(router, hold, failover_timeout_s)
        self._router = router
        self._calls = calls
        self._store = store
        self._served_name = served_name
        self._created = int(time.time())
        self._model: ServedModel | None = None
        self._releasing: set[asyncio.Task[None]] = set()

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        """The page that tells the story. Raises the first error that no other worker can mend."""
        started, prompt_tokens = time.monotonic(), len(request.token_ids)
        timings: dict[str, float] = {}
        is_over = False
        async with self.ground.footing(request) as footing:
            relay = Relay(self.ground, footing, self._calls, request)
            try:
                async with aclosing(relay.events()) as events:
                    async for event in events:
                        if isinstance(event, TokenChunk):
                            timings.setdefault("ttft_s", time.monotonic() - started)
                        if not isinstance(event, DecodeFinished):
                            yield event
                            continue
                        is_over = True
                        timings.update(relay.timings, total_s=time.monotonic() - started)
                        cached = relay.cached_tokens or 0
                        usage = Usage(prompt_tokens, cached, event.completion_tokens)
                        yield Finish(event.reason, usage, event.text, timings)
            finally:
                # A stream that is kept may be another front's by now.
                if not (is_over or request.kept):
                    self._give_up(request.request_id)

    def _give_up(self, request_id: str) -> None:
        """Nobody goes on with it: what its workers still hold in the store may go at once."""
        task = asyncio.create_task(self._store.release(request_id))
        self._releasing.add(task)
        task.add_done_callback(self._releasing.discard)

    async def model(self) -> ServedModel:
        workers = await self._router.workers()
        decode = next((w for w in workers if w.role == DECODE), None)
        if decode is not None:
            name, length = self._served_name, decode.max_model_len
            self._model = ServedModel(name, self._created, length, decode.fingerprint.hex())
        # A directory that was just started knows nobody for a moment; requests wait for workers.
        if self._model is None:
            raise WorkerUnavailableError("no decode worker has registered yet; see /ready")
        return self._model

    async def readiness(self) -> Readiness:
        try:
            workers = await self._router.workers(fresh=True)
            await self._store.stat()
        except UnavailableError as error:
            return Readiness(False, error.message)
        for role in (PREFILL, DECODE):
            if not any(w.role == role and not w.draining for w in workers):
                return Readiness(False, f"no {role} worker has registered")
        return Readiness(True)

    async def workers(self) -> list[WorkerView]:
        return list(await self._router.workers())

    async def route_told(self, request_id: str, *, tenant: bytes) -> Told | None:
        return self._router.told(request_id, tenant=tenant)

    async def store_stat(self) -> dict[str, float]:
        try:
            return await self._store.stat()
        except UnavailableError:
            return {}

    async def expositions(self) -> list[bytes | None]:
        workers = await self._router.workers()
        return [
            *await self._calls.expositions(worker.address for worker in workers),
            await self._store.exposition(),
        ]

    async def close(self) -> None:
        await asyncio.gather(*self._releasing, return_exceptions=True)
        await self._router.close()
        with contextlib.suppress(Exception):
            await self._calls.close()
        await self._store.close()
