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

Closing the generator walks the arrows backwards: both calls are cancelled, and the workers free
what they hold.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from cluster.contracts import Readiness, ServedModel, WorkerView
from cluster.policy import DECODE, PREFILL, Route, Shape
from cluster.router import Router
from cluster.routing.charge import Charged
from cluster.workers import Hold, StoreNode, WorkerCalls
from penstock.errors import PenstockError, UnavailableError, WorkerUnavailableError
from penstock.request import Event, Finish, Request, TokenChunk, Usage
from penstock.telemetry import trace

# Events between the workers' streams and the client. A slow client stops the streams, it never
# fills memory.
_QUEUE_EVENTS = 256


class Flow:
    """`cluster.contracts.Service` over the workers in the directory."""

    def __init__(
        self, *, router: Router, calls: WorkerCalls, store: StoreNode, served_name: str, hold: Hold
    ) -> None:
        self._router = router
        self._calls = calls
        self._store = store
        self._served_name = served_name
        self._hold = hold
        self._created = int(time.time())

    async def generate(self, request: Request) -> AsyncIterator[Event]:
        """The page that tells the story. Raises the first error of any step."""
        with trace.span("route"):
            decision = await self._router.route(
                Shape(prompt_tokens=len(request.token_ids), max_tokens=request.stop.max_tokens)
            )
        route = decision.route
        events: asyncio.Queue[Event | PenstockError] = asyncio.Queue(_QUEUE_EVENTS)
        with contextlib.closing(self._router.charge(decision)) as charged:
            async with self._hold(route, request.request_id):
                work = asyncio.create_task(self._run(request, route, charged, events))
                try:
                    while True:
                        event = await events.get()
                        if isinstance(event, PenstockError):
                            raise event
                        yield event
                        if isinstance(event, Finish):
                            return
                finally:
                    work.cancel()
                    await asyncio.gather(work, return_exceptions=True)

    async def _run(
        self,
        request: Request,
        route: Route,
        charged: Charged,
        events: asyncio.Queue[Event | PenstockError],
    ) -> None:
        """Reserve, then prefill and decode side by side; the first error ends both."""
        started = time.monotonic()
        timings: dict[str, float] = {}
        cached = 0
        granted = asyncio.Event()

        async def prefill() -> None:
            nonlocal cached
            await granted.wait()
            timings["reserve_s"] = time.monotonic() - started
            with trace.span("prefill", worker=route.prefill.worker_id):
                async for progress in self._calls.prefill(route.prefill, request):
                    cached = progress.cached_tokens
                    charged.read(progress.tokens_done)
                    await events.put(progress)
            timings["prefill_s"] = time.monotonic() - started

        async def decode() -> None:
            with trace.span("decode", worker=route.decode.worker_id):
                async for event in self._calls.decode(route.decode, request, granted):
                    if isinstance(event, TokenChunk):
                        charged.answering()
                        timings.setdefault("ttft_s", time.monotonic() - started)
                        await events.put(event)
                        continue
                    # The count of cached tokens is prefill's; its stream ends with the hand-over.
                    await reading
                    timings["total_s"] = time.monotonic() - started
                    usage = Usage(len(request.token_ids), cached, event.completion_tokens)
                    await events.put(Finish(event.reason, usage, event.text, timings))

        reading = asyncio.create_task(prefill())
        writing = asyncio.create_task(decode())
        tasks = {reading, writing}
        try:
            while tasks:
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
        except PenstockError as error:
            await events.put(error)
        except Exception as error:
            await events.put(PenstockError(f"the request failed inside the front: {error!r}"))
            raise
        finally:
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)

    async def model(self) -> ServedModel:
        workers = await self._router.workers()
        if not any(w.role == DECODE for w in workers):
            raise WorkerUnavailableError("no decode worker has registered yet; see /ready")
        decode = next(w for w in workers if w.role == DECODE)
        fingerprint = decode.fingerprint.hex()
        return ServedModel(self._served_name, self._created, decode.max_model_len, fingerprint)

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
        await self._router.close()
        with contextlib.suppress(Exception):
            await self._calls.close()
        await self._store.close()
