"""The router: a mirror of the directory, refreshed in the background, and the charges of requests
on their way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator

import grpc

from cluster.contracts import WorkerView
from cluster.policy import DECODE, PREFILL, Charge, Route, choose
from penstock.errors import StoreUnavailableError
from protos.penstock.kv.v1 import kv_pb2, kv_pb2_grpc

_log = logging.getLogger(__name__)
_ROLES = {kv_pb2.WORKER_ROLE_PREFILL: PREFILL, kv_pb2.WORKER_ROLE_DECODE: DECODE}
_RPC_TIMEOUT_S = 2.0


class Router:
    """Owns the mirror. `route` needs no round trip while the mirror is fresh.

    The mirror is at most `refresh_s` old; a picture older than `stale_s` is fetched anew before it
    is used, and if that fails the old one serves on: workers are called directly, so a lost
    directory alone stops nothing.
    """

    def __init__(
        self, channel: grpc.aio.Channel, *, refresh_s: float = 0.5, stale_s: float = 2.0
    ) -> None:
        self._stub = kv_pb2_grpc.DirectoryStub(channel)
        self._refresh_s = refresh_s
        self._stale_s = stale_s
        self._workers: tuple[WorkerView, ...] = ()
        self._fetched_at = float("-inf")
        self._charges: dict[str, list[Charge]] = {}
        self._refresher: asyncio.Task[None] | None = None

    async def workers(self, *, fresh: bool = False) -> tuple[WorkerView, ...]:
        """Live workers. Raises `StoreUnavailableError` if the directory was never reached."""
        if self._refresher is None:
            self._refresher = asyncio.create_task(self._refresh_forever())
        age = time.monotonic() - self._fetched_at
        if fresh or age > self._stale_s:
            await self._refresh()
        return self._workers

    @contextlib.contextmanager
    def charged(self, route: Route, *, prompt_tokens: int, total_tokens: int) -> Iterator[None]:
        """Charge both workers of `route` for as long as the request is on its way."""
        prefill = Charge(tokens=prompt_tokens, requests=1)
        size_bytes = int(total_tokens * route.decode.bytes_per_token)
        decode = Charge(requests=1, size_bytes=size_bytes)
        for worker, charge in ((route.prefill, prefill), (route.decode, decode)):
            self._charges.setdefault(worker.worker_id, []).append(charge)
        try:
            yield
        finally:
            for worker, charge in ((route.prefill, prefill), (route.decode, decode)):
                held = self._charges[worker.worker_id]
                held.remove(charge)
                if not held:
                    del self._charges[worker.worker_id]

    async def route(self, *, total_tokens: int, avoid: frozenset[str] = frozenset()) -> Route:
        workers = await self.workers()
        totals = {
            worker_id: Charge(
                tokens=sum(c.tokens for c in held),
                requests=len(held),
                size_bytes=sum(c.size_bytes for c in held),
            )
            for worker_id, held in self._charges.items()
        }
        return choose(workers, totals, total_tokens=total_tokens, avoid=avoid)

    async def close(self) -> None:
        if self._refresher is not None:
            self._refresher.cancel()
            await asyncio.gather(self._refresher, return_exceptions=True)
            self._refresher = None

    async def _refresh_forever(self) -> None:
        while True:
            await asyncio.sleep(self._refresh_s)
            try:
                await self._refresh()
            except StoreUnavailableError as error:
                _log.warning("directory not reachable, routing on the last picture: %s", error)

    async def _refresh(self) -> None:
        try:
            answer = await self._stub.List(kv_pb2.ListRequest(), timeout=_RPC_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            if self._workers:
                return
            raise StoreUnavailableError(
                f"the store node with the worker directory cannot be reached ({error.code().name})"
            ) from error
        self._workers = tuple(_view(w) for w in answer.workers if w.role in _ROLES)
        self._fetched_at = time.monotonic()


def _view(worker: kv_pb2.Worker) -> WorkerView:
    return WorkerView(
        worker_id=worker.worker_id,
        role=_ROLES[worker.role],
        address=worker.address,
        pid=worker.pid,
        running=worker.running,
        queued=worker.queued,
        queued_tokens=worker.queued_tokens,
        capacity_bytes=max(1, worker.capacity_bytes),
        used_bytes=worker.used_bytes,
        draining=worker.draining,
        fingerprint=worker.fingerprint,
        max_model_len=worker.max_model_len,
        bytes_per_token=worker.bytes_per_token,
        metrics=dict(worker.metrics),
    )
