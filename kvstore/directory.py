"""The directory of workers: who serves what, where. Soft state with a TTL, refreshed by heartbeats.

Lost with the node and rebuilt within one heartbeat of each worker.
"""

from __future__ import annotations

from collections.abc import Callable

import grpc

from kvstore.rpc import unary
from penstock.errors import InvalidRequestError, OverloadedError
from protos.penstock.kv.v1 import kv_pb2

SERVICE = "penstock.kv.v1.Directory"
_MAX_NAME_CHARS = 256
_MAX_METRICS = 256


class WorkerDirectory:
    """Live workers by id. Pure but for the injected clock; bounded in number."""

    def __init__(
        self, *, clock: Callable[[], float], max_workers: int = 4096, max_ttl_s: float = 60.0
    ) -> None:
        self._clock = clock
        self._max_workers = max_workers
        self._max_ttl_s = max_ttl_s
        self._workers: dict[str, tuple[float, kv_pb2.Worker]] = {}

    def register(self, worker: kv_pb2.Worker, ttl_s: float) -> None:
        """Add or refresh; the entry goes when `ttl_s` (capped) passes without a refresh.

        Raises InvalidRequestError for an entry nobody could call, OverloadedError when full.
        """
        if not worker.worker_id or not worker.address:
            raise InvalidRequestError("a worker needs an id and an address")
        if max(len(worker.worker_id), len(worker.address), len(worker.model)) > _MAX_NAME_CHARS:
            raise InvalidRequestError(f"a worker's names have at most {_MAX_NAME_CHARS} characters")
        if len(worker.metrics) > _MAX_METRICS:
            raise InvalidRequestError(f"a worker reports at most {_MAX_METRICS} metrics")
        if worker.role == kv_pb2.WORKER_ROLE_UNSPECIFIED:
            raise InvalidRequestError("a worker's role is prefill or decode")
        if ttl_s <= 0:
            raise InvalidRequestError("a registration needs a TTL above 0")
        self._expire()
        if worker.worker_id not in self._workers and len(self._workers) >= self._max_workers:
            raise OverloadedError(f"the directory holds its {self._max_workers} workers")
        expires_at = self._clock() + min(ttl_s, self._max_ttl_s)
        self._workers[worker.worker_id] = (expires_at, worker)

    def deregister(self, worker_id: str) -> None:
        """Idempotent."""
        self._workers.pop(worker_id, None)

    def live(self) -> list[kv_pb2.Worker]:
        """Workers whose TTL has not passed, by id."""
        self._expire()
        return [self._workers[worker_id][1] for worker_id in sorted(self._workers)]

    def _expire(self) -> None:
        now = self._clock()
        dead = [id_ for id_, (expires_at, _) in self._workers.items() if expires_at <= now]
        for worker_id in dead:
            del self._workers[worker_id]


class DirectoryService:
    """The `Directory` service over a `WorkerDirectory`."""

    def __init__(self, directory: WorkerDirectory, *, epoch: int) -> None:
        self._directory = directory
        self._epoch = epoch

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Register": unary(kv_pb2.RegisterRequest, self._register),
                "Deregister": unary(kv_pb2.DeregisterRequest, self._deregister),
                "List": unary(kv_pb2.ListRequest, self._list),
            },
        )

    async def _register(self, request: kv_pb2.RegisterRequest) -> kv_pb2.RegisterResponse:
        self._directory.register(request.worker, request.ttl_ms / 1000)
        return kv_pb2.RegisterResponse(epoch=self._epoch)

    async def _deregister(self, request: kv_pb2.DeregisterRequest) -> kv_pb2.DeregisterResponse:
        self._directory.deregister(request.worker_id)
        return kv_pb2.DeregisterResponse()

    async def _list(self, request: kv_pb2.ListRequest) -> kv_pb2.ListResponse:
        return kv_pb2.ListResponse(workers=self._directory.live())
