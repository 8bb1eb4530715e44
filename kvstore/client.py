"""`StoreClient`: a worker's view of the store over gRPC. Trusts nothing it has not verified."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing

from kvstore.buffers import Buffers
from kvstore.calls import NodeCalls, milliseconds
from kvstore.config import MAX_IDS_PER_CALL
from kvstore.contracts import Index, Location, Missing, StoreObject, StoreStat
from kvstore.data.dialer import Dialer
from kvstore.get_call import Getter
from kvstore.get_shared import SharedReader
from kvstore.index.redis import RedisIndex
from kvstore.node import check_ids
from kvstore.put_call import Putter
from kvstore.put_shared import SharedWriter
from kvstore.receipt import Receipts
from penstock.blocks import CacheLayout
from penstock.errors import IndexUnavailableError
from penstock.peers import ALONE, Peers
from penstock.telemetry import catalog as M
from penstock.telemetry.meters import NO_METER, Meter
from protos.penstock.kv.v1 import kv_pb2


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
        use_data_port: bool = True,
    ) -> None:
        """`index`: a Redis URL (opened and closed here), an `Index` that the caller closes, or None
        to ask the node. `call_timeout_s`: deadline of short calls and longest silence in `get`.
        `share_memory`: copy from the node's memory what a node on this host offers there.
        `use_data_port`: move large objects over a connection beside gRPC, where there is one.
        """
        self.address = address
        self._meter = meter
        self._own_index = RedisIndex(index) if isinstance(index, str) else None
        self._index: Index | None = self._own_index or (None if isinstance(index, str) else index)
        self._closed = False
        buffers = Buffers()
        self._shared = SharedReader(buffers, is_on=share_memory)
        self._dialer = Dialer(address, peers, is_on=use_data_port)
        self._receipts = Receipts(fingerprint=fingerprint, layout=layout, meter=meter)
        self._calls = NodeCalls(address, timeout_s=call_timeout_s, peers=peers)
        self._getter = Getter(self._calls, self._receipts, self._shared, self._dialer, buffers)
        self._writer = SharedWriter(self._shared.host)
        self._putter = Putter(self._calls, self._receipts, self._dialer, self._writer)

    @property
    def integrity_failures(self) -> int:
        """Objects that this client refused since it was made."""
        return self._receipts.failures

    async def has(self, ids: Sequence[bytes]) -> list[bool]:
        check_all(ids)
        locations = await self._lookup(ids)
        epoch = self._getter.epoch
        found = [place is not None and place.epoch == epoch for place in locations]
        unknown = [place for place, known in enumerate(found) if not known]
        self._meter.add(M.INDEX_LOOKUPS, answered_by="node" if unknown else "index")
        for start in range(0, len(unknown), MAX_IDS_PER_CALL):
            places = unknown[start : start + MAX_IDS_PER_CALL]
            request = kv_pb2.HasRequest(ids=[ids[place] for place in places])
            response = await self._calls.call("Has", request, kv_pb2.HasResponse)
            self._getter.epoch = response.epoch
            flags = self._calls.flags(response.present, places)
            for place, present in zip(places, flags, strict=True):
                found[place] = present
        return found

    async def evicted(self, ids: Sequence[bytes]) -> list[bool]:
        check_all(ids)
        found: list[bool] = []
        for start in range(0, len(ids), MAX_IDS_PER_CALL):
            some = ids[start : start + MAX_IDS_PER_CALL]
            request = kv_pb2.HasRequest(ids=some, explain=True)
            response = await self._calls.call("Has", request, kv_pb2.HasResponse)
            # A node of before this field says nothing.
            found += self._calls.flags(response.evicted or bytes(len(some)), some)
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
        begun = time.monotonic()
        fresh = await self._putter.put(items, owner=owner, lease_ttl_s=lease_ttl_s, rolling=rolling)
        size_bytes = sum(memoryview(item.payload).nbytes for item in items)
        self._receipts.transferred("put", len(items), size_bytes, time.monotonic() - begun)
        return fresh

    async def get(
        self, ids: Sequence[bytes], *, owner: str, lease_ttl_s: float, wait_s: float = 0.0
    ) -> AsyncIterator[StoreObject | Missing]:
        check_all(ids)
        for start in range(0, len(ids), MAX_IDS_PER_CALL):
            request = kv_pb2.GetRequest(
                ids=ids[start : start + MAX_IDS_PER_CALL],
                owner=owner,
                lease_ttl_ms=milliseconds(lease_ttl_s),
                wait_ms=milliseconds(wait_s),
            )
            async with aclosing(self._getter.get(request)) as answers:
                async for answer in answers:
                    yield answer

    async def lease(self, ids: Sequence[bytes], *, owner: str, ttl_s: float) -> list[bool]:
        check_all(ids)
        held: list[bool] = []
        for start in range(0, len(ids), MAX_IDS_PER_CALL):
            some = ids[start : start + MAX_IDS_PER_CALL]
            request = kv_pb2.LeaseRequest(owner=owner, ids=some, ttl_ms=milliseconds(ttl_s))
            response = await self._calls.call("Lease", request, kv_pb2.LeaseResponse)
            held += self._calls.flags(response.held, some)
        return held

    async def pledge(self, owner: str, size_bytes: int, *, ttl_s: float) -> None:
        request = kv_pb2.LeaseRequest(
            owner=owner, ttl_ms=milliseconds(ttl_s), room_bytes=size_bytes
        )
        await self._calls.call("Lease", request, kv_pb2.LeaseResponse)

    async def release(self, owner: str) -> None:
        await self._calls.call(
            "Release", kv_pb2.ReleaseRequest(owner=owner), kv_pb2.ReleaseResponse
        )

    async def stat(self) -> StoreStat:
        """The node's figures; `integrity_failures` includes this client's refusals."""
        answer = await self._calls.call("Stat", kv_pb2.StatRequest(), kv_pb2.StatResponse)
        self._getter.epoch = answer.epoch
        values = {name: getattr(answer, name) for name in StoreStat.__dataclass_fields__}
        values["integrity_failures"] += self.integrity_failures
        return StoreStat(**values)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._calls.close()
        self._dialer.close()
        self._shared.close()
        self._writer.close()
        if self._own_index is not None:
            await self._own_index.close()

    async def _lookup(self, ids: Sequence[bytes]) -> list[Location | None]:
        # Without the node's epoch an entry could be of an earlier life of it: ask the node.
        if self._index is None or self._getter.epoch is None:
            return [None] * len(ids)
        try:
            return await self._index.lookup(ids)
        except IndexUnavailableError:
            return [None] * len(ids)


def check_all(ids: Sequence[bytes]) -> None:
    """As `check_ids`, for any number of ids."""
    for start in range(0, len(ids), MAX_IDS_PER_CALL):
        check_ids(ids[start : start + MAX_IDS_PER_CALL])
