"""Client of `StoreAdmin`: an operator's view of one node."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

import grpc
from google.protobuf.message import Message

from kvstore.channel import open_channel
from kvstore.rpc import error_from
from penstock.peers import ALONE, Peers
from protos.penstock.kv.v1 import kv_pb2

_ADMIN = "/penstock.kv.v1.StoreAdmin/"
_STORE = "/penstock.kv.v1.KvStore/"
_VERIFY_IDS = 64

Response = TypeVar("Response", bound=Message)


class AdminClient:
    """One node's operator. Belongs to one event loop; raises the error tree's words."""

    def __init__(self, address: str, *, peers: Peers = ALONE, timeout_s: float = 60.0) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._channel = open_channel(address, peers)

    async def stat(self) -> kv_pb2.StatResponse:
        return await self._call(_STORE + "Stat", kv_pb2.StatRequest(), kv_pb2.StatResponse)

    async def objects(self, most: int | None = None) -> AsyncIterator[kv_pb2.ObjectInfo]:
        """In order of id, at most `most`; a page at a time."""
        after, left = b"", most
        while left is None or left > 0:
            request = kv_pb2.ListObjectsRequest(after=after, limit=min(left or 0, 4096))
            page = await self._call(_ADMIN + "ListObjects", request, kv_pb2.ListObjectsResponse)
            if not page.objects:
                return
            for info in page.objects:
                yield info
            after = page.objects[-1].id
            left = None if left is None else left - len(page.objects)

    async def verify(self, ids: Sequence[bytes]) -> kv_pb2.VerifyResponse:
        total = kv_pb2.VerifyResponse()
        for start in range(0, len(ids), _VERIFY_IDS):
            request = kv_pb2.VerifyRequest(ids=ids[start : start + _VERIFY_IDS])
            part = await self._call(_ADMIN + "Verify", request, kv_pb2.VerifyResponse)
            total.checked += part.checked
            total.checked_bytes += part.checked_bytes
            total.damaged.extend(part.damaged)
        return total

    async def evict(
        self, ids: Sequence[bytes], *, size_bytes: int, memory: bool, disk: bool
    ) -> kv_pb2.EvictResponse:
        request = kv_pb2.EvictRequest(ids=ids, size_bytes=size_bytes, memory=memory, disk=disk)
        return await self._call(_ADMIN + "Evict", request, kv_pb2.EvictResponse)

    async def close(self) -> None:
        await self._channel.close()

    async def _call(self, path: str, request: Message, response_type: type[Response]) -> Response:
        call = self._channel.unary_unary(
            path,
            request_serializer=type(request).SerializeToString,
            response_deserializer=response_type.FromString,
        )
        try:
            response: Response = await call(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.address) from error
        return response
