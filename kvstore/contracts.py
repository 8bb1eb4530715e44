"""The seams of the store: `BlockStore` (what workers call) and `Index` (where objects are).

Rules for every implementation; the shared contract tests in `tests/kvstore` follow them:
- An object is immutable and named by its content's identity. Committing an id that exists is not an
  error: the first commit wins, the caller gets its lease all the same.
- Only commit makes an object visible. A writer that goes away in the middle leaves nothing behind.
- A leased object is never evicted. Leases belong to an `owner` (a request id), expire after their
  TTL, are renewed by taking them again and dropped all at once by `release`.
- What `get` yields has been verified: id, fingerprint, layout and BLAKE3 digest. Bytes that fail
  are never handed out: the object is reported missing, counted, and the node is told nothing it
  must believe.
- Every call has a deadline. A store that cannot be reached raises `StoreUnavailableError`; it never
  hangs.
- Buffers: `put` may read `payload` until it returns; what `get` yields belongs to the caller.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from penstock.blocks import ObjectKind

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True)
class StoreObject:
    """A block or a state with its identity. `index` is the block's index or the state's
    position.
    """

    kind: ObjectKind
    id: bytes
    parent: bytes
    index: int
    payload: Buffer


@dataclass(frozen=True)
class Missing:
    """Answer of `get` for an object that is not there (or failed verification: `damaged`)."""

    id: bytes
    damaged: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class StoreStat:
    """Gauges and counters of one node; sizes in bytes."""

    epoch: int
    capacity_bytes: int
    used_bytes: int
    reserved_bytes: int
    objects: int
    leases: int
    lease_owners: int
    open_puts: int
    open_gets: int
    evictions: int
    integrity_failures: int
    index_backend: str
    index_healthy: bool
    hits: int = 0
    misses: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    disk_capacity_bytes: int = 0
    """0: no disk tier. Live bytes that it may hold; its files are larger by their holes."""
    disk_used_bytes: int = 0
    disk_file_bytes: int = 0
    disk_queued_bytes: int = 0
    disk_objects: int = 0
    disk_leases: int = 0
    disk_evictions: int = 0
    disk_hits: int = 0
    disk_written_bytes: int = 0
    disk_read_bytes: int = 0
    disk_skipped: int = 0
    disk_errors: int = 0
    disk_quarantined: int = 0
    object_capacity_bytes: int = 0
    """0: no object tier. What the bucket may hold, those of other nodes included."""
    object_used_bytes: int = 0
    object_queued_bytes: int = 0
    object_objects: int = 0
    object_evictions: int = 0
    object_hits: int = 0
    object_written_bytes: int = 0
    object_read_bytes: int = 0
    object_skipped: int = 0
    object_errors: int = 0
    object_quarantined: int = 0
    object_resting: int = 0
    """1 while the bucket is left alone because it failed or was slow."""
    subscribers: int = 0
    event_seq: int = 0
    """Changes that mirrors were or would have been told since the node's start."""


class BlockStore(Protocol):
    """One client's view of the store, bound to one fingerprint and layout."""

    async def has(self, ids: Sequence[bytes]) -> list[bool]:
        """Which ids can be fetched now: index first, the nodes themselves where the index does not
        know.
        """

    async def evicted(self, ids: Sequence[bytes]) -> list[bool]:
        """Which ids are not there because they had to make room lately, as far as the node
        remembers: to explain a miss, never to decide.
        """

    async def put(
        self, item: StoreObject, *, owner: str, lease_ttl_s: float, rolling: bool = False
    ) -> bool:
        """Reserve, stream, commit. True if this call committed it, False if it was there already.

        `rolling`: the owner's earlier rolling object is dropped when this one commits, unless it
        was also put as a retained one or others lease it. Raises `OverloadedError` when every byte
        is leased.
        """

    async def put_many(
        self,
        items: Sequence[StoreObject],
        *,
        owner: str,
        lease_ttl_s: float,
        rolling: bool = False,
    ) -> list[bool]:
        """As `put` for each item, in order, over one stream: item i is committed before item i + 1.

        If it raises, the items before the one that failed may have been committed.
        """

    def get(
        self, ids: Sequence[bytes], *, owner: str, lease_ttl_s: float, wait_s: float = 0.0
    ) -> AsyncIterator[StoreObject | Missing]:
        """The objects in the order asked for, leased to `owner`. `wait_s` is the patience for each
        to be committed.

        Closing the iterator stops the transfer.
        """

    async def lease(self, ids: Sequence[bytes], *, owner: str, ttl_s: float) -> list[bool]:
        """Take or renew leases; False for ids that are not there."""

    async def pledge(self, owner: str, size_bytes: int, *, ttl_s: float) -> None:
        """Set bytes aside for what `owner` will put, until it has put as many, is released, or the
        time is over; again to renew or to change it.

        Raises OverloadedError (reason `store_full`) if they are not there.
        """

    async def release(self, owner: str) -> None:
        """Drop the owner's leases and rolling objects. Idempotent."""

    async def stat(self) -> StoreStat: ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class Location:
    """Where a committed object lies. A stale location costs a wasted call, never a wrong byte."""

    node_id: str
    epoch: int
    size_bytes: int


class Index(Protocol):
    """An accelerator that may be flushed or lost at any moment; the nodes' own catalogues are the
    truth.
    """

    @property
    def backend(self) -> str: ...

    async def add(self, entries: Sequence[tuple[bytes, Location]]) -> None:
        """The latest entry of an id wins, except that an earlier life of a node (a smaller epoch)
        never replaces what a later one wrote.
        """

    async def remove(self, ids: Sequence[bytes], *, node_id: str, epoch: int) -> None:
        """Entries of other nodes, and of later lives of this one, stay."""

    async def lookup(self, ids: Sequence[bytes]) -> list[Location | None]:
        """One round trip for all ids. Raises `IndexUnavailableError` within its short deadline."""

    async def heartbeat(self, node_id: str, address: str, epoch: int) -> bool:
        """Say that the node lives. False: the index has forgotten it (flushed), announce everything
        again.
        """

    async def nodes(self) -> dict[str, tuple[str, int]]:
        """Live nodes: id -> (address, epoch)."""

    async def close(self) -> None: ...
