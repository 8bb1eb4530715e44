"""The node's core without any wire: catalogue, tiers, waiters and counters in one place.

An object is in memory, on disk, or in both; leases hold in both. What is asked for and only on disk
comes back to memory, as long as memory has room that nobody holds.

Belongs to one event loop. The gRPC service and the in-process fake are two thin skins over it.
"""

from __future__ import annotations

import asyncio
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from kvstore.announcer import Announcer
from kvstore.arena import Arena
from kvstore.catalog import Catalog, Entry, Limits, Reservation
from kvstore.codec import check_id, object_kind
from kvstore.config import MAX_IDS_PER_CALL, StoreConfig
from kvstore.contracts import Buffer, Index, StoreStat
from kvstore.disk.log import Place
from kvstore.disk.open import open_disk
from kvstore.disk.tier import DiskTier
from kvstore.epoch import wall_ms
from kvstore.events import EventFeed
from kvstore.memory import MemoryTier
from kvstore.objects.bucket import Stored
from kvstore.objects.open import open_objects
from kvstore.objects.tier import ObjectTier
from kvstore.policy.choice import open_policy
from kvstore.transfer import OpenGet, OpenPut
from penstock.blocks import BLOCK_TOKENS, ObjectKind
from penstock.errors import InvalidRequestError, OverloadedError
from protos.penstock.kv.v1 import kv_pb2

MAX_OWNER_CHARS = 256


