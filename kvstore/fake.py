"""`MemoryBlockStore`: the store inside one process, for tests and for runs without a node.

The same core and the same bytes as a real node (objects are framed, hashed and verified), without
gRPC. Stores made from one `StoreNode` see each other's objects, as workers of one node do.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from kvstore.codec import decode, encode, wire_kind
from kvstore.config import StoreConfig
from kvstore.contracts import Missing, StoreObject, StoreStat
from kvstore.node import StoreNode
from penstock.blocks import CacheLayout
from penstock.errors import BlockIntegrityError, StoreUnavailableError


class MemoryBlockStore:
    """`BlockStore` over a node in this process; belongs to one event loop."""

    def __init__(
        self,
        *,
        fingerprint: bytes,
        layout: CacheLayout,
        capacity_bytes: int = 1 << 30,
        node: StoreNode | None = None,
    ) -> None:
        """`node`: share the objects of another store's `.node`; None: a node of its own."""
        self.node = node or StoreNode(StoreConfig(memory_bytes=capacity_bytes))
        self.integrity_failures = 0
        self.reachable = True
        """Set it to False to play a store that is gone."""
        self._fingerprint = fingerprint
        self._layout = layout
        self._closed = False

    async def has(self, ids: Sequence[bytes]) -> list[bool]:
        await self._enter()
        return self.node.has(ids)

    async def evicted(self, ids: Sequence[bytes]) -> list[bool]:
        await self._enter()
        return self.node.evicted(ids)

    async def put(
        self, item: StoreObject, *, owner: str, lease_ttl_s: float, rolling: bool = False
    ) -> bool:
        await self._enter()
        encoded = await encode(item, fingerprint=self._fingerprint, layout=self._layout)
        put = self.node.begin(
            item.id,
            wire_kind(item.kind),
            encoded.size_bytes,
            owner=owner,
            ttl_s=lease_ttl_s,
            rolling=rolling,
        )
        if put is None:
            return False
        try:
            put.write(encoded.prefix)
            put.write(encoded.payload)
            return put.commit(encoded.digest)
        finally:
            put.abort()

    async def put_many(
        self,
        items: Sequence[StoreObject],
        *,
        owner: str,
        lease_ttl_s: float,
        rolling: bool = False,
    ) -> list[bool]:
        return [
            await self.put(item, owner=owner, lease_ttl_s=lease_ttl_s, rolling=rolling)
            for item in items
        ]

    async def get(
        self, ids: Sequence[bytes], *, owner: str, lease_ttl_s: float, wait_s: float = 0.0
    ) -> AsyncIterator[StoreObject | Missing]:
        await self._enter()
        self.node.lease(ids, owner=owner, ttl_s=lease_ttl_s)
        self.node.enter_get()
        try:
            for id_ in ids:
                yield await self._get_one(id_, owner=owner, ttl_s=lease_ttl_s, wait_s=wait_s)
        finally:
            self.node.leave_get()

    async def lease(self, ids: Sequence[bytes], *, owner: str, ttl_s: float) -> list[bool]:
        await self._enter()
        return self.node.lease(ids, owner=owner, ttl_s=ttl_s)

    async def pledge(self, owner: str, size_bytes: int, *, ttl_s: float) -> None:
        await self._enter()
        self.node.pledge(owner, size_bytes, ttl_s=ttl_s)

    async def release(self, owner: str) -> None:
        await self._enter()
        self.node.release(owner)

    async def stat(self) -> StoreStat:
        await self._enter()
        return self.node.stat()

    async def close(self) -> None:
        self._closed = True

    async def _get_one(
        self, id_: bytes, *, owner: str, ttl_s: float, wait_s: float
    ) -> StoreObject | Missing:
        found = await self.node.open(id_, owner=owner, ttl_s=ttl_s, wait_s=wait_s)
        if found is None:
            return Missing(id_)
        try:
            return decode(
                bytearray(found.data),
                id_=id_,
                digest=found.digest,
                fingerprint=self._fingerprint,
                layout=self._layout,
            )
        except BlockIntegrityError:
            self.integrity_failures += 1
            return Missing(id_, damaged=True)
        finally:
            found.close()

    async def _enter(self) -> None:
        """Where a call over a wire would wait: other tasks run here as they would there."""
        await asyncio.sleep(0)
        if self._closed or not self.reachable:
            raise StoreUnavailableError("this store cannot be reached")
