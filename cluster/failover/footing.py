"""The two workers that a request is with: charged and held, and exchanged when one fails."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace

from cluster.contracts import WorkerView
from cluster.failover.patience import Patience, Suspects
from cluster.policy import DECODE, PREFILL, Route
from cluster.router import Router
from cluster.routing.passage import Passage
from cluster.workers import Hold
from penstock.errors import PenstockError, UnavailableError, WorkerUnavailableError
from penstock.request import Request
from penstock.telemetry import catalog as M
from penstock.telemetry import trace
from penstock.telemetry.meters import Meters

_log = logging.getLogger(__name__)


@dataclass
class Ground:
    """What a front's requests share."""

    router: Router
    hold: Hold
    window_s: float
    suspects: Suspects = field(default_factory=Suspects)
    failovers: Counter[str] = field(default_factory=Counter)
    """How often a request went to another worker, by the role of the one that failed."""
    has_served: bool = False
    """Has there ever been a route?"""
    lost_tokens: int = 0
    """Prompt tokens that were committed and yet computed again."""

    def tell(self, meters: Meters) -> None:
        """Show these counts as metrics of the front."""
        meters.read(M.PREFILL_FAILOVERS, lambda: self.failovers[PREFILL])
        meters.read(M.DECODE_FAILOVERS, lambda: self.failovers[DECODE])
        meters.read(M.FAILOVER_RECOMPUTED, lambda: self.lost_tokens)

    @contextlib.asynccontextmanager
    async def footing(self, request: Request) -> AsyncIterator[Footing]:
        """A request's workers, from the decision to its end. Raises `WorkerUnavailableError`."""
        with trace.span("route"):
            passage = await self._first(request)
        standing = Footing(self, request, passage)
        try:
            await standing.held.enter_async_context(self.hold(passage.route, request.request_id))
            yield standing
        finally:
            await standing.leave()

    async def _first(self, request: Request) -> Passage:
        """Waits for workers only if there have been some, or are some of the other role: then they
        are on their way back.
        """
        patience = Patience(self.window_s)
        while True:
            workers = await self.router.workers(fresh=bool(patience.failures))
            avoid = self.suspects.among(workers, time.monotonic())
            try:
                passage = await self.router.route(request, avoid=avoid)
            except WorkerUnavailableError as error:
                if not (self.has_served or workers):
                    raise
                await asyncio.sleep(patience.failed(error, time.monotonic()))
                continue
            self.has_served = True
            return passage


class Footing:
    """One request's. `attempt` rises with every move: the fence of what runs now."""

    def __init__(self, ground: Ground, request: Request, passage: Passage) -> None:
        self.passage = passage
        """Its charges, and what its events tell of the two workers."""
        self.attempt = request.resume.attempt
        self.patience = Patience(ground.window_s)
        self.held = AsyncExitStack()
        self._ground = ground
        self._request = request
        self._moving = asyncio.Lock()

    @property
    def route(self) -> Route:
        return self.passage.route

    async def move(self, role: str, error: PenstockError) -> None:
        """To another worker of `role`, or to the same one again if there is no other. Raises
        `error`, or what kept us from it, once the request's patience is at its end.
        """
        ground = self._ground
        failed = self._at(role)
        delay = self.patience.failed(error, time.monotonic())
        if isinstance(error, WorkerUnavailableError):
            ground.suspects.add(failed.address, time.monotonic())
        facts = {"answer_id": self._request.request_id, "worker": failed.worker_id}
        _log.warning(
            "%s failed, going on elsewhere: %s", role, error.message, extra={"facts": facts}
        )
        with trace.span("failover", role=role, worker=failed.worker_id):
            async with self._moving:
                while True:
                    await asyncio.sleep(delay)
                    try:
                        await self._go_to(role, await self._another(role))
                        break
                    except UnavailableError as nobody:
                        delay = self.patience.failed(nobody, time.monotonic())
                self.attempt += 1
        ground.failovers[role] += 1

    def _at(self, role: str) -> WorkerView:
        return self.route.prefill if role == PREFILL else self.route.decode

    async def _another(self, role: str) -> WorkerView:
        """Of the fingerprint that the other worker has: the request's state is in its numbers."""
        ground = self._ground
        other = self._at(DECODE if role == PREFILL else PREFILL)
        workers = await ground.router.workers(fresh=True)
        strangers = {w.worker_id for w in workers if w.fingerprint != other.fingerprint}
        # The other role's suspects are not in question here.
        mine = [w for w in workers if w.role == role]
        avoid = ground.suspects.among(mine, time.monotonic()) | strangers
        route = (await ground.router.decide(self._request, avoid=avoid)).route
        return route.prefill if role == PREFILL else route.decode

    async def _go_to(self, role: str, worker: WorkerView) -> None:
        before, held = self.passage, AsyncExitStack()
        changes = {"prefill": worker} if role == PREFILL else {"decode": worker}
        route = replace(self.route, **changes)
        await held.enter_async_context(self._ground.hold(route, self._request.request_id))
        self.passage = self._ground.router.passage(route, self._request)
        if role == DECODE:
            # What is left for prefill, if anything, is little.
            self.passage.answering()
        before.close()
        before_held, self.held = self.held, held
        await before_held.aclose()

    async def leave(self) -> None:
        self.passage.close()
        await self.held.aclose()