class StoreNode:
    """One node's objects. Times in seconds, sizes in bytes; raises `PenstockError`s only."""

    def __init__(
        self,
        config: StoreConfig,
        *,
        node_id: str = "node",
        index: Index | None = None,
        epoch: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`index`: where to announce objects; None announces nowhere. `epoch` grows by restarts
        (`kvstore.epoch`); None is the wall clock's.
        """
        self.config = config
        self.epoch = wall_ms() if epoch is None else epoch
        limits = Limits(
            capacity_bytes=config.memory_bytes,
            max_object_bytes=config.max_object_bytes,
            max_objects=config.max_objects,
            max_leases=config.max_leases,
            max_lease_ttl_s=config.max_lease_ttl_s,
        )
        policy = open_policy(config.eviction, config.memory_bytes)
        self._catalog = Catalog(limits, policy=policy, clock=clock)
        self._memory = MemoryTier(config.memory_bytes)
        self._disk: DiskTier | None = None
        self._objects: ObjectTier | None = None
        self._clock = clock
        self._waiters: dict[bytes, set[asyncio.Future[None]]] = {}
        self._open_gets = 0
        self._integrity_failures = 0
        self.hits = 0
        self.misses = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.node_id = node_id
        self.feed = EventFeed(config, ids=self._all_ids)
        self.announcer: Announcer | None = None
        if index is not None:
            self.announcer = Announcer(
                index,
                config,
                node_id=node_id,
                epoch=self.epoch,
                ids=self._ids,
                size_of=self._size_of,
            )

    async def start(self) -> None:
        """Open the disk tier, if there is one; its objects appear within seconds.

        Raises UsageError for a folder that cannot be used, or is in use by another node.
        """
        if self.config.disk_bytes:
            self._disk = await asyncio.to_thread(
                open_disk,
                self.config,
                clock=self._clock,
                added=self._on_disk,
                removed=self._off_disk,
            )
            self._disk.start()
        if self.config.object_url:
            self._objects = await asyncio.to_thread(open_objects, self.config, clock=self._clock)
            self._objects.start()

    async def close(self) -> None:
        """Write to disk what waits for it. Idempotent."""
        objects, self._objects = self._objects, None
        if objects is not None:
            await objects.close()
        disk, self._disk = self._disk, None
        if disk is not None:
            await disk.close()

    def has(self, ids: Sequence[bytes]) -> list[bool]:
        check_ids(ids)
        present = self._catalog.has(ids)
        if self._disk is not None:
            present = list(map(operator.or_, present, self._disk.catalog.has(ids)))
        if self._objects is not None:
            present = list(map(operator.or_, present, self._objects.has(ids)))
        return present

    def evicted(self, ids: Sequence[bytes]) -> list[bool]:
        """Which of them are nowhere here now, but had to make room lately."""
        tiers = [tier for tier in self.catalogues() if tier is not None]
        return [
            not here and any(tier.evicted([id_])[0] for tier in tiers)
            for id_, here in zip(ids, self.has(ids), strict=True)
        ]

    def lease(self, ids: Sequence[bytes], *, owner: str, ttl_s: float) -> list[bool]:
        check_ids(ids)
        check_owner(owner, needed=ttl_s > 0)
        held = self._catalog.lease(owner, ids, ttl_s)
        if self._disk is not None:
            held = list(map(operator.or_, held, self._disk.lease(owner, ids, ttl_s)))
        if self._objects is not None:
            elsewhere = [id_ for id_, here in zip(ids, held, strict=True) if not here]
            if ttl_s > 0 and elsewhere:
                self._objects.expect(elsewhere)
            held = list(map(operator.or_, held, self._objects.lease(owner, ids, ttl_s)))
        self._let_go()
        return held

    def pledge(self, owner: str, size_bytes: int, *, ttl_s: float) -> None:
        """Set bytes of the memory aside for what `owner` will put (`Catalog.pledge`)."""
        check_owner(owner, needed=True)
        self._catalog.pledge(owner, size_bytes, ttl_s)

    def release(self, owner: str) -> int:
        """Leases dropped; an object in both tiers counts once for each."""
        check_owner(owner, needed=True)
        released = self._catalog.release(owner)
        if self._disk is not None:
            released += self._disk.release(owner)
        if self._objects is not None:
            released += self._objects.release(owner)
        self._let_go()
        return released

    def begin(
        self, id_: bytes, kind: int, size_bytes: int, *, owner: str, ttl_s: float, rolling: bool
    ) -> OpenPut | None:
        """Reserve bytes for an object; None if it is there already (leased to `owner` now)."""
        check_id(id_)
        check_owner(owner, needed=rolling or ttl_s > 0)
        object_kind_ = object_kind(kind)
        if self._adopt(id_, owner=owner, ttl_s=ttl_s, rolling=rolling):
            self._let_go()
            return None
        if self._catalog.usage().reservations >= self.config.max_open_puts:
            raise OverloadedError(f"{self.config.max_open_puts} objects are being written already")
        reservation = self._catalog.reserve(id_, object_kind_, size_bytes, owner=owner)
        self._let_go()
        return OpenPut(self, reservation, owner=owner, ttl_s=ttl_s, rolling=rolling)

    def enter_get(self) -> None:
        """Count one Get call; each needs one `leave_get`. Raises OverloadedError at the limit."""
        if self._open_gets >= self.config.max_open_gets:
            raise OverloadedError(f"{self.config.max_open_gets} reads are running already")
        self._open_gets += 1

    def leave_get(self) -> None:
        self._open_gets -= 1

    async def open(self, id_: bytes, *, owner: str, ttl_s: float, wait_s: float) -> OpenGet | None:
        """The object once it is committed, leased to `owner`; None if `wait_s` was not enough."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + min(wait_s, self.config.max_wait_s)
        while True:
            found = self._from_memory(id_, owner=owner, ttl_s=ttl_s)
            if found is None and self._disk is not None:
                found = await self._from_disk(self._disk, id_, owner=owner, ttl_s=ttl_s)
            if found is None and self._objects is not None:
                found = await self._from_objects(self._objects, id_, owner=owner, ttl_s=ttl_s)
            elif found is not None:
                self._wanted(id_, found.data, owner=owner)
            if found is not None:
                self.hits += 1
                return found
            if loop.time() >= deadline:
                self.misses += 1
                return None
            await self._committed(id_, deadline)

    def shared(self, found: OpenGet | OpenPut) -> tuple[Arena, int] | None:
        """Where a reader or writer on this host finds the bytes; None if they are not in shared
        memory.
        """
        arena = self._memory.arena
        offset = None if arena is None else arena.offset_of(found.data)
        return None if arena is None or offset is None else (arena, offset)

    def stat(self) -> StoreStat:
        usage = self._catalog.usage()
        self._let_go()
        announcer, disk = self.announcer, self._disk
        stat = StoreStat(
            epoch=self.epoch,
            capacity_bytes=self.config.memory_bytes,
            used_bytes=usage.used_bytes,
            reserved_bytes=usage.reserved_bytes,
            objects=usage.objects,
            leases=usage.leases,
            lease_owners=usage.lease_owners,
            open_puts=usage.reservations,
            open_gets=self._open_gets,
            evictions=usage.evictions,
            integrity_failures=self._integrity_failures,
            index_backend=announcer.backend if announcer else "none",
            index_healthy=announcer.healthy if announcer else True,
            hits=self.hits,
            misses=self.misses,
            bytes_in=self.bytes_in,
            bytes_out=self.bytes_out,
            subscribers=len(self.feed),
            event_seq=self.feed.seq,
        )
        if disk is not None:
            stat = replace(stat, **disk.figures())
        if self._objects is not None:
            stat = replace(stat, **self._objects.figures())
        return stat

    # What an operator asks

    def ids(self) -> list[bytes]:
        """Every object, whatever tier it is in."""
        return self._ids()

    def catalogues(self) -> tuple[Catalog, Catalog | None]:
        """Of memory and of disk, to be read."""
        return self._catalog, None if self._disk is None else self._disk.catalog

    async def verify(
        self, id_: bytes, digest: Callable[[memoryview], bytes]
    ) -> list[tuple[int, bool]]:
        """(bytes, whole?) of the copy in each tier that has one. A copy that is not whole goes."""
        found = []
        entry = self._catalog.open_read(id_)
        if entry is not None:
            try:
                whole = await asyncio.to_thread(digest, self._memory.read(id_)) == entry.digest
            finally:
                self._catalog.close_read(entry)
            if not whole:
                self._integrity_failures += 1
                self._catalog.discard(id_)
            found.append((entry.size_bytes, whole))
            self._let_go()
        on_disk = None if self._disk is None else self._disk.catalog.entry(id_)
        if self._disk is not None and on_disk is not None:
            found.append((on_disk.size_bytes, await self._disk.read(id_) is not None))
        return found

    def evict(
        self, ids: list[bytes] | None, *, size_bytes: int, memory: bool, disk: bool
    ) -> tuple[int, int]:
        """Copies that left and their bytes: of `ids`, or what the policy lets go of first."""
        count = freed = 0
        for wanted, tier in zip((memory, disk), self.catalogues(), strict=True):
            if wanted and tier is not None:
                chosen = tier.idle_first(size_bytes) if ids is None else ids
                more, more_bytes = tier.let_go_of(chosen)
                count, freed = count + more, freed + more_bytes
        self._let_go()
        if self._disk is not None:
            self._disk.settle()
        return count, freed

    # What an `OpenPut` asks of its keeper

    def keep(
        self, put: OpenPut, data: memoryview, digest: bytes, header: kv_pb2.ObjectHeader
    ) -> bool:
        id_, kind = put.reservation.id, put.reservation.kind
        position = header.index
        if kind is ObjectKind.BLOCK:
            position = (header.index + 1) * BLOCK_TOKENS
        fresh = self._catalog.commit(
            put.reservation,
            digest=digest,
            owner=put.owner,
            ttl_s=put.ttl_s,
            rolling=put.rolling,
            parent=header.parent,
            position=position,
        )
        if fresh:
            self._memory.store(id_, data)
            self.bytes_in += len(data)
            self._appeared(id_)
        if not put.rolling:
            self._spill(id_, owner=put.owner)
            self._wanted(id_, self._memory.read(id_), owner=put.owner)
        self._let_go()
        return fresh

    def allocate(self, size_bytes: int) -> memoryview:
        return self._memory.allocate(size_bytes)

    def fill(self, data: memoryview, start: int, chunk: Buffer) -> None:
        self._memory.fill(data, start, chunk)

    def give_up(self, reservation: Reservation) -> None:
        self._catalog.abort(reservation)

    def refused(self) -> None:
        self._integrity_failures += 1

    # Inside

    def _adopt(self, id_: bytes, *, owner: str, ttl_s: float, rolling: bool) -> bool:
        """Is it there already? Then it is leased to `owner`, wherever it is."""
        if self._catalog.adopt(id_, owner=owner, ttl_s=ttl_s, rolling=rolling):
            if not rolling:
                self._spill(id_, owner=owner)
            return True
        return self._disk is not None and any(self._disk.lease(owner, [id_], ttl_s))

    def _spill(self, id_: bytes, *, owner: str) -> None:
        entry = self._catalog.entry(id_)
        if self._disk is not None and entry is not None:
            place = Place(
                id_, entry.kind, entry.parent, entry.position, entry.digest, 0, 0, entry.size_bytes
            )
            self._disk.spill(place, self._memory.read(id_), owner=owner)

    def _from_memory(self, id_: bytes, *, owner: str, ttl_s: float) -> OpenGet | None:
        self._catalog.lease(owner, [id_], ttl_s)
        entry = self._catalog.open_read(id_)
        self._let_go()
        if entry is None:
            return None

        def done(sent: int) -> None:
            self.bytes_out += sent
            self._catalog.close_read(entry)
            self._let_go()

        return OpenGet(entry.kind, entry.digest, self._memory.read(id_), done)

    async def _from_disk(
        self, disk: DiskTier, id_: bytes, *, owner: str, ttl_s: float
    ) -> OpenGet | None:
        disk.lease(owner, [id_], ttl_s)
        read = await disk.read(id_)
        if read is None:
            # Another reader may have brought it to memory, or quarantined it, meanwhile.
            return self._from_memory(id_, owner=owner, ttl_s=ttl_s)
        entry, data = read
        self._promote(entry, data, owner=owner, ttl_s=ttl_s)

        def done(sent: int) -> None:
            self.bytes_out += sent

        return OpenGet(entry.kind, entry.digest, data, done)

    async def _from_objects(
        self, objects: ObjectTier, id_: bytes, *, owner: str, ttl_s: float
    ) -> OpenGet | None:
        objects.lease(owner, [id_], ttl_s)
        read = await objects.read(id_)
        if read is None:
            # It may have been committed here meanwhile.
            return self._from_memory(id_, owner=owner, ttl_s=ttl_s)
        entry, data = read
        self._promote(entry, data, owner=owner, ttl_s=ttl_s)

        def done(sent: int) -> None:
            self.bytes_out += sent

        return OpenGet(entry.kind, entry.digest, data, done)

    def _wanted(self, id_: bytes, data: memoryview, *, owner: str) -> None:
        """Tell the object tier of a retained object that a request put or read."""
        entry = self._catalog.entry(id_)
        if entry is None and self._disk is not None:
            entry = self._disk.catalog.entry(id_)
        if self._objects is None or entry is None or not entry.retained:
            return
        item = Stored(id_, entry.kind, entry.parent, entry.position, entry.digest, data)
        self._objects.wanted(item, owner=owner)

    def _promote(self, entry: Entry, data: memoryview, *, owner: str, ttl_s: float) -> None:
        """Into memory, unless everything there is held: then it is served from disk again."""
        try:
            reservation = self._catalog.reserve(entry.id, entry.kind, entry.size_bytes)
        except OverloadedError:
            return
        fresh = self._catalog.commit(
            reservation,
            digest=entry.digest,
            owner=owner,
            ttl_s=ttl_s,
            rolling=False,
            parent=entry.parent,
            position=entry.position,
        )
        if fresh:
            self._memory.store(entry.id, data)
        self._let_go()

    def _ids(self) -> list[bytes]:
        ids = self._all_ids()
        return ids if self._disk is None else list(dict.fromkeys(ids))

    def _all_ids(self) -> list[bytes]:
        """With those in both tiers twice."""
        ids = self._catalog.ids()
        if self._disk is not None:
            ids += self._disk.catalog.ids()
        return ids

    def _size_of(self, id_: bytes) -> int | None:
        entry = self._catalog.entry(id_)
        if entry is None and self._disk is not None:
            entry = self._disk.catalog.entry(id_)
        return None if entry is None else entry.size_bytes

    def _let_go(self) -> None:
        """Effects of what the catalogue dropped; in the same step, so nobody sees a half."""
        for id_ in self._catalog.take_dropped():
            self._memory.drop(id_)
            if self._size_of(id_) is None:
                self._vanished(id_)

    def _on_disk(self, id_: bytes) -> None:
        if self._catalog.entry(id_) is None:
            self._appeared(id_)

    def _off_disk(self, id_: bytes) -> None:
        if self._catalog.entry(id_) is None:
            self._vanished(id_)

    def _vanished(self, id_: bytes) -> None:
        self.feed.changed(id_, False)
        if self.announcer is not None:
            self.announcer.removed(id_)

    def _appeared(self, id_: bytes) -> None:
        self.feed.changed(id_, True)
        if self.announcer is not None:
            self.announcer.added(id_)
        for future in self._waiters.pop(id_, ()):
            if not future.done():
                future.set_result(None)

    async def _committed(self, id_: bytes, deadline: float) -> None:
        """Until `id_` is committed or the loop's clock shows `deadline`."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.setdefault(id_, set()).add(future)
        try:
            async with asyncio.timeout_at(deadline):
                await future
        except TimeoutError:
            return
        finally:
            waiting = self._waiters.get(id_)
            if waiting is not None:
                waiting.discard(future)
                if not waiting:
                    del self._waiters[id_]


def check_ids(ids: Sequence[bytes]) -> None:
    """Raises InvalidRequestError for too many ids or one that is none."""
    if len(ids) > MAX_IDS_PER_CALL:
        raise InvalidRequestError(f"{len(ids)} ids in one call; at most {MAX_IDS_PER_CALL}")
    for id_ in ids:
        check_id(id_)


def check_owner(owner: str, *, needed: bool) -> None:
    """Raises InvalidRequestError for an owner that is missing where needed, or too long."""
    if needed and not owner:
        raise InvalidRequestError("a lease needs an owner: the id of the request it belongs to")
    if len(owner) > MAX_OWNER_CHARS:
        raise InvalidRequestError(f"an owner has at most {MAX_OWNER_CHARS} characters")
