"""What the node holds and why it stays: budget, reservations, leases, rolling slots, eviction.

Pure: no I/O, no bytes, an injected clock. A call that makes objects disappear records their ids;
the node takes them with `take_dropped` in the same step and lets go of the bytes and index entries.

An object is evictable if nobody leases it and nobody reads it. Which of those leave first is the
policy's decision (`kvstore/policy`), which is told of everything here. A rolling object that its
owner has left goes with its last lease or reader.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from kvstore.leases import LeaseTable
from kvstore.owners import Owners
from kvstore.pledges import Pledges
from kvstore.policy.contracts import EvictionPolicy, Resident
from penstock.blocks import ObjectKind
from penstock.errors import InvalidRequestError, OverloadedError

MOST_REMEMBERED = 1 << 17
"""Evicted ids that are remembered, to say why a prefix is missed: some 15 MB."""


@dataclass(frozen=True)
class Limits:
    """Budget of a catalogue. Bytes and seconds."""

    capacity_bytes: int
    max_object_bytes: int
    max_objects: int
    max_leases: int
    max_lease_ttl_s: float


@dataclass(slots=True)
class Entry:
    """One committed object."""

    id: bytes
    kind: ObjectKind
    size_bytes: int
    digest: bytes
    retained: bool
    """Someone put it as a lasting object; a rolling slot that moves on leaves it alone."""
    parent: bytes
    position: int
    last_owner: str
    """Who leased or put it last; another one is a use in the policy's sense."""
    readers: int = 0
    slots: frozenset[str] = frozenset()
    """Owners whose rolling slot points here."""


@dataclass(slots=True, eq=False)
class Reservation:
    """Bytes set aside for one writer until `commit` or `abort`."""

    id: bytes
    kind: ObjectKind
    size_bytes: int
    open: bool = True


@dataclass(frozen=True)
class Usage:
    """Counts of a catalogue; sizes in bytes."""

    used_bytes: int
    reserved_bytes: int
    objects: int
    leases: int
    lease_owners: int
    reservations: int
    readers: int
    evictions: int


