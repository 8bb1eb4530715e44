"""A client's put of several objects: by offers, and over gRPC what does not go so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import grpc

from kvstore.arena import LEAST_BYTES
from kvstore.calls import NodeCalls, milliseconds
from kvstore.codec import Encoded, encode, wire_kind
from kvstore.contracts import StoreObject
from kvstore.data.dialer import Dialer
from kvstore.data.link import LinkError
from kvstore.put_answers import PutAnswers
from kvstore.put_offers import Offering
from kvstore.put_shared import SharedWriter
from kvstore.receipt import Receipts
from kvstore.wire import encode_data, encode_first, slices
from penstock.errors import StoreUnavailableError
from protos.penstock.kv.v1 import kv_pb2

_CHUNK_BYTES = 1 << 20
_SLOWEST_BYTES_PER_S = 10e6
"""A put's deadline grows by its size at this rate."""


class Putter:
    """Puts of one client."""

    def __init__(
        self, calls: NodeCalls, receipts: Receipts, dialer: Dialer, shared: SharedWriter
    ) -> None:
        self._calls = calls
        self._receipts = receipts
        self._dialer = dialer
        self._offering = Offering(calls, receipts, dialer, shared)

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
        if self._offering.is_usable and size_bytes >= LEAST_BYTES * len(items):
            try:
                async with asyncio.timeout(deadline_s):
                    await self._offering.put(items, common, fresh)
            except LinkError as error:
                self._receipts.fell_back(error.reason)
                if error.reason not in ("busy", "memory", "resting"):
                    self._dialer.failed()
            except TimeoutError as error:
                raise StoreUnavailableError(
                    f"the KV store at {self._calls.address} did not take {size_bytes} bytes in "
                    f"{deadline_s:.1f} s"
                ) from error
        if len(fresh) < len(items):
            fresh += await self._stream(items[len(fresh) :], common, deadline_s)
        return fresh

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
