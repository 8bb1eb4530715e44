"""The node's core without any wire: catalogue, memory tier, waiters and counters in one place.

Belongs to one event loop. The gRPC service and the in-process fake are two thin skins over it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence

from blake3 import blake3

from kvstore.announcer import Announcer
from kvstore.catalog import Catalog, Entry, Limits, Reservation
from kvstore.codec import DIGEST_BYTES, check_id, object_kind, read_header
from kvstore.config import MAX_IDS_PER_CALL, StoreConfig
from kvstore.contracts import Buffer, Index, StoreStat
from kvstore.memory import MemoryTier
from kvstore.policy.choice import open_policy
from penstock.blocks import BLOCK_TOKENS, ObjectKind
from penstock.errors import BlockIntegrityError, InvalidRequestError, OverloadedError
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`index`: where to announce objects; None announces nowhere. `epoch` grows by restarts."""
        self.config = config
        self.epoch = time.time_ns() // 1_000_000
        limits = Limits(
            capacity_bytes=config.memory_bytes,
            max_object_bytes=config.max_object_bytes,
            max_objects=config.max_objects,
            max_leases=config.max_leases,
            max_lease_ttl_s=config.max_lease_ttl_s,
        )
        policy = open_policy(config.eviction, config.memory_bytes)
        self._catalog = Catalog(limits, policy=policy, clock=clock)
        self._memory = MemoryTier()
        self._waiters: dict[bytes, set[asyncio.Future[None]]] = {}
        self._open_gets = 0
        self._integrity_failures = 0
        self.hits = 0
        self.misses = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self.announcer: Announcer | None = None
        if index is not None:
            self.announcer = Announcer(
                index,
                config,
                node_id=node_id,
                epoch=self.epoch,
                ids=self._catalog.ids,
                size_of=self._size_of,
            )

    def has(self, ids: Sequence[bytes]) -> list[bool]:
        check_ids(ids)
        return self._catalog.has(ids)

    def lease(self, ids: Sequence[bytes], *, owner: str, ttl_s: float) -> list[bool]:
        check_ids(ids)
        check_owner(owner, needed=ttl_s > 0)
        held = self._catalog.lease(owner, ids, ttl_s)
        self._let_go()
        return held

    def release(self, owner: str) -> int:
        check_owner(owner, needed=True)
        released = self._catalog.release(owner)
        self._let_go()
        return released

    def begin(
        self, id_: bytes, kind: int, size_bytes: int, *, owner: str, ttl_s: float, rolling: bool
    ) -> OpenPut | None:
        """Reserve bytes for an object; None if it is there already (leased to `owner` now)."""
        check_id(id_)
        check_owner(owner, needed=rolling or ttl_s > 0)
        object_kind_ = object_kind(kind)
        if self._catalog.adopt(id_, owner=owner, ttl_s=ttl_s, rolling=rolling):
            self._let_go()
            return None
        if self._catalog.usage().reservations >= self.config.max_open_puts:
            raise OverloadedError(f"{self.config.max_open_puts} objects are being written already")
        reservation = self._catalog.reserve(id_, object_kind_, size_bytes)
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
            self._catalog.lease(owner, [id_], ttl_s)
            entry = self._catalog.open_read(id_)
            self._let_go()
            if entry is not None:
                self.hits += 1
                return OpenGet(self, entry)
            if loop.time() >= deadline:
                self.misses += 1
                return None
            await self._committed(id_, deadline)

    def stat(self) -> StoreStat:
        usage = self._catalog.usage()
        self._let_go()
        announcer = self.announcer
        return StoreStat(
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
        )

    def _size_of(self, id_: bytes) -> int | None:
        entry = self._catalog.entry(id_)
        return None if entry is None else entry.size_bytes

    def _let_go(self) -> None:
        """Effects of what the catalogue dropped; in the same step, so nobody sees a half."""
        for id_ in self._catalog.take_dropped():
            self._memory.drop(id_)
            if self.announcer is not None:
                self.announcer.removed(id_)

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

    def _commit(
        self, put: OpenPut, data: bytearray, digest: bytes, header: kv_pb2.ObjectHeader
    ) -> bool:
        position = header.index
        if put.reservation.kind is ObjectKind.BLOCK:
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
            id_ = put.reservation.id
            self._memory.store(id_, data)
            self.bytes_in += len(data)
            if self.announcer is not None:
                self.announcer.added(id_)
            for future in self._waiters.pop(id_, ()):
                if not future.done():
                    future.set_result(None)
        self._let_go()
        return fresh


class OpenPut:
    """One object being written. Ends by `commit` or `abort`; `abort` may always be called again."""

    def __init__(
        self,
        node: StoreNode,
        reservation: Reservation,
        *,
        owner: str,
        ttl_s: float,
        rolling: bool,
    ) -> None:
        self.reservation = reservation
        self.owner = owner
        self.ttl_s = ttl_s
        self.rolling = rolling
        self._node = node
        self._data = bytearray(reservation.size_bytes)
        self._filled = 0
        self._hasher = blake3()

    def write(self, chunk: Buffer) -> None:
        """Append bytes. Raises InvalidRequestError beyond the reserved size."""
        end = self._filled + len(chunk)
        if end > len(self._data):
            raise InvalidRequestError(f"more data than the {len(self._data)} bytes reserved")
        self._data[self._filled : end] = chunk
        self._filled = end
        self._hasher.update(chunk)

    def commit(self, digest: bytes) -> bool:
        """True if this made the object visible. The bytes are given back if it fails.

        Raises InvalidRequestError for a short object, BlockIntegrityError for wrong bytes.
        """
        try:
            if self._filled != len(self._data):
                raise InvalidRequestError(
                    f"commit after {self._filled} of {len(self._data)} reserved bytes"
                )
            if len(digest) != DIGEST_BYTES:
                raise InvalidRequestError(f"a digest has {DIGEST_BYTES} bytes, not {len(digest)}")
            header = self._check(digest)
            return self._node._commit(self, self._data, digest, header)
        finally:
            self.abort()

    def abort(self) -> None:
        self._node._catalog.abort(self.reservation)

    def _check(self, digest: bytes) -> kv_pb2.ObjectHeader:
        try:
            if self._hasher.digest() != digest:
                raise BlockIntegrityError("the object's bytes do not match the digest of commit")
            header, _ = read_header(self._data)
            kind = object_kind(header.kind)
            if header.id != self.reservation.id or kind is not self.reservation.kind:
                raise BlockIntegrityError("the object's header does not match its reservation")
            return header
        except (BlockIntegrityError, InvalidRequestError):
            self._node._integrity_failures += 1
            raise


class OpenGet:
    """One object being read: pinned until `close`, which may be called again."""

    def __init__(self, node: StoreNode, entry: Entry) -> None:
        self._node = node
        self._entry = entry
        self._open = True
        self.digest = entry.digest
        self.data = node._memory.read(entry.id)

    @property
    def kind(self) -> ObjectKind:
        return self._entry.kind

    def close(self) -> None:
        if self._open:
            self._open = False
            self._node.bytes_out += len(self.data)
            self._node._catalog.close_read(self._entry)
            self._node._let_go()


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