class Catalog:
    """The node's truth about its objects. Single-threaded: the node calls it from one loop."""

    def __init__(
        self, limits: Limits, *, policy: EvictionPolicy, clock: Callable[[], float]
    ) -> None:
        self.limits = limits
        self._policy = policy
        self._clock = clock
        self._entries: dict[bytes, Entry] = {}
        self._leases = LeaseTable()
        self._slots: dict[str, bytes] = {}
        self._slot_owners = Owners()
        self._reservations: set[Reservation] = set()
        self._pledges = Pledges()
        self._used_bytes = 0
        self._reserved_bytes = 0
        self._readers = 0
        self._evictions = 0
        self._dropped: list[bytes] = []
        self._made_room: OrderedDict[bytes, None] = OrderedDict()

    def usage(self) -> Usage:
        self._expire()
        return Usage(
            used_bytes=self._used_bytes,
            reserved_bytes=self._reserved_bytes + self._pledges.total_bytes(self._clock()),
            objects=len(self._entries),
            leases=len(self._leases),
            lease_owners=self._leases.owners,
            reservations=len(self._reservations),
            readers=self._readers,
            evictions=self._evictions,
        )

    def entry(self, id_: bytes) -> Entry | None:
        return self._entries.get(id_)

    def has(self, ids: Sequence[bytes]) -> list[bool]:
        return [id_ in self._entries for id_ in ids]

    def evicted(self, ids: Sequence[bytes]) -> list[bool]:
        """Which of them had to make room lately and are not back."""
        return [id_ in self._made_room for id_ in ids]

    def ids(self) -> list[bytes]:
        """Every committed object."""
        return list(self._entries)

    def take_dropped(self) -> list[bytes]:
        """Ids that left since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    # Writing

    def pledge(self, owner: str, size_bytes: int, ttl_s: float) -> None:
        """Set bytes aside for what `owner` will put, instead of what was pledged to it before.

        Raises OverloadedError (reason `store_full`) if they are leased, read, being written or
        pledged to others; then nothing has changed.
        """
        self._expire()
        now_s = self._clock()
        others = self._pledges.total_bytes(now_s, but=owner)
        held = self._used_bytes + self._reserved_bytes - self._policy.idle_bytes
        room = self.limits.capacity_bytes - held - others
        if size_bytes > room:
            raise OverloadedError(
                f"the store has no room for {size_bytes} bytes more: of its "
                f"{self.limits.capacity_bytes} are {held} leased, read or being written and "
                f"{others} set aside for others",
                reason="store_full",
            )
        self._pledges.take(owner, size_bytes, now_s + min(ttl_s, self.limits.max_lease_ttl_s))

    def reserve(
        self, id_: bytes, kind: ObjectKind, size_bytes: int, *, owner: str = ""
    ) -> Reservation:
        """Set bytes aside, evicting if need be. What is pledged to `owner` is there for it.

        Raises InvalidRequestError if no emptier store could take it, OverloadedError if every other
        byte is leased, read or being written; then nothing has been evicted.
        """
        largest = min(self.limits.max_object_bytes, self.limits.capacity_bytes)
        if not 0 < size_bytes <= largest:
            raise InvalidRequestError(
                f"an object of {size_bytes} bytes is refused: this store takes 1 to {largest}"
            )
        self._expire()
        self._make_room(size_bytes, owner)
        reservation = Reservation(id_, kind, size_bytes)
        self._reservations.add(reservation)
        self._reserved_bytes += size_bytes
        return reservation

    def abort(self, reservation: Reservation) -> None:
        """Give the bytes back. Idempotent, also after commit."""
        if reservation.open:
            reservation.open = False
            self._reservations.discard(reservation)
            self._reserved_bytes -= reservation.size_bytes

    def commit(
        self,
        reservation: Reservation,
        *,
        digest: bytes,
        owner: str,
        ttl_s: float,
        rolling: bool,
        parent: bytes = b"",
        position: int = 0,
    ) -> bool:
        """Make the object visible. False if another writer was first: the caller's lease holds all
        the same, its bytes are given back.

        `parent` (id of the block before it) and `position` (tokens up to and with it) are for the
        policy.
        """
        if not reservation.open:
            raise ValueError("a reservation can be committed once and not after abort")
        self._expire()
        self.abort(reservation)
        if self.adopt(reservation.id, owner=owner, ttl_s=ttl_s, rolling=rolling):
            return False
        entry = Entry(
            reservation.id,
            reservation.kind,
            reservation.size_bytes,
            digest,
            retained=not rolling,
            parent=parent,
            position=position,
            last_owner=owner,
        )
        self._entries[entry.id] = entry
        self._made_room.pop(entry.id, None)
        self._policy.insert(Resident(entry.id, parent, entry.kind, entry.size_bytes, position))
        self._used_bytes += entry.size_bytes
        self._pledges.spend(owner, entry.size_bytes)
        self._hold(entry, owner=owner, ttl_s=ttl_s)
        if rolling:
            self._move_slot(owner, entry)
        self._settle(entry)
        return True

    def adopt(self, id_: bytes, *, owner: str, ttl_s: float, rolling: bool) -> bool:
        """What a put of an object that exists comes to: its lease and slot. False if absent."""
        self._expire()
        entry = self._entries.get(id_)
        if entry is None:
            return False
        self._hold(entry, owner=owner, ttl_s=ttl_s)
        if rolling:
            self._move_slot(owner, entry)
        else:
            entry.retained = True
        self._settle(entry)
        return True

    # Reading

    def open_read(self, id_: bytes) -> Entry | None:
        """Pin an object while its bytes are sent; each needs one `close_read`."""
        entry = self._entries.get(id_)
        if entry is not None:
            entry.readers += 1
            self._readers += 1
            self._settle(entry)
        return entry

    def close_read(self, entry: Entry) -> None:
        entry.readers -= 1
        self._readers -= 1
        if self._entries.get(entry.id) is entry:
            self._let_go(entry)

    # From and to another tier

    def restore(
        self, objects: Iterable[tuple[bytes, ObjectKind, int, bytes, bytes, int]]
    ) -> list[bytes]:
        """Objects that were here before a restart, as (id, kind, bytes, digest, parent, position):
        idle, not checked against the budget; `trim` does that at the end. Ids that were fresh.
        """
        fresh = []
        for id_, kind, size_bytes, digest, parent, position in objects:
            if id_ in self._entries:
                continue
            self._entries[id_] = Entry(id_, kind, size_bytes, digest, True, parent, position, "")
            self._used_bytes += size_bytes
            self._policy.insert(Resident(id_, parent, kind, size_bytes, position))
            self._policy.free(id_)
            fresh.append(id_)
        return fresh

    def trim(self) -> None:
        """Evict until the budget holds; all of it fits if nothing is held."""
        need_bytes = self._used_bytes + self._reserved_bytes - self.limits.capacity_bytes
        need_objects = len(self._entries) + len(self._reservations) - self.limits.max_objects
        need_bytes = min(need_bytes, self._policy.idle_bytes)
        need_objects = min(need_objects, self._policy.idle_objects)
        if need_bytes > 0 or need_objects > 0:
            self._evict(self._policy.victims(need_bytes=need_bytes, need_objects=need_objects))

    def discard(self, id_: bytes) -> None:
        """Drop an object that turned out to be damaged, whoever leases or reads it."""
        entry = self._entries.get(id_)
        if entry is None:
            return
        for owner in self._leases.holders(id_):
            self._leases.drop(owner, id_)
        self._remove(entry)

    def is_held(self, id_: bytes) -> bool:
        """Does someone lease or read it?"""
        entry = self._entries.get(id_)
        return entry is not None and bool(entry.readers or self._leases.is_leased(id_))

    def let_go_of(self, ids: Iterable[bytes]) -> tuple[int, int]:
        """Evict these, but for those that are held; how many left, and their bytes."""
        self._expire()
        count = size_bytes = 0
        for id_ in ids:
            entry = self._entries.get(id_)
            if entry is not None and not self.is_held(id_):
                self._evict([id_])
                count, size_bytes = count + 1, size_bytes + entry.size_bytes
        return count, size_bytes

    def idle_first(self, size_bytes: int) -> list[bytes]:
        """What the policy lets go of first, at least `size_bytes` of it as far as it is idle."""
        self._expire()
        need_bytes = min(size_bytes, self._policy.idle_bytes)
        if need_bytes <= 0:
            return []
        return self._policy.victims(need_bytes=need_bytes, need_objects=0) or []

    # Leases

    def lease(self, owner: str, ids: Sequence[bytes], ttl_s: float) -> list[bool]:
        """Take or renew; False for ids that are not there. A TTL of 0 only asks.

        Raises OverloadedError if the table of leases is full; then none was taken.
        """
        self._expire()
        if len(self._leases) + len(ids) > self.limits.max_leases:
            fresh = sum(1 for id_ in set(ids) if not self._leases.holds(owner, id_))
            if len(self._leases) + fresh > self.limits.max_leases:
                raise OverloadedError(f"the store holds its {self.limits.max_leases} leases")
        held = []
        for id_ in ids:
            entry = self._entries.get(id_)
            held.append(entry is not None)
            if entry is not None:
                self._hold(entry, owner=owner, ttl_s=ttl_s)
                self._settle(entry)
        return held

    def release(self, owner: str) -> int:
        """Drop the leases and rolling objects of the owner and of those below it
        (`kvstore.owners`). Number of leases dropped.
        """
        self._expire()
        self._pledges.drop(owner)
        ids = self._leases.drop_owner(owner)
        # Two owners of one family may have held the same object.
        for id_ in dict.fromkeys(ids):
            self._let_go(self._entries[id_])
        for name in self._slot_owners.family(owner):
            slot = self._slots.get(name)
            if slot is not None:
                self._forget_slot(name)
                self._leave_slot(name, self._entries[slot])
        return len(ids)

    # Inside

    def _expire(self) -> None:
        # Several owners' leases on one object may end together.
        for id_ in dict.fromkeys(self._leases.expire(self._clock())):
            self._let_go(self._entries[id_])

    def _hold(self, entry: Entry, *, owner: str, ttl_s: float) -> None:
        if ttl_s > 0 and owner:
            if owner != entry.last_owner:
                entry.last_owner = owner
                self._policy.used(entry.id)
            ttl_s = min(ttl_s, self.limits.max_lease_ttl_s)
            self._leases.take(owner, entry.id, self._clock() + ttl_s)

    def _move_slot(self, owner: str, entry: Entry) -> None:
        before = self._slots.get(owner)
        if before == entry.id:
            return
        self._slots[owner] = entry.id
        self._slot_owners.add(owner)
        entry.slots |= {owner}
        if before is not None:
            self._leave_slot(owner, self._entries[before])

    def _forget_slot(self, owner: str) -> None:
        del self._slots[owner]
        self._slot_owners.discard(owner)

    def _leave_slot(self, owner: str, entry: Entry) -> None:
        entry.slots -= {owner}
        if not entry.retained:
            self._leases.drop(owner, entry.id)
        self._let_go(entry)

    def _let_go(self, entry: Entry) -> None:
        """A lease, reader or slot has left it: a superseded rolling object goes with the last."""
        held = entry.readers or self._leases.is_leased(entry.id)
        if not (entry.retained or entry.slots or held):
            self._remove(entry)
            return
        self._settle(entry)

    def _settle(self, entry: Entry) -> None:
        """Tell the policy whether its leases and readers let it go."""
        if entry.readers or self._leases.is_leased(entry.id):
            self._policy.hold(entry.id)
        else:
            self._policy.free(entry.id)

    def _make_room(self, size_bytes: int, owner: str = "") -> None:
        held = self._used_bytes + self._reserved_bytes
        pledged = self._pledges.total_bytes(self._clock(), but=owner)
        kept = held - self._policy.idle_bytes
        if pledged and kept + pledged + size_bytes > self.limits.capacity_bytes:
            raise OverloadedError(
                f"the store is full: {kept} of its {self.limits.capacity_bytes} bytes are leased, "
                f"read or being written, {pledged} are set aside for others, and {size_bytes} "
                "more do not fit",
                reason="store_full",
            )
        need_bytes = held + size_bytes - self.limits.capacity_bytes
        count = len(self._entries) + len(self._reservations)
        need_objects = count + 1 - self.limits.max_objects
        victims: list[bytes] | None = []
        if need_bytes > 0 or need_objects > 0:
            victims = self._policy.victims(need_bytes=need_bytes, need_objects=need_objects)
        if victims is None:
            raise OverloadedError(
                f"the store is full: {held - self._policy.idle_bytes} of its "
                f"{self.limits.capacity_bytes} bytes are leased, read or being written, and "
                f"{size_bytes} more do not fit"
            )
        self._evict(victims)

    def _evict(self, victims: list[bytes] | None) -> None:
        for id_ in victims or ():
            self._remove(self._entries[id_])
            self._evictions += 1
            self._made_room[id_] = None
        while len(self._made_room) > min(MOST_REMEMBERED, 4 * self.limits.max_objects):
            self._made_room.popitem(last=False)

    def _remove(self, entry: Entry) -> None:
        del self._entries[entry.id]
        self._used_bytes -= entry.size_bytes
        self._policy.remove(entry.id)
        for owner in entry.slots:
            self._forget_slot(owner)
        self._dropped.append(entry.id)
