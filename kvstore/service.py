"""The `KvStore` service over one `StoreNode`: the wire's rules, streams and deadlines."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict
from typing import Any

import grpc

from kvstore.arena import Arena, host_identity
from kvstore.node import StoreNode, check_ids, check_owner
from kvstore.rpc import abort_with, parse, unary
from kvstore.transfer import OpenGet, OpenPut
from kvstore.wire import data_of, encode_data, encode_first, first_of, slices
from penstock.errors import DeadlineError, InvalidRequestError, PenstockError
from penstock.telemetry import logs, trace
from penstock.telemetry.trace import NO_TRACER, Tracer
from protos.penstock.kv.v1 import kv_pb2

SERVICE = "penstock.kv.v1.KvStore"
_SHARED_PER_MESSAGE = 64
INLINE_BYTES = 1 << 17
"""Data that is copied and hashed on the event loop: a thread would cost more time than it saves."""


class KvStoreService:
    """Method handlers; belongs to the node's event loop. Each stream has one message in flight."""

    def __init__(self, node: StoreNode, tracer: Tracer = NO_TRACER) -> None:
        self._node = node
        self._tracer = tracer
        self._host = host_identity()

    def handlers(self) -> grpc.GenericRpcHandler:
        """For `grpc.aio.Server.add_generic_rpc_handlers`. Put and Get carry raw bytes."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Has": self._unary("Has", kv_pb2.HasRequest, self._has),
                "Put": grpc.stream_stream_rpc_method_handler(self._traced_put),
                "Get": grpc.unary_stream_rpc_method_handler(self._traced_get),
                "Lease": self._unary("Lease", kv_pb2.LeaseRequest, self._lease),
                "Release": self._unary("Release", kv_pb2.ReleaseRequest, self._release),
                "Stat": unary(kv_pb2.StatRequest, self._stat),
            },
        )

    def _unary(self, name: str, request_type: Any, call: Any) -> Any:
        return unary(request_type, call, name=f"KvStore/{name}", tracer=self._tracer)

    async def _traced_put(self, stream: Any, context: Any) -> None:
        metadata = context.invocation_metadata() or ()
        with logs.received(metadata), self._tracer.entry("KvStore/Put", metadata):
            await self._put(stream, context)

    async def _traced_get(self, raw: bytes, context: Any) -> None:
        metadata = context.invocation_metadata() or ()
        with logs.received(metadata), self._tracer.entry("KvStore/Get", metadata):
            await self._get(raw, context)

    async def _has(self, request: kv_pb2.HasRequest) -> kv_pb2.HasResponse:
        present = bytes(self._node.has(request.ids))
        trace.note(ids=len(present), present=sum(present))
        return kv_pb2.HasResponse(present=present, epoch=self._node.epoch)

    async def _lease(self, request: kv_pb2.LeaseRequest) -> kv_pb2.LeaseResponse:
        check_owner(request.owner, needed=True)
        held = self._node.lease(request.ids, owner=request.owner, ttl_s=request.ttl_ms / 1000)
        return kv_pb2.LeaseResponse(held=bytes(held))

    async def _release(self, request: kv_pb2.ReleaseRequest) -> kv_pb2.ReleaseResponse:
        return kv_pb2.ReleaseResponse(released=self._node.release(request.owner))

    async def _stat(self, request: kv_pb2.StatRequest) -> kv_pb2.StatResponse:
        return kv_pb2.StatResponse(**asdict(self._node.stat()))

    async def _put(self, _: Any, context: Any) -> None:
        stream = _PutStream(self._node)
        # One message is read ahead: it arrives while the one before it is copied and hashed.
        reading = asyncio.ensure_future(context.read())
        try:
            while True:
                try:
                    async with asyncio.timeout(self._node.config.put_idle_s):
                        raw = await reading
                except TimeoutError:
                    raise DeadlineError(
                        f"a Put stream was idle for {self._node.config.put_idle_s} s; what it had "
                        "reserved is given back"
                    ) from None
                if raw is grpc.aio.EOF:
                    stream.end()
                    return
                reading = asyncio.ensure_future(context.read())
                answer = await stream.take(raw)
                if answer is not None:
                    await context.write(answer.SerializeToString())
        except PenstockError as error:
            stream.close()
            await abort_with(context, error)
        finally:
            stream.close()
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _get(self, raw: bytes, context: Any) -> None:
        try:
            request = parse(kv_pb2.GetRequest, raw)
            check_ids(request.ids)
            check_owner(request.owner, needed=request.lease_ttl_ms > 0)
            self._node.enter_get()
            try:
                await self._send_all(request, context)
            finally:
                self._node.leave_get()
        except PenstockError as error:
            await abort_with(context, error)

    async def _send_all(self, request: kv_pb2.GetRequest, context: Any) -> None:
        ttl_s = request.lease_ttl_ms / 1000
        wait_s = request.wait_ms / 1000
        # All that is there is leased before the first byte is sent: the tail of a long prefix
        # cannot be evicted while its head is on the way.
        self._node.lease(request.ids, owner=request.owner, ttl_s=ttl_s)
        trace.note(ids=len(request.ids), wait_ms=request.wait_ms)
        is_near = bool(ttl_s) and request.host == self._host and bool(self._host)
        shared = kv_pb2.GetShared()
        for id_ in request.ids:
            if len(shared.objects) and not self._node.has([id_])[0]:
                # What is there must not wait with what is not.
                await self._send_shared(shared, context)
            found = await self._node.open(id_, owner=request.owner, ttl_s=ttl_s, wait_s=wait_s)
            place = self._node.shared(found) if found is not None and is_near else None
            if found is not None and place is not None:
                _add(shared, id_, found, *place)
                found.close()
                if len(shared.objects) == _SHARED_PER_MESSAGE:
                    await self._send_shared(shared, context)
                continue
            await self._send_shared(shared, context)
            if found is None:
                missing = kv_pb2.GetResponse(missing=kv_pb2.GetMissing(id=id_))
                await self._send(context, missing.SerializeToString())
                continue
            try:
                await self._send_object(id_, found, context)
            finally:
                found.close()
        await self._send_shared(shared, context)

    async def _send_shared(self, shared: kv_pb2.GetShared, context: Any) -> None:
        if len(shared.objects):
            shared.pid, shared.epoch = os.getpid(), self._node.epoch
            await self._send(context, kv_pb2.GetResponse(shared=shared).SerializeToString())
            shared.Clear()

    async def _send_object(self, id_: bytes, found: OpenGet, context: Any) -> None:
        start = kv_pb2.GetStart(
            id=id_, size_bytes=len(found.data), digest=found.digest, epoch=self._node.epoch
        )
        head, *rest = slices(found.data, self._node.config.chunk_bytes)
        await self._send(context, encode_first(start.SerializeToString(), [head]))
        for chunk in rest:
            await self._send(context, encode_data(chunk))

    async def _send(self, context: Any, message: bytes) -> None:
        try:
            async with asyncio.timeout(self._node.config.get_stall_s):
                await context.write(message)
        except TimeoutError:
            raise DeadlineError(
                f"the reader of a Get took nothing for {self._node.config.get_stall_s} s"
            ) from None


class _PutStream:
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
        self, begin: kv_pb2.PutBegin, head: bytes | memoryview
    ) -> kv_pb2.PutResponse | None:
        answer = self._begin(begin)
        self._digest = begin.digest
        if self._open is None:
            return answer
        settled = await self._data(head) if len(head) else None
        return settled if settled is not None or begin.digest else answer

    def _begin(self, begin: kv_pb2.PutBegin) -> kv_pb2.PutResponse:
        if self._open is not None:
            raise InvalidRequestError("begin inside an object: commit or abort it first")
        self._skipping = True
        try:
            self._open = self._node.begin(
                begin.id,
                begin.kind,
                begin.size_bytes,
                owner=begin.owner,
                ttl_s=begin.lease_ttl_ms / 1000,
                rolling=begin.rolling,
            )
        except PenstockError as error:
            return _refused(begin.id, error)
        self._skipping = self._open is None
        status = kv_pb2.PutResponse.STATUS_RESERVED
        if self._skipping:
            status = kv_pb2.PutResponse.STATUS_EXISTS
        return kv_pb2.PutResponse(status=status, id=begin.id)

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
            return _refused(id_, error)
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
            return _refused(put.reservation.id, error)
        status = kv_pb2.PutResponse.STATUS_EXISTS
        if fresh:
            status = kv_pb2.PutResponse.STATUS_COMMITTED
        return kv_pb2.PutResponse(status=status, id=put.reservation.id)


def _add(shared: kv_pb2.GetShared, id_: bytes, found: OpenGet, arena: Arena, offset: int) -> None:
    shared.fd, shared.secret = arena.fd, arena.secret
    shared.objects.add(id=id_, offset=offset, size_bytes=len(found.data), digest=found.digest)


def _refused(id_: bytes, error: PenstockError) -> kv_pb2.PutResponse:
    return kv_pb2.PutResponse(
        status=kv_pb2.PutResponse.STATUS_REFUSED,
        id=id_,
        error_code=error.code or "",
        error_message=error.message,
        retry_after_ms=int((error.retry_after_s or 0) * 1000),
    )
