"""Client of the worker directory: register with a heartbeat, list who lives."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from kvstore.channel import open_channel
from kvstore.rpc import error_from
from penstock.errors import PenstockError, StoreUnavailableError
from penstock.peers import ALONE, Peers
from protos.penstock.kv.v1 import kv_pb2

_SERVICE = "/penstock.kv.v1.Directory/"

Response = TypeVar("Response", bound=Message)


class DirectoryClient:
    """The directory at one store node. Belongs to one event loop; `close` may be called again."""

    def __init__(self, address: str, *, call_timeout_s: float = 2.0, peers: Peers = ALONE) -> None:
        self.address = address
        self._timeout_s = call_timeout_s
        self._channel = open_channel(address, peers)
        self._closed = False

    async def register(self, worker: kv_pb2.Worker, *, ttl_s: float) -> int:
        """Add or refresh `worker`; the node's epoch. Raises StoreUnavailableError and others."""
        request = kv_pb2.RegisterRequest(worker=worker, ttl_ms=int(ttl_s * 1000))
        response = await self._call("Register", request, kv_pb2.RegisterResponse)
        return response.epoch

    async def deregister(self, worker_id: str) -> None:
        """Idempotent."""
        request = kv_pb2.DeregisterRequest(worker_id=worker_id)
        await self._call("Deregister", request, kv_pb2.DeregisterResponse)

    async def list(self) -> list[kv_pb2.Worker]:
        """Live workers, by id."""
        response = await self._call("List", kv_pb2.ListRequest(), kv_pb2.ListResponse)
        return list(response.workers)

    @asynccontextmanager
    async def registered(
        self, describe: Callable[[], kv_pb2.Worker], *, ttl_s: float, period_s: float
    ) -> AsyncIterator[None]:
        """Registered while the block runs: `describe()` is sent now and every `period_s`.

        The first registration must succeed. Later failures are retried in silence: a node that
        restarts learns of the worker within a period. Leaves the directory at the end.
        """
        await self.register(describe(), ttl_s=ttl_s)
        beating = asyncio.create_task(self._beat(describe, ttl_s, period_s))
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            # If it fails, the entry's TTL does the same a little later.
            with suppress(PenstockError):
                await self.deregister(describe().worker_id)

    async def close(self) -> None:
        self._closed = True
        await self._channel.close()

    async def _beat(
        self, describe: Callable[[], kv_pb2.Worker], ttl_s: float, period_s: float
    ) -> None:
        while True:
            await asyncio.sleep(period_s)
            try:
                await self.register(describe(), ttl_s=ttl_s)
            except PenstockError:
                continue

    async def _call(self, method: str, request: Message, response_type: type[Response]) -> Response:
        if self._closed:
            raise StoreUnavailableError("this directory client has been closed")
        call = self._channel.unary_unary(
            _SERVICE + method,
            request_serializer=type(request).SerializeToString,
            response_deserializer=response_type.FromString,
        )
        try:
            response: Response = await call(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.address) from error
        return response
