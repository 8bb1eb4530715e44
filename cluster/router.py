"""The router: the board of `cluster.routing`, fed from the directory in the background, and the
policy that chooses on it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from math import ceil

import grpc

from cluster.contracts import WorkerView
from cluster.policy import (
    DECODE,
    NO_LOAD,
    NOBODY,
    NOTHING,
    PREFILL,
    Decision,
    Load,
    Route,
    RoutingPolicy,
    Shape,
)
from cluster.routing.board import Board, most_of, others_of
from cluster.routing.charge import Charged
from cluster.routing.choice import open_policy
from penstock.errors import StoreUnavailableError
from protos.penstock.kv.v1 import kv_pb2, kv_pb2_grpc

_log = logging.getLogger(__name__)
_ROLES = {kv_pb2.WORKER_ROLE_PREFILL: PREFILL, kv_pb2.WORKER_ROLE_DECODE: DECODE}
_RPC_TIMEOUT_S = 2.0
_LAG_S = 2.0
"""How old a heartbeat may be in what the directory tells: its period, and a refresh."""


class Router:
    """Owns the mirror. `route` needs no round trip while the mirror is fresh.

    The mirror is at most `refresh_s` old; a picture older than `stale_s` is fetched anew before it
    is used, and if that fails the old one serves on: workers are called directly, so a lost
    directory alone stops nothing.
    """

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        policy: RoutingPolicy = RoutingPolicy.COST,
        refresh_s: float = 0.5,
        stale_s: float = 2.0,
    ) -> None:
        self._stub = kv_pb2_grpc.DirectoryStub(channel)
        self._refresh_s = refresh_s
        self._stale_s = stale_s
        self._workers: tuple[WorkerView, ...] = ()
        self._fetched_at = float("-inf")
        self._policy = open_policy(policy)
        self._board = Board()
        self._peaks: deque[dict[str, Load]] = deque(maxlen=max(1, ceil(_LAG_S / refresh_s)))
        self._refresher: asyncio.Task[None] | None = None

    async def workers(self, *, fresh: bool = False) -> tuple[WorkerView, ...]:
        """Live workers. Raises `StoreUnavailableError` if the directory was never reached."""
        if self._refresher is None:
            self._refresher = asyncio.create_task(self._refresh_forever())
        age = time.monotonic() - self._fetched_at
        if fresh or age > self._stale_s:
            await self._refresh()
        return self._workers

    def charge(self, decision: Decision) -> Charged:
        """Charges both workers of a decision until it is closed; the caller closes it."""
        return Charged(self._board, decision.route, decision.shape, decision.resident)

    def charge_route(self, route: Route, shape: Shape) -> Charged:
        """The same for a route that came about by a failure: one of its workers was kept."""
        return Charged(self._board, route, shape, NOTHING)

    async def route(self, shape: Shape, *, avoid: frozenset[str] = NOBODY) -> Decision:
        """Raises `WorkerUnavailableError`, or as `workers`."""
        await self.workers()
        decision = self._policy.choose(self._board, shape, NOTHING, avoid=avoid)
        self._board.turn += 1
        return decision

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
        self._peaks.append(self._board.take_peaks())
        others = {}
        for worker in self._workers:
            ours = most_of([peaks.get(worker.worker_id, NO_LOAD) for peaks in self._peaks])
            others[worker.worker_id] = others_of(worker, ours)
        self._board.show(self._workers, others=others)


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
