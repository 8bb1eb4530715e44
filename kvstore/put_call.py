"""A client's put of several objects: to the node's data port, the rest over gRPC."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any

import grpc

from kvstore.arena import LEAST_BYTES
from kvstore.calls import NodeCalls, milliseconds
from kvstore.codec import Encoded, encode, encode_prefix, wire_kind
from kvstore.contracts import StoreObject
from kvstore.data.deliver import Answers, Delivery, Parts
from kvstore.data.dialer import Dialer
from kvstore.data.link import LinkError
from kvstore.put_answers import PutAnswers, is_fresh
from kvstore.receipt import Receipts
from kvstore.wire import encode_data, encode_first, slices
from penstock.errors import PenstockError, StoreUnavailableError
from protos.penstock.kv.v1 import kv_pb2

_CHUNK_BYTES = 1 << 20
_SLOWEST_BYTES_PER_S = 10e6
"""A put's deadline grows by its size at this rate."""
_OFFER_OBJECTS = 64
_OFFER_BYTES = 32 << 20
"""Most bytes of one offer, unless one object alone has more."""
_AHEAD_BYTES = 96 << 20
"""Most bytes that are reserved at the node and not yet taken."""
_AHEAD_S = 2.0
"""And no more than go there in so long: a ticket is good for a few seconds."""


_REFUSED = kv_pb2.PutResponse.STATUS_REFUSED


