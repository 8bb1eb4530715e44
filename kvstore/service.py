"""The `KvStore` service over one `StoreNode`: the wire's rules, streams and deadlines."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import Any

import grpc

from kvstore.arena import host_identity
from kvstore.data.port import DataPort
from kvstore.data.tickets import Tickets
from kvstore.get_answers import GetAnswers
from kvstore.node import StoreNode, check_ids, check_owner
from kvstore.offers import Offers
from kvstore.put_stream import PutStream
from kvstore.rpc import abort_with, parse, unary
from penstock.errors import DeadlineError, PenstockError
from penstock.telemetry import logs, trace
from penstock.telemetry.trace import NO_TRACER, Tracer
from protos.penstock.kv.v1 import kv_pb2

SERVICE = "penstock.kv.v1.KvStore"


class KvStoreService:
    """Method handlers; belongs to the node's event loop. Each stream has one message in flight."""

    def __init__(
        self,
        node: StoreNode,
        tickets: Tickets,
        tracer: Tracer = NO_TRACER,
        port: DataPort | None = None,
    ) -> None:
        """`port`: where readers and writers of large objects are sent, with one of `tickets`."""
        self._node = node
        self._offers = Offers(node, tickets, port)
        self._port = port
        self._tracer = tracer
        self._host = host_identity()

    def handlers(self) -> grpc.GenericRpcHandler:
        """For `grpc.aio.Server.add_generic_rpc_handlers`. Put and Get carry raw bytes."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Has": self._unary("Has", kv_pb2.HasRequest, self._has),
                "Put": grpc.stream_stream_rpc_method_handler(self._traced_put),
                "Offer": self._unary("Offer", kv_pb2.OfferRequest, self._offer),
                "Settle": self._unary("Settle", kv_pb2.SettleRequest, self._offers.settle),
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
        evicted = bytes(self._node.evicted(request.ids)) if request.explain else b""
        return kv_pb2.HasResponse(present=present, epoch=self._node.epoch, evicted=evicted)

    async def _lease(self, request: kv_pb2.LeaseRequest) -> kv_pb2.LeaseResponse:
        check_owner(request.owner, needed=True)
        ttl_s = request.ttl_ms / 1000
        if request.HasField("room_bytes"):
            self._node.pledge(request.owner, request.room_bytes, ttl_s=ttl_s)
        held = self._node.lease(request.ids, owner=request.owner, ttl_s=ttl_s)
        return kv_pb2.LeaseResponse(held=bytes(held))

    async def _release(self, request: kv_pb2.ReleaseRequest) -> kv_pb2.ReleaseResponse:
        return kv_pb2.ReleaseResponse(released=self._node.release(request.owner))

    async def _stat(self, request: kv_pb2.StatRequest) -> kv_pb2.StatResponse:
        return kv_pb2.StatResponse(**asdict(self._node.stat()))

    async def _offer(self, request: kv_pb2.OfferRequest) -> kv_pb2.OfferResponse:
        return self._offers.offer(request, is_near=request.host == self._host != b"")

    async def _put(self, _: Any, context: Any) -> None:
        stream = PutStream(self._node)
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
                is_near = request.lease_ttl_ms > 0 and request.host == self._host != b""
                await GetAnswers(self._node, request, context, is_near=is_near).send(self._port)
            finally:
                self._node.leave_get()
        except PenstockError as error:
            await abort_with(context, error)
