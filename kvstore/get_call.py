"""A client's Get: objects as bytes over gRPC, from the node's memory, or from its data port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

import grpc

from kvstore.buffers import Buffers
from kvstore.calls import NodeCalls
from kvstore.codec import digest_of
from kvstore.contracts import Missing, StoreObject
from kvstore.data.dialer import Dialer
from kvstore.data.fetch import Fetch, Half
from kvstore.data.link import LinkError
from kvstore.get_shared import ReadAhead, SharedReader, copies
from kvstore.receipt import Receipts
from kvstore.rpc import error_from
from kvstore.wire import data_of, first_of
from penstock.errors import StoreUnavailableError
from protos.penstock.kv.v1 import kv_pb2

Fetched = StoreObject | Missing


class Getter:
    """Gets of one client. What one way cannot deliver, the next one does: memory or data port,
    then gRPC, from where the bytes ended.
    """

    def __init__(
        self,
        calls: NodeCalls,
        receipts: Receipts,
        shared: SharedReader,
        dialer: Dialer,
        buffers: Buffers,
    ) -> None:
        """`buffers`: where large objects come to lie."""
        self.epoch: int | None = None
        """Of the node, as it said last."""
        self._calls = calls
        self._receipts = receipts
        self._shared = shared
        self._dialer = dialer
        self._buffers = buffers

    async def get(self, request: kv_pb2.GetRequest) -> AsyncGenerator[Fetched, None]:
        """`request`: at most MAX_IDS_PER_CALL ids, owner and times."""
        request.host = self._shared.host
        request.data_port = self._dialer.is_usable
        async with aclosing(self._get(request)) as answers:
            async for answer in answers:
                yield answer

    async def _get(
        self, request: kv_pb2.GetRequest, half: Half | None = None
    ) -> AsyncGenerator[Fetched, None]:
        self._calls.check_open()
        call = self._calls.get(request.SerializeToString())
        ahead = ReadAhead(call)
        patience_s = self._calls.timeout_s + request.wait_ms / 1000
        try:
            done = 0
            while done < len(request.ids):
                raw = await self._read(ahead, patience_s)
                first = first_of(raw)
                message = None
                if first is None:
                    message = self._calls.parse(raw, kv_pb2.GetResponse)
                    kind = message.WhichOneof("message")
                    if kind == "missing" and message.missing.id == request.ids[done]:
                        yield Missing(message.missing.id)
                        done += 1
                        continue
                    if kind in ("shared", "ticket"):
                        batch = message.shared if kind == "shared" else message.ticket
                        names = [item.id for item in batch.objects]
                        if not names or names != request.ids[done : done + len(names)]:
                            raise self._calls.protocol_error("answered for other ids")
                        taken = (
                            self._copy(message.shared, request)
                            if kind == "shared"
                            else self._fetch(message.ticket, request, half)
                        )
                        async with aclosing(taken) as items:
                            async for item in items:
                                yield item
                        done += len(names)
                        half = None
                        continue
                    start, head = message.start, memoryview(message.start.head)
                else:
                    start, head = self._calls.parse(first[0], kv_pb2.GetStart), first[1]
                if start.id != request.ids[done]:
                    raise self._calls.protocol_error("answered for another id")
                yield await self._receive(ahead, start, head, half)
                done += 1
                half = None
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self._calls.address) from error
        finally:
            call.cancel()
            await ahead.close()

    async def _receive(
        self, ahead: ReadAhead, start: kv_pb2.GetStart, head: memoryview, half: Half | None
    ) -> Fetched:
        """One object's data; `Missing` if it is not what its id promises."""
        self.epoch = start.epoch
        begun = time.monotonic()
        size = start.size_bytes
        # A size that no object of ours can have is read past, not buffered.
        fits = size <= self._receipts.most_bytes
        raw = head
        filled = start.start + len(head)
        if start.start and (half is None or (start.start, size) != (half.filled, len(half.raw))):
            raise self._calls.protocol_error("left out bytes that nobody has")
        if start.start and half is not None:
            raw = half.raw
        elif filled < size:
            raw = memoryview(bytearray(size if fits else 0))
        if raw is not head and fits and filled <= size:
            raw[start.start : filled] = head
        while filled < size:
            message = await self._read(ahead, self._calls.timeout_s)
            chunk = data_of(message)
            if chunk is None:
                chunk = memoryview(self._calls.parse(message, kv_pb2.GetResponse).data)
            end = filled + len(chunk)
            if not len(chunk) or end > size:
                raise self._calls.protocol_error("sent another number of bytes than it said")
            if fits:
                raw[filled:end] = chunk
            filled = end
        if filled > size:
            raise self._calls.protocol_error("sent another number of bytes than it said")
        self._receipts.transferred("get", 1, filled - start.start, time.monotonic() - begun)
        is_whole = fits and await digest_of(raw) == start.digest
        return self._receipts.decoded(start.id, raw if is_whole else None)

    async def _copy(
        self, shared: kv_pb2.GetShared, request: kv_pb2.GetRequest
    ) -> AsyncGenerator[Fetched, None]:
        """The objects, copied from the node's memory; what cannot be had there comes otherwise."""
        self.epoch = shared.epoch
        tickets = shared.objects
        arena = self._shared.open(shared)
        if arena is None:
            async for found in self._again(request, [ticket.id for ticket in tickets]):
                yield found
            return
        begun = time.monotonic()
        async with aclosing(copies(arena, tickets, self._receipts.most_bytes)) as copied:
            for ticket in tickets:
                raw = await anext(copied)
                self._receipts.transferred("get", 1, ticket.size_bytes, time.monotonic() - begun)
                if raw is not None:
                    yield self._receipts.decoded(ticket.id, raw)
                else:
                    # Its lease may have ended before it was copied: the node knows.
                    async for found in self._again(request, [ticket.id]):
                        yield found
                begun = time.monotonic()

    async def _fetch(
        self, ticket: kv_pb2.GetTicket, request: kv_pb2.GetRequest, half: Half | None
    ) -> AsyncGenerator[Fetched, None]:
        """The objects from the data port; what does not come goes on over gRPC."""
        self.epoch = ticket.epoch
        fetch = Fetch(
            self._dialer,
            ticket,
            self._buffers,
            most_bytes=self._receipts.most_bytes,
            timeout_s=self._calls.timeout_s,
            half=half,
        )
        done = 0
        begun = time.monotonic()
        try:
            if not self._dialer.is_usable:
                raise LinkError("resting", "it failed a moment ago")
            if not fetch.start():
                raise LinkError("busy", "all connections are in use")
            for one in ticket.objects:
                raw = await fetch.next()
                self._receipts.transferred("get", 1, one.size_bytes, time.monotonic() - begun)
                done += 1
                yield self._receipts.decoded(one.id, raw)
                begun = time.monotonic()
            return
        except LinkError as error:
            self._receipts.fell_back(error.reason)
            if error.reason not in ("busy", "resting"):
                self._dialer.failed()
        finally:
            fetch.close()
        rest = [one.id for one in ticket.objects[done:]]
        async for found in self._again(request, rest, fetch.half, data_port=False):
            yield found

    async def _again(
        self,
        request: kv_pb2.GetRequest,
        ids: list[bytes],
        half: Half | None = None,
        *,
        data_port: bool | None = None,
    ) -> AsyncGenerator[Fetched, None]:
        """Without memory and without waiting: what was there a moment ago."""
        again = kv_pb2.GetRequest(
            ids=ids,
            owner=request.owner,
            lease_ttl_ms=request.lease_ttl_ms,
            data_port=self._dialer.is_usable if data_port is None else data_port,
        )
        if half is not None and half.id == ids[0] and half.filled:
            again.resume_offset, again.resume_digest = half.filled, half.digest
        async with aclosing(self._get(again, half)) as answers:
            async for answer in answers:
                yield answer

    async def _read(self, ahead: ReadAhead, patience_s: float) -> bytes:
        try:
            async with asyncio.timeout(patience_s):
                message = await ahead.read()
        except TimeoutError as error:
            raise StoreUnavailableError(
                f"the KV store at {self._calls.address} sent nothing for {patience_s:.1f} s"
            ) from error
        if message is grpc.aio.EOF:
            raise await self._calls.failure(ahead.call, None)
        return bytes(message)
