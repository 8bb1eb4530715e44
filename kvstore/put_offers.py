"""A client's put by offers: the node reserves, then the bytes go to its memory or its data port."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from kvstore.calls import NodeCalls
from kvstore.codec import encode_prefix, wire_kind
from kvstore.contracts import StoreObject
from kvstore.data.deliver import Answers, Delivery, Parts
from kvstore.data.dialer import Dialer
from kvstore.data.link import LinkError
from kvstore.put_answers import is_fresh
from kvstore.put_shared import SharedWriter, write_all
from kvstore.receipt import Receipts
from penstock.errors import PenstockError
from protos.penstock.kv.v1 import kv_pb2

OFFER_OBJECTS = 64
OFFER_BYTES = 32 << 20
"""Most bytes of one offer, unless one object alone has more."""
NEAR_BYTES = 16 << 20
"""Likewise on the node's host: it hashes one offer while the writer copies the next."""
AHEAD_BYTES = 96 << 20
"""Most bytes that are reserved at the node and not yet taken."""
_AHEAD_S = 2.0
"""And no more than go there in so long: a ticket is good for a few seconds."""
_RESERVED = kv_pb2.PutResponse.STATUS_RESERVED
_REFUSED = kv_pb2.PutResponse.STATUS_REFUSED


class Offering:
    """What puts of one client by offers share. Raises LinkError where gRPC must go on."""

    def __init__(
        self, calls: NodeCalls, receipts: Receipts, dialer: Dialer, shared: SharedWriter
    ) -> None:
        self._calls = calls
        self._receipts = receipts
        self._dialer = dialer
        self._shared = shared
        self._ahead_bytes = AHEAD_BYTES
        self._is_near = bool(shared.host)
        """The node offered places in its memory the last time, or was not asked yet."""

    @property
    def is_usable(self) -> bool:
        return self._dialer.is_usable or (self._is_near and bool(self._shared.host))

    async def put(
        self, items: Sequence[StoreObject], common: kv_pb2.OfferRequest, fresh: list[bool]
    ) -> None:
        """Adds to `fresh` for each item that is settled. Raises LinkError, or what refused one.

        It ends early where the node has no room for all that is on its way: a stream asks for one
        object's room at a time.
        """
        way = _Way(self._calls, self._dialer, self._shared)
        due: deque[tuple[int, Answers, asyncio.Future[Answers] | None]] = deque()
        is_done = False
        begun, taken = time.monotonic(), 0

        async def settle() -> None:
            nonlocal taken
            size, offered, answers = due.popleft()
            came = iter([] if answers is None else await answers)
            taken += size
            went = int(_AHEAD_S * taken / max(1e-3, time.monotonic() - begun))
            self._ahead_bytes = min(max(OFFER_BYTES, went), AHEAD_BYTES)
            for answer in offered:
                if answer.status == _RESERVED:
                    fresh.append(is_fresh(next(came)))
                elif answer.status != _REFUSED:
                    fresh.append(is_fresh(answer))

        try:
            for batch in offers(items, NEAR_BYTES if self._is_near else OFFER_BYTES):
                prefixes = [self._prefix(item) for item in batch]
                size = sum(map(_size, batch, prefixes))
                while due and size + sum(bytes_ for bytes_, _, _ in due) > self._ahead_bytes:
                    await settle()
                offer = await self._offer(batch, prefixes, common)
                if offer.ticket:
                    self._is_near = offer.HasField("places")
                answers = way.send(offer, _reserved(batch, prefixes, offer))
                due.append((size, list(offer.answers), answers))
                if offer.answers and offer.answers[-1].status == _REFUSED:
                    break
            while due:
                await settle()
            is_done = True
        except LinkError:
            await self._withdraw(way.tickets[-OFFER_OBJECTS:])
            raise
        finally:
            way.close(done=is_done)
            for _, _, answers in due:
                if answers is not None:
                    answers.cancel()
                    answers.add_done_callback(_seen)

    async def _offer(
        self,
        batch: Sequence[StoreObject],
        prefixes: Sequence[bytes],
        common: kv_pb2.OfferRequest,
    ) -> kv_pb2.OfferResponse:
        request = kv_pb2.OfferRequest(host=self._shared.host)
        request.MergeFrom(common)
        for item, prefix in zip(batch, prefixes, strict=True):
            size_bytes = _size(item, prefix)
            request.objects.add(id=item.id, kind=wire_kind(item.kind), size_bytes=size_bytes)
        offer = await self._calls.call("Offer", request, kv_pb2.OfferResponse)
        if not offer.answers:
            raise LinkError("unreachable", "the node takes bytes by gRPC alone")
        refused = offer.answers[-1].status == _REFUSED
        if len(offer.answers) > len(batch) or (len(offer.answers) < len(batch) and not refused):
            raise self._calls.protocol_error("answered for another number of objects")
        return offer

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


