"""The pools as Ray Serve deployments: each replica is one worker with its own gRPC endpoint.

Serve starts, health-checks, restarts and drains the replicas. Requests never pass through Serve:
the front calls a worker's address directly. Serve's drain and autoscaling see only Serve requests,
so each stream holds one control-only call (`hold`) open on both its replicas for as long as it
lives.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.serve.request_router import (
    PendingRequest,
    RequestRouter,
    RunningReplica,
)

from cluster.policy import DECODE, PREFILL, Route
from penstock.telemetry.logs import configure_logging
from penstock.worker import WorkerSpec

# Streams that one replica may hold; far above what its own admission lets in, so that Serve never
# queues a hold.
MAX_HOLDS = 10_000


class TargetedRouter(RequestRouter):
    """Sends a call to the replica whose id is its first argument."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not pending_request.args:
            return [candidate_replicas]
        target = pending_request.args[0]
        return [[r for r in candidate_replicas if r.replica_id.unique_id == target]]


class _Replica:
    """What both kinds of replica share: hold, health and drain."""

    def __init__(self) -> None:
        self._ended: dict[str, asyncio.Event] = {}

    async def hold(self, worker_id: str, request_id: str) -> None:
        """Stays open until the front cancels it. `worker_id` is read by `TargetedRouter`."""
        ended = self._ended.setdefault(request_id, asyncio.Event())
        try:
            await ended.wait()
        finally:
            self._ended.pop(request_id, None)


class PrefillReplica(_Replica):
    """A prefill worker inside a Serve replica."""

    async def __init__(self, spec_json: str) -> None:  # type: ignore[misc]  # Serve awaits it
        super().__init__()
        from cluster.launchers.ray_ranks import ActorRank
        from prefill.worker import open_worker

        spec = _named(spec_json)
        configure_logging(level=spec.telemetry.log_level, process=spec.worker_id)
        self._worker = await open_worker(spec, ActorRank)
        await self._worker.start()

    async def check_health(self) -> None:
        self._worker.check()

    async def __del__(self) -> None:  # Serve awaits it after the last hold has ended
        await self._worker.stop()


class DecodeReplica(_Replica):
    """A decode worker inside a Serve replica."""

    async def __init__(self, spec_json: str) -> None:  # type: ignore[misc]
        super().__init__()
        from cluster.launchers.ray_ranks import ActorRank
        from decode.worker import open_worker

        spec = _named(spec_json)
        configure_logging(level=spec.telemetry.log_level, process=spec.worker_id)
        self._worker = await open_worker(spec, ActorRank)
        await self._worker.start()

    async def check_health(self) -> None:
        self._worker.check()

    async def __del__(self) -> None:
        await self._worker.stop()


def _named(spec_json: str) -> WorkerSpec:
    """The pool's spec with this replica's own id, by which `TargetedRouter` finds it."""
    spec = WorkerSpec.model_validate_json(spec_json)
    return spec.model_copy(update={"worker_id": serve.get_replica_context().replica_id.unique_id})


class ServeHold:
    """`cluster.workers.Hold` through Serve handles."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}

    def _handle(self, role: str) -> Any:
        if role not in self._handles:
            self._handles[role] = serve.get_app_handle(role)
        return self._handles[role]

    @contextlib.asynccontextmanager
    async def __call__(self, route: Route, request_id: str) -> AsyncIterator[None]:
        calls = [
            self._handle(role).hold.remote(worker.worker_id, request_id)
            for role, worker in ((PREFILL, route.prefill), (DECODE, route.decode))
        ]
        try:
            yield
        finally:
            for call in calls:
                call.cancel()
