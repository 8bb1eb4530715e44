"""The `StoreAdmin` service: what an operator asks of a node, over its own catalogues."""

from __future__ import annotations

import asyncio
import heapq

import grpc

from kvstore.codec import check_id, digest_now, wire_kind
from kvstore.node import StoreNode, check_ids
from kvstore.rpc import unary
from penstock.errors import InvalidRequestError
from protos.penstock.kv.v1 import kv_pb2

SERVICE = "penstock.kv.v1.StoreAdmin"
PAGE_OBJECTS = 4096
VERIFY_IDS = 256


class AdminService:
    """Method handlers; belongs to the node's event loop."""

    def __init__(self, node: StoreNode) -> None:
        self._node = node

    def handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "ListObjects": unary(kv_pb2.ListObjectsRequest, self._list),
                "Verify": unary(kv_pb2.VerifyRequest, self._verify),
                "Evict": unary(kv_pb2.EvictRequest, self._evict),
            },
        )

    async def _list(self, request: kv_pb2.ListObjectsRequest) -> kv_pb2.ListObjectsResponse:
        limit = min(request.limit or PAGE_OBJECTS, PAGE_OBJECTS)
        ids = self._node.ids()
        # A million ids take a second to sort through: not on the loop that serves.
        page = await asyncio.to_thread(_page, ids, request.after, limit)
        return kv_pb2.ListObjectsResponse(
            objects=[info for id_ in page if (info := self._describe(id_)) is not None]
        )

    def _describe(self, id_: bytes) -> kv_pb2.ObjectInfo | None:
        memory, disk = (
            None if tier is None else tier.entry(id_) for tier in self._node.catalogues()
        )
        entry = memory or disk
        if entry is None:
            return None
        return kv_pb2.ObjectInfo(
            id=id_,
            kind=wire_kind(entry.kind),
            size_bytes=entry.size_bytes,
            position=entry.position,
            in_memory=memory is not None,
            on_disk=disk is not None,
            held=any(tier is not None and tier.is_held(id_) for tier in self._node.catalogues()),
        )

    async def _verify(self, request: kv_pb2.VerifyRequest) -> kv_pb2.VerifyResponse:
        if len(request.ids) > VERIFY_IDS:
            raise InvalidRequestError(
                f"{len(request.ids)} ids in one call; at most {VERIFY_IDS} are verified"
            )
        answer = kv_pb2.VerifyResponse()
        for id_ in request.ids:
            check_id(id_)
            for size_bytes, whole in await self._node.verify(id_, digest_now):
                answer.checked += 1
                answer.checked_bytes += size_bytes
                if not whole:
                    answer.damaged.append(id_)
        return answer

    async def _evict(self, request: kv_pb2.EvictRequest) -> kv_pb2.EvictResponse:
        check_ids(request.ids)
        if request.ids and request.size_bytes:
            raise InvalidRequestError("evict takes ids or size_bytes, not both")
        if not (request.memory or request.disk):
            raise InvalidRequestError("evict needs a tier: memory, disk or both")
        count, size_bytes = self._node.evict(
            list(request.ids) or None,
            size_bytes=request.size_bytes,
            memory=request.memory,
            disk=request.disk,
        )
        return kv_pb2.EvictResponse(evicted=count, evicted_bytes=size_bytes)


def _page(ids: list[bytes], after: bytes, limit: int) -> list[bytes]:
    return heapq.nsmallest(limit, (id_ for id_ in ids if id_ > after))
