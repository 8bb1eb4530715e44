"""The node's side of a Put stream: what one message after the other does."""

from __future__ import annotations

import asyncio

from kvstore.data.work import refused
from kvstore.node import StoreNode
from kvstore.rpc import parse
from kvstore.transfer import OpenPut
from kvstore.wire import data_of, first_of
from penstock.errors import InvalidRequestError, PenstockError
from protos.penstock.kv.v1 import kv_pb2

INLINE_BYTES = 1 << 17
"""Data that is copied and hashed on the event loop: a thread would cost more time than it saves."""


class PutStream:
    """The state of one Put stream: nothing, one open object, or one that is being skipped.

    A client may send an object's data and commit without waiting for the answer to its begin; if
    the object turns out to exist or is refused, they are read and dropped. What breaks the stream's
    own rules ends the call; what is wrong with one object ends that object.
    """

    def __init__(self, node: StoreNode) -> None:
        self._node = node
        self._open: OpenPut | None = None
        self._skipping = False
        self._digest = b""
        """Of the open object, if its begin said it: then its last byte commits it."""

    async def take(self, raw: bytes) -> kv_pb2.PutResponse | None:
        """Apply one message; the answer to send, if it has one."""
        data = data_of(raw)
        if data is not None:
            return await self._data(data)
        first = first_of(raw)
        if first is not None:
            return await self._first(parse(kv_pb2.PutBegin, first[0]), first[1])
        request = parse(kv_pb2.PutRequest, raw)
        match request.WhichOneof("message"):
            case "begin":
                return await self._first(request.begin, request.begin.head)
            case "data":
                return await self._data(request.data)
            case "commit":
                return self._commit(request.commit)
            case "abort":
                self.close()
                return None
        raise InvalidRequestError("a Put message holds none of begin, data, commit and abort")

    def end(self) -> None:
        """The client has finished. Raises InvalidRequestError inside an object."""
        if self._open is not None:
            raise InvalidRequestError("a Put stream ended inside an object; it was not committed")

    def close(self) -> None:
        """Give back what is reserved. May be called again."""
        self._skipping = False
        if self._open is not None:
            self._open.abort()
            self._open = None

    async def _first(
        self, asked: kv_pb2.PutBegin, head: bytes | memoryview
    ) -> kv_pb2.PutResponse | None:
        answer = self._begin(asked)
        self._digest = asked.digest
        if self._open is None:
            return answer
        settled = await self._data(head) if len(head) else None
        return settled if settled is not None or asked.digest else answer

    def _begin(self, asked: kv_pb2.PutBegin) -> kv_pb2.PutResponse:
        if self._open is not None:
            raise InvalidRequestError("begin inside an object: commit or abort it first")
        self._open, answer = begin(
            self._node,
            asked,
            owner=asked.owner,
            ttl_ms=asked.lease_ttl_ms,
            rolling=asked.rolling,
        )
        self._skipping = self._open is None
        return answer

    async def _data(self, data: bytes | memoryview) -> kv_pb2.PutResponse | None:
        if self._open is None:
            if self._skipping:
                return None
            raise InvalidRequestError("data without begin")
        try:
            if len(data) < INLINE_BYTES:
                self._open.write(data)
            else:
                await asyncio.to_thread(self._open.write, data)
        except PenstockError as error:
            id_ = self._open.reservation.id
            self.close()
            self._skipping = True
            return refused(id_, error)
        if self._digest and self._open.is_full:
            return self._commit(kv_pb2.PutCommit(digest=self._digest))
        return None

    def _commit(self, commit: kv_pb2.PutCommit) -> kv_pb2.PutResponse | None:
        if self._open is None:
            if not self._skipping:
                raise InvalidRequestError("commit without begin")
            self._skipping = False
            return None
        put, self._open = self._open, None
        try:
            fresh = put.commit(commit.digest)
        except PenstockError as error:
            return refused(put.reservation.id, error)
        status = kv_pb2.PutResponse.STATUS_EXISTS
        if fresh:
            status = kv_pb2.PutResponse.STATUS_COMMITTED
        return kv_pb2.PutResponse(status=status, id=put.reservation.id)


def begin(
    node: StoreNode, asked: kv_pb2.PutBegin, *, owner: str, ttl_ms: int, rolling: bool
) -> tuple[OpenPut | None, kv_pb2.PutResponse]:
    """Room for an object, unless it is there or refused, and the answer to its begin."""
    try:
        put = node.begin(
            asked.id,
            asked.kind,
            asked.size_bytes,
            owner=owner,
            ttl_s=ttl_ms / 1000,
            rolling=rolling,
        )
    except PenstockError as error:
        return None, refused(asked.id, error)
    status = kv_pb2.PutResponse.STATUS_RESERVED
    if put is None:
        status = kv_pb2.PutResponse.STATUS_EXISTS
    return put, kv_pb2.PutResponse(status=status, id=asked.id)
