"""The router: the board of `cluster.routing`, fed from the directory in the background, and the
policy that chooses on it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from dataclasses import dataclass, replace
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
    Resident,
    Route,
    RoutingPolicy,
    Shape,
)
from cluster.routing.board import Board, most_of, others_of
from cluster.routing.choice import open_policy
from cluster.routing.fit import coefficients_of
from cluster.routing.learnt import Learnt
from cluster.routing.passage import Books, Passage, Prompt
from cluster.routing.routed import WORTH_WAITING_TOKENS, InFlight, Seen
from cluster.routing.told import Decisions, Told
from penstock.errors import StoreUnavailableError
from penstock.identity import Chain
from penstock.request import Request
from protos.penstock.kv.v1 import kv_pb2, kv_pb2_grpc

_log = logging.getLogger(__name__)
_ROLES = {kv_pb2.WORKER_ROLE_PREFILL: PREFILL, kv_pb2.WORKER_ROLE_DECODE: DECODE}
_RPC_TIMEOUT_S = 2.0
_HASHED_AT_ONCE = 16_384
"""Tokens of a prompt that are hashed on the event loop (some 0.3 ms); more go to a thread."""
_FITS_TO_SPARE = 256
_NO_MIRROR_S = float("inf")
_LAG_S = 2.0
"""How old a heartbeat may be in what the directory tells: its period, and a refresh."""


class Router:
    """Owns the board. `route` needs no round trip while the picture of the directory is fresh.

    The picture is at most `refresh_s` old; one older than `stale_s` is fetched anew before it is
    used, and if that fails the old one serves on: workers are called directly, so a lost directory
    alone stops nothing.
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
        self._books = Books(Board(), InFlight(), {}, Learnt(), time.monotonic)
        # Nothing else looks at it, and it is as large as what was routed lately.
        self._seen = Seen() if policy is RoutingPolicy.BLOCK_OVERLAP else None
        self._decisions = Decisions()
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

    async def route(self, request: Request, *, avoid: frozenset[str] = NOBODY) -> Passage:
        """Both workers, charged until the passage is closed, which is the caller's to do.

        Raises `WorkerUnavailableError`, or as `workers`.
        """
        decision, ids = await self._decide(request, avoid)
        # Since the choice nothing has waited: no other request saw the board in between.
        reading, worker_id = None, decision.route.prefill.worker_id
        new_tokens = decision.shape.prompt_tokens - decision.resident.resumable_tokens
        if ids is not None and self._seen is not None:
            self._seen.note(worker_id, ids.blocks)
        if ids is not None and new_tokens >= WORTH_WAITING_TOKENS:
            reading = self._books.flying.begin(worker_id, ids.blocks)
        prompt = None
        if ids is not None and ids.fingerprint == decision.route.prefill.fingerprint:
            prompt = Prompt(ids.chain, request.boundaries)
        return Passage(
            self._books, decision.route, decision.shape, decision.resident, reading, prompt
        )

    async def decide(self, request: Request, *, avoid: frozenset[str] = NOBODY) -> Decision:
        """As `route`, and nothing is charged."""
        return (await self._decide(request, avoid))[0]

    def passage(self, route: Route, request: Request) -> Passage:
        """Over workers that a failure brought together: one of them was kept."""
        return Passage(self._books, route, _shape(request))

    async def _decide(
        self, request: Request, avoid: frozenset[str]
    ) -> tuple[Decision, _Ids | None]:
        await self.workers()
        ids = await self._ids(request)
        resident = NOTHING if ids is None else self._resident(ids)
        board = self._books.board
        decision = self._policy.choose(board, _shape(request), resident, avoid=avoid)
        board.turn += 1
        self._decisions.keep(
            request.request_id,
            decision,
            tenant=request.tenant,
            at=time.time(),
            mirror_age_s=_NO_MIRROR_S,
            rows=len(self._workers),
        )
        return decision, ids

    def told(self, request_id: str, *, tenant: bytes) -> Told | None:
        """A decision of this front's last ones; None for another tenant's."""
        return self._decisions.told(request_id, tenant=tenant)

    async def _ids(self, request: Request) -> _Ids | None:
        """Under the fingerprint of most workers: during an upgrade the others begin empty. None if
        there is no worker.
        """
        groups = self._books.board.groups
        if not groups:
            return None
        fingerprint = max(groups, key=lambda g: len(g.prefill.workers)).fingerprint
        start = Chain.start(fingerprint, request.namespace)
        tokens = request.token_ids
        if len(tokens) <= _HASHED_AT_ONCE:
            return _Ids(fingerprint, start.extend(tokens))
        return _Ids(fingerprint, await asyncio.to_thread(start.extend, tokens))

    def _resident(self, ids: _Ids) -> Resident:
        near = self._books.flying.near(ids.blocks)
        seen = {} if self._seen is None else self._seen.seen(ids.blocks)
        known = self._books.learnt.resident(ids.chain)
        return replace(known, near=near, seen=seen, fingerprint=ids.fingerprint)

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
        self._show()

    def _show(self) -> None:
        """The new picture on the board, with what is known of each worker by now."""
        board, fits, others = self._books.board, self._books.fits, {}
        self._peaks.append(board.take_peaks())
        pools: dict[tuple[str, bytes], list[str]] = {}
        for worker in self._workers:
            ours = most_of([peaks.get(worker.worker_id, NO_LOAD) for peaks in self._peaks])
            others[worker.worker_id] = others_of(worker, ours)
            pools.setdefault((worker.role, worker.fingerprint), []).append(worker.worker_id)
        if len(fits) > 2 * len(self._workers) + _FITS_TO_SPARE:
            for gone in fits.keys() - {worker.worker_id for worker in self._workers}:
                del fits[gone]
        like = {w.worker_id: pools[w.role, w.fingerprint] for w in self._workers}
        board.show(self._workers, coefficients=coefficients_of(fits, like), others=others)


@dataclass(frozen=True)
class _Ids:
    """A prompt's identity under one fingerprint."""

    fingerprint: bytes
    chain: Chain

    @property
    def blocks(self) -> tuple[bytes, ...]:
        return self.chain.blocks


def _shape(request: Request) -> Shape:
    return Shape(
        prompt_tokens=len(request.token_ids),
        max_tokens=request.stop.max_tokens,
        priority=request.priority.name.lower(),
        tenant=request.tenant.hex(),
    )


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