class Putter:
    """Puts of one client."""

    def __init__(self, calls: NodeCalls, receipts: Receipts, dialer: Dialer) -> None:
        self._calls = calls
        self._receipts = receipts
        self._dialer = dialer
        self._ahead_bytes = _AHEAD_BYTES

    async def put(
        self, items: Sequence[StoreObject], *, owner: str, lease_ttl_s: float, rolling: bool
    ) -> list[bool]:
        """As `BlockStore.put_many`."""
        self._calls.check_open()
        size_bytes = sum(memoryview(item.payload).nbytes for item in items)
        deadline_s = self._calls.timeout_s + size_bytes / _SLOWEST_BYTES_PER_S
        common = kv_pb2.OfferRequest(
            owner=owner, lease_ttl_ms=milliseconds(lease_ttl_s), rolling=rolling
        )
        fresh: list[bool] = []
        if self._dialer.is_usable and size_bytes >= LEAST_BYTES * len(items):
            try:
                async with asyncio.timeout(deadline_s):
                    await self._deliver(items, common, fresh)
            except LinkError as error:
                self._receipts.fell_back(error.reason)
                if error.reason != "busy":
                    self._dialer.failed()
            except TimeoutError as error:
                raise StoreUnavailableError(
                    f"the KV store at {self._calls.address} did not take {size_bytes} bytes in "
                    f"{deadline_s:.1f} s"
                ) from error
        if len(fresh) < len(items):
            fresh += await self._stream(items[len(fresh) :], common, deadline_s)
        return fresh

    async def _deliver(
        self, items: Sequence[StoreObject], common: kv_pb2.OfferRequest, fresh: list[bool]
    ) -> None:
        """Adds to `fresh` for each item that is settled. Raises LinkError, or what refused one.

        It ends early where the node has no room for all that is on its way: a stream asks for one
        object's room at a time.
        """
        delivery = Delivery(
            self._dialer, timeout_s=self._calls.timeout_s, answer_s=2 * self._calls.timeout_s
        )
        if not delivery.start():
            raise LinkError("busy", "all connections are in use")
        due: deque[tuple[int, Answers, asyncio.Future[Answers] | None]] = deque()
        is_done = False
        tickets: list[bytes] = []
        begun, taken = time.monotonic(), 0

        async def settle() -> None:
            nonlocal taken
            size, offered, answers = due.popleft()
            came = iter([] if answers is None else await answers)
            taken += size
            went = int(_AHEAD_S * taken / max(1e-3, time.monotonic() - begun))
            self._ahead_bytes = min(max(_OFFER_BYTES, went), _AHEAD_BYTES)
            for answer in offered:
                if answer.status == kv_pb2.PutResponse.STATUS_RESERVED:
                    fresh.append(is_fresh(next(came)))
                elif answer.status != _REFUSED:
                    fresh.append(is_fresh(answer))

        try:
            for batch in offers(items):
                prefixes = [self._prefix(item) for item in batch]
                size = sum(map(_size, batch, prefixes))
                while due and size + sum(bytes_ for bytes_, _, _ in due) > self._ahead_bytes:
                    await settle()
                request = kv_pb2.OfferRequest()
                request.CopyFrom(common)
                for item, prefix in zip(batch, prefixes, strict=True):
                    request.objects.add(
                        id=item.id, kind=wire_kind(item.kind), size_bytes=_size(item, prefix)
                    )
                offer = await self._calls.call("Offer", request, kv_pb2.OfferResponse)
                if not offer.port:
                    raise LinkError("unreachable", "the node has no data port")
                answers = None
                if offer.ticket:
                    answers = delivery.send(
                        offer.port, offer.ticket, _reserved(batch, prefixes, offer)
                    )
                    tickets.append(offer.ticket)
                due.append((size, list(offer.answers), answers))
                self._check(offer, batch)
                if [answer.status for answer in offer.answers].count(_REFUSED):
                    break
            while due:
                await settle()
            is_done = True
        except LinkError:
            await self._withdraw(tickets[-_OFFER_OBJECTS:])
            raise
        finally:
            delivery.close(done=is_done)
            for _, _, answers in due:
                if answers is not None:
                    answers.cancel()

    def _check(self, offer: kv_pb2.OfferResponse, batch: Sequence[StoreObject]) -> None:
        """Raises StoreUnavailableError unless it answers for `batch`, or up to a refusal."""
        refused = bool(offer.answers) and offer.answers[-1].status == _REFUSED
        if len(offer.answers) > len(batch) or (len(offer.answers) < len(batch) and not refused):
            raise self._calls.protocol_error("answered for another number of objects")

    async def _withdraw(self, tickets: Sequence[bytes]) -> None:
        """What they reserved is not waited for: the same objects come over gRPC now."""
        with suppress(PenstockError):
            await self._calls.call(
                "Offer", kv_pb2.OfferRequest(withdraw=tickets), kv_pb2.OfferResponse
            )

    def _prefix(self, item: StoreObject) -> bytes:
        return encode_prefix(
            item, fingerprint=self._receipts.fingerprint, layout=self._receipts.layout
        )

    async def _stream(
        self, items: Sequence[StoreObject], common: kv_pb2.OfferRequest, deadline_s: float
    ) -> list[bool]:
        """All of them over one Put stream."""
        call = self._calls.put(timeout=deadline_s)
        answers = PutAnswers(call, len(items))
        reading = asyncio.create_task(answers.read())
        try:
            async with aclosing(self._encoded(items)) as all_encoded:
                async for place, item, encoded in all_encoded:
                    begin = kv_pb2.PutBegin(
                        id=item.id,
                        kind=wire_kind(item.kind),
                        size_bytes=encoded.size_bytes,
                        owner=common.owner,
                        lease_ttl_ms=common.lease_ttl_ms,
                        rolling=common.rolling,
                        digest=encoded.digest,
                    )
                    if not await _send(call, answers, place, begin, encoded):
                        break
                else:
                    if not answers.ended:
                        await call.done_writing()
            await reading
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            raise await self._calls.failure(call, error) from error
        finally:
            reading.cancel()
            call.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        return answers.fresh

    async def _encoded(
        self, items: Sequence[StoreObject]
    ) -> AsyncGenerator[tuple[int, StoreObject, Encoded], None]:
        """Each item framed and hashed; the next one is hashed while this one is being sent."""
        receipts = self._receipts

        def start(place: int) -> asyncio.Task[Encoded]:
            return asyncio.create_task(
                encode(items[place], fingerprint=receipts.fingerprint, layout=receipts.layout)
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


def offers(items: Sequence[StoreObject]) -> list[Sequence[StoreObject]]:
    """`items` in parts for one offer each."""
    parts: list[Sequence[StoreObject]] = []
    first = size = 0
    for place, item in enumerate(items):
        more = memoryview(item.payload).nbytes
        if place > first and (place - first == _OFFER_OBJECTS or size + more > _OFFER_BYTES):
            parts.append(items[first:place])
            first, size = place, 0
        size += more
    return [*parts, items[first:]]


def _size(item: StoreObject, prefix: bytes) -> int:
    return len(prefix) + memoryview(item.payload).nbytes


def _reserved(
    batch: Sequence[StoreObject], prefixes: Sequence[bytes], offer: kv_pb2.OfferResponse
) -> list[Parts]:
    """What the offer's ticket is for."""
    return [
        (memoryview(prefix), memoryview(item.payload).cast("B"))
        for item, prefix, answer in zip(batch, prefixes, offer.answers, strict=False)
        if answer.status == kv_pb2.PutResponse.STATUS_RESERVED
    ]


async def _send(
    call: Any, answers: PutAnswers, place: int, begin: kv_pb2.PutBegin, item: Encoded
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