class _Way:
    """How the bytes of one put go: into the node's memory where it says a place, or to its port."""

    def __init__(self, calls: NodeCalls, dialer: Dialer, shared: SharedWriter) -> None:
        self.tickets: list[bytes] = []
        self._calls = calls
        self._dialer = dialer
        self._shared = shared
        self._delivery: Delivery | None = None
        self._placing: asyncio.Task[Answers] | None = None

    def send(
        self, offer: kv_pb2.OfferResponse, objects: Sequence[Parts]
    ) -> asyncio.Future[Answers] | None:
        """What the node will answer, one an object; None if it wants none of them."""
        if not offer.ticket:
            return None
        self.tickets.append(offer.ticket)
        if offer.HasField("places"):
            self._placing = asyncio.create_task(self._place(offer, objects, self._placing))
            return self._placing
        if not self._dialer.is_usable:
            raise LinkError("resting", "it failed a moment ago")
        if self._delivery is None:
            delivery = Delivery(
                self._dialer, timeout_s=self._calls.timeout_s, answer_s=2 * self._calls.timeout_s
            )
            if not delivery.start():
                raise LinkError("busy", "all connections are in use")
            self._delivery = delivery
        return self._delivery.send(offer.port, offer.ticket, objects)

    def close(self, *, done: bool) -> None:
        """`done`: every answer has come. Otherwise what is under way is given up."""
        if self._delivery is not None:
            self._delivery.close(done=done)

    async def _place(
        self,
        offer: kv_pb2.OfferResponse,
        objects: Sequence[Parts],
        before: asyncio.Task[Answers] | None,
    ) -> Answers:
        arena = self._shared.open(offer.places)
        if arena is None:
            raise LinkError("memory", "the node's memory cannot be opened")
        try:
            digests = await asyncio.to_thread(write_all, arena, offer.places.offsets, objects)
        except OSError as error:
            raise LinkError("memory", f"the node's memory cannot be written ({error})") from error
        if before is not None:
            # Objects are committed in their order.
            await asyncio.wait([before])
        request = kv_pb2.SettleRequest(ticket=offer.ticket, digests=digests)
        result = await self._calls.call("Settle", request, kv_pb2.OfferResult)
        if len(result.answers) != len(objects):
            raise LinkError("memory", "the node gave the places back before they were written")
        return list(result.answers)


def offers(
    items: Sequence[StoreObject], most_bytes: int = OFFER_BYTES
) -> list[Sequence[StoreObject]]:
    """`items` in parts for one offer each."""
    parts: list[Sequence[StoreObject]] = []
    first = size = 0
    for place, item in enumerate(items):
        more = memoryview(item.payload).nbytes
        if place > first and (place - first == OFFER_OBJECTS or size + more > most_bytes):
            parts.append(items[first:place])
            first, size = place, 0
        size += more
    return [*parts, items[first:]]


def _seen(answers: asyncio.Future[Answers]) -> None:
    """Its error is another's consequence: nobody else asks for it."""
    if not answers.cancelled():
        answers.exception()


def _size(item: StoreObject, prefix: bytes) -> int:
    return len(prefix) + memoryview(item.payload).nbytes


def _reserved(
    batch: Sequence[StoreObject], prefixes: Sequence[bytes], offer: kv_pb2.OfferResponse
) -> list[Parts]:
    """What the offer's ticket is for."""
    return [
        (memoryview(prefix), memoryview(item.payload).cast("B"))
        for item, prefix, answer in zip(batch, prefixes, offer.answers, strict=False)
        if answer.status == _RESERVED
    ]
