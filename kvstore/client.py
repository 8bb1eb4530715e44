"""`StoreClient`: a worker's view of the store over gRPC. Trusts nothing it has not verified."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from kvstore.channel import open_channel
from kvstore.codec import Encoded, decode_verified, digest_of, encode, wire_kind
from kvstore.config import MAX_IDS_PER_CALL
from kvstore.contracts import Buffer, Index, Location, Missing, StoreObject, StoreStat
from kvstore.get_shared import ReadAhead, SharedReader, copies
from kvstore.index.redis import RedisIndex
from kvstore.layout import largest_object_bytes
from kvstore.node import check_ids
from kvstore.put_answers import PutAnswers
from kvstore.rpc import error_from
from kvstore.wire import data_of, encode_data, encode_first, first_of, slices
from penstock.blocks import CacheLayout
from penstock.errors import (
    BlockIntegrityError,
    IndexUnavailableError,
    StoreUnavailableError,
)
from penstock.peers import ALONE, Peers
from penstock.telemetry import catalog as M
from penstock.telemetry.meters import NO_METER, Meter
from protos.penstock.kv.v1 import kv_pb2

_SERVICE = "/penstock.kv.v1.KvStore/"
_CHUNK_BYTES = 1 << 20
_SLOWEST_BYTES_PER_S = 10e6
"""A put's deadline grows by its size at this rate."""
_MAX_MS = 2**32 - 1

Fetched = StoreObject | Missing
Response = TypeVar("Response", bound=Message)


class StoreClient:
    """`BlockStore` over one node, for one fingerprint and layout. Belongs to one event loop.

    Safe to use from many tasks at once. Reconnects by itself; `close` may be called again.
    """

    def __init__(
        self,
        address: str,
        *,
        fingerprint: bytes,
        layout: CacheLayout,
        index: Index | str | None = None,
        call_timeout_s: float = 5.0,
        peers: Peers = ALONE,
        meter: Meter = NO_METER,
        share_memory: bool = True,
    ) -> None:
        """`index`: a Redis URL (opened and closed here), an `Index` that the caller closes, or None
        to ask the node. `call_timeout_s`: deadline of short calls and longest silence in `get`.
        `share_memory`: copy from the node's memory what a node on this host offers there.
        """
        self.address = address
        self._fingerprint = fingerprint
        self._layout = layout
        self._timeout_s = call_timeout_s
        self._meter = meter
        self._own_index = RedisIndex(index) if isinstance(index, str) else None
        self._index: Index | None = self._own_index or (None if isinstance(index, str) else index)
        self._largest_bytes = largest_object_bytes(layout)
        self._epoch: int | None = None
        self._closed = False
        self._shared = SharedReader(is_on=share_memory)
        self.integrity_failures = 0
        """Objects that this client refused since it was made."""
        # Bulk data on a connection of its own: a lookup never queues behind megabytes.
        self._control = open_channel(address, peers)
        self._bulk = open_channel(address, peers)
        self._put_call = self._bulk.stream_stream(_SERVICE + "Put")
        self._get_call = self._bulk.unary_stream(_SERVICE + "Get")

    async def has(self, ids: Sequence[bytes]) -> list[bool]:
        check_all(ids)
        locations = await self._lookup(ids)
        found = [place is not None and place.epoch == self._epoch for place in locations]
        unknown = [place for place, known in enumerate(found) if not known]
        self._meter.add(M.INDEX_LOOKUPS, answered_by="node" if unknown else "index")
        for start in range(0, len(unknown), MAX_IDS_PER_CALL):
            places = unknown[start : start + MAX_IDS_PER_CALL]
            request = kv_pb2.HasRequest(ids=[ids[place] for place in places])
            response = await self._call("Has", request, kv_pb2.HasResponse)
            self._epoch = response.epoch
            for place, present in zip(places, self._flags(response.present, places), strict=True):
                found[place] = present
        return found

    async def put(
        self, item: StoreObject, *, owner: str, lease_ttl_s: float, rolling: bool = False
    ) -> bool:
        (fresh,) = await self.put_many(
            [item], owner=owner, lease_ttl_s=lease_ttl_s, rolling=rolling
        )
        return fresh

    async def put_many(
        self,
        items: Sequence[StoreObject],
        *,
        owner: str,
        lease_ttl_s: float,
        rolling: bool = False,
    ) -> list[bool]:
        if not items:
            return []
        self._check_open()
        begun = time.monotonic()
        size_bytes = sum(memoryview(item.payload).nbytes for item in items)
        call = self._put_call(timeout=self._timeout_s + size_bytes / _SLOWEST_BYTES_PER_S)
        answers = PutAnswers(call, len(items))
        reading = asyncio.create_task(answers.read())
        try:
            async with aclosing(self._encoded(items)) as all_encoded:
                async for place, item, encoded in all_encoded:
                    begin = kv_pb2.PutBegin(
                        id=item.id,
                        kind=wire_kind(item.kind),
                        size_bytes=encoded.size_bytes,
                        owner=owner,
                        lease_ttl_ms=_milliseconds(lease_ttl_s),
                        rolling=rolling,
                        digest=encoded.digest,
                    )
                    if not await self._send(call, answers, place, begin, encoded):
                        break
                else:
                    if not answers.ended:
                        await call.done_writing()
            await reading
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise await self._failure(call, error) from error
        finally:
            reading.cancel()
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        self._transferred("put", len(items), size_bytes, time.monotonic() - begun)
        return answers.fresh

    async def get(
        self, ids: Sequence[bytes], *, owner: str, lease_ttl_s: float, wait_s: float = 0.0
    ) -> AsyncIterator[StoreObject | Missing]:
        check_all(ids)
        for start in range(0, len(ids), MAX_IDS_PER_CALL):
            request = kv_pb2.GetRequest(
                ids=ids[start : start + MAX_IDS_PER_CALL],
                owner=owner,
                lease_ttl_ms=_milliseconds(lease_ttl_s),
                wait_ms=_milliseconds(wait_s),
                host=self._shared.host,
            )
            async with aclosing(self._get_some(request)) as answers:
                async for answer in answers:
                    yield answer

    async def lease(self, ids: Sequence[bytes], *, owner: str, ttl_s: float) -> list[bool]:
        check_all(ids)
        held: list[bool] = []
        for start in range(0, len(ids), MAX_IDS_PER_CALL):
            some = ids[start : start + MAX_IDS_PER_CALL]
            request = kv_pb2.LeaseRequest(owner=owner, ids=some, ttl_ms=_milliseconds(ttl_s))
            response = await self._call("Lease", request, kv_pb2.LeaseResponse)
            held += self._flags(response.held, some)
        return held

    async def release(self, owner: str) -> None:
        await self._call("Release", kv_pb2.ReleaseRequest(owner=owner), kv_pb2.ReleaseResponse)

    async def stat(self) -> StoreStat:
        """The node's figures; `integrity_failures` includes this client's refusals."""
        answer = await self._call("Stat", kv_pb2.StatRequest(), kv_pb2.StatResponse)
        self._epoch = answer.epoch
        values = {name: getattr(answer, name) for name in StoreStat.__dataclass_fields__}
        values["integrity_failures"] += self.integrity_failures
        return StoreStat(**values)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._control.close()
        await self._bulk.close()
        self._shared.close()
        if self._own_index is not None:
            await self._own_index.close()

    async def _lookup(self, ids: Sequence[bytes]) -> list[Location | None]:
        # Without the node's epoch an entry could be of an earlier life of it: ask the node.
        if self._index is None or self._epoch is None:
            return [None] * len(ids)
        try:
            return await self._index.lookup(ids)
        except IndexUnavailableError:
            return [None] * len(ids)

    async def _call(self, method: str, request: Message, response_type: type[Response]) -> Response:
        self._check_open()
        call = self._control.unary_unary(
            _SERVICE + method,
            request_serializer=type(request).SerializeToString,
            response_deserializer=response_type.FromString,
        )
        try:
            response: Response = await call(request, timeout=self._timeout_s)
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.address) from error
        return response

    def _flags(self, raw: bytes, asked: Sequence[object]) -> list[bool]:
        if len(raw) != len(asked):
            raise self._protocol_error("answered for another number of ids")
        return [byte != 0 for byte in raw]

    async def _send(
        self, call: Any, answers: PutAnswers, place: int, begin: kv_pb2.PutBegin, item: Encoded
    ) -> bool:
        """One object, without waiting for the answer to its begin. False: the stream has ended."""
        if answers.ended:
            return False
        first, *rest = slices(item.payload, _CHUNK_BYTES)
        await call.write(encode_first(begin.SerializeToString(), (item.prefix, first)))
        for chunk in rest:
            if answers.ended:
                return False
            if len(answers.fresh) > place:
                return True
            await call.write(encode_data(chunk))
        return True

    async def _encoded(
        self, items: Sequence[StoreObject]
    ) -> AsyncGenerator[tuple[int, StoreObject, Encoded], None]:
        """Each item framed and hashed; the next one is hashed while this one is being sent."""

        def start(place: int) -> asyncio.Task[Encoded]:
            return asyncio.create_task(
                encode(items[place], fingerprint=self._fingerprint, layout=self._layout)
            )

        encoding = start(0)
        try:
            for place, item in enumerate(items):
                encoded = await encoding
                if place + 1 < len(items):
                    encoding = start(place + 1)
                yield place, item, encoded
        finally:
            encoding.cancel()
            await asyncio.gather(encoding, return_exceptions=True)

    async def _get_some(
        self, request: kv_pb2.GetRequest
    ) -> AsyncGenerator[StoreObject | Missing, None]:
        self._check_open()
        call = self._get_call(request.SerializeToString())
        ahead = ReadAhead(call)
        patience_s = self._timeout_s + request.wait_ms / 1000
        try:
            done = 0
            while done < len(request.ids):
                id_ = request.ids[done]
                raw = await self._read(ahead, patience_s)
                first = first_of(raw)
                if first is None:
                    message = self._parse_get(raw)
                    if message.WhichOneof("message") == "missing" and message.missing.id == id_:
                        yield Missing(id_)
                        done += 1
                        continue
                    if message.WhichOneof("message") == "shared":
                        names = [item.id for item in message.shared.objects]
                        if not names or names != request.ids[done : done + len(names)]:
                            raise self._protocol_error("answered for other ids")
                        async with aclosing(self._copy_shared(message.shared, request)) as items:
                            async for item in items:
                                yield item
                        done += len(names)
                        continue
                    start, head = message.start, memoryview(message.start.head)
                else:
                    start, head = self._parse_start(first[0]), first[1]
                if start.id != id_:
                    raise self._protocol_error("answered for another id")
                yield await self._receive(ahead, start, head)
                done += 1
        except grpc.aio.AioRpcError as error:
            raise error_from(error, self.address) from error
        finally:
            call.cancel()
            await ahead.close()

    async def _receive(
        self, ahead: ReadAhead, start: kv_pb2.GetStart, head: memoryview
    ) -> StoreObject | Missing:
        """One object's data; `Missing` if it is not what its id promises."""
        self._epoch = start.epoch
        begun = time.monotonic()
        # A size that no object of ours can have is read past, not buffered.
        fits = start.size_bytes <= self._largest_bytes
        raw = head
        filled = len(head)
        if filled < start.size_bytes:
            raw = memoryview(bytearray(start.size_bytes if fits else 0))
            if fits:
                raw[:filled] = head
        while filled < start.size_bytes:
            message = await self._read(ahead, self._timeout_s)
            chunk = data_of(message)
            if chunk is None:
                chunk = memoryview(self._parse_get(message).data)
            end = filled + len(chunk)
            if not len(chunk) or end > start.size_bytes:
                raise self._protocol_error("sent another number of bytes than it said")
            if fits:
                raw[filled:end] = chunk
            filled = end
        if filled > start.size_bytes:
            raise self._protocol_error("sent another number of bytes than it said")
        self._transferred("get", 1, filled, time.monotonic() - begun)
        is_whole = fits and await digest_of(raw) == start.digest
        return self._decoded(start.id, raw if is_whole else None)

    async def _copy_shared(
        self, shared: kv_pb2.GetShared, request: kv_pb2.GetRequest
    ) -> AsyncGenerator[StoreObject | Missing, None]:
        """The objects, copied from the node's memory; what cannot be had there comes as bytes."""
        self._epoch = shared.epoch
        again = kv_pb2.GetRequest()
        again.CopyFrom(request)
        again.host, again.wait_ms = b"", 0
        arena = self._shared.open(shared)
        if arena is None:
            again.ids[:] = [ticket.id for ticket in shared.objects]
            async for found in self._get_some(again):
                yield found
            return
        begun = time.monotonic()
        tickets = shared.objects
        async with aclosing(copies(arena, tickets, self._largest_bytes)) as copied:
            for ticket in tickets:
                raw = await anext(copied)
                self._transferred("get", 1, ticket.size_bytes, time.monotonic() - begun)
                if raw is not None:
                    yield self._decoded(ticket.id, raw)
                else:
                    # Its lease may have ended before it was copied: the node knows.
                    again.ids[:] = [ticket.id]
                    async for found in self._get_some(again):
                        yield found
                begun = time.monotonic()

    def _decoded(self, id_: bytes, raw: Buffer | None) -> StoreObject | Missing:
        """The object; Missing if `raw`, None for bytes without their digest, is not what `id_`
        promises.
        """
        try:
            if raw is None:
                raise BlockIntegrityError("an object's bytes do not match their BLAKE3 digest")
            return decode_verified(raw, id_=id_, fingerprint=self._fingerprint, layout=self._layout)
        except BlockIntegrityError:
            self.integrity_failures += 1
            self._meter.add(M.INTEGRITY_FAILURES)
            return Missing(id_)

    def _transferred(self, direction: str, count: int, size_bytes: int, seconds: float) -> None:
        self._meter.add(M.TRANSFER_OBJECTS, count, direction=direction)
        self._meter.add(M.TRANSFER_BYTES, size_bytes, direction=direction)
        self._meter.observe(M.TRANSFER_TIME, seconds, direction=direction)

    def _parse_get(self, raw: bytes) -> kv_pb2.GetResponse:
        try:
            return kv_pb2.GetResponse.FromString(raw)
        except DecodeError as error:
            raise self._protocol_error("sent what is no message") from error

    def _parse_start(self, raw: bytes) -> kv_pb2.GetStart:
        try:
            return kv_pb2.GetStart.FromString(raw)
        except DecodeError as error:
            raise self._protocol_error("sent what is no message") from error

    async def _read(self, ahead: ReadAhead, patience_s: float) -> bytes:
        try:
            async with asyncio.timeout(patience_s):
                message = await ahead.read()
        except TimeoutError as error:
            raise StoreUnavailableError(
                f"the KV store at {self.address} sent nothing for {patience_s:.1f} s"
            ) from error
        if message is grpc.aio.EOF:
            raise await self._failure(ahead.call, None)
        return bytes(message)

    async def _failure(self, call: Any, error: Exception | None) -> Exception:
        """Why a stream has ended, in the error tree's words."""
        if not isinstance(error, grpc.aio.AioRpcError):
            try:
                async with asyncio.timeout(self._timeout_s):
                    code, details = await call.code(), await call.details()
                    trailing = await call.trailing_metadata()
            except TimeoutError:
                return StoreUnavailableError(f"the KV store at {self.address} went silent")
            error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=details)
        return error_from(error, self.address)

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailableError("this store client has been closed")

    def _protocol_error(self, what: str) -> StoreUnavailableError:
        return StoreUnavailableError(f"the KV store at {self.address} {what}")


def check_all(ids: Sequence[bytes]) -> None:
    """As `check_ids`, for any number of ids."""
    for start in range(0, len(ids), MAX_IDS_PER_CALL):
        check_ids(ids[start : start + MAX_IDS_PER_CALL])


def _milliseconds(seconds: float) -> int:
    return min(max(0, math.ceil(seconds * 1000)), _MAX_MS)
