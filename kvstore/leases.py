"""Who holds what until when. Pure: the clock's value comes with every call that needs it.

One heap entry stands for each lease; renewal only moves the lease's own expiry, and the entry is
pushed back when it surfaces too early. So renewals cost no memory.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from kvstore.owners import Owners


@dataclass(slots=True)
class _Lease:
    owner: str
    id: bytes
    expires_at: float
    seq: int
    live: bool = True


class LeaseTable:
    """Leases of (owner, object id) with expiry times in the caller's seconds."""

    def __init__(self) -> None:
        self._owners: dict[str, dict[bytes, _Lease]] = {}
        self._holders: dict[bytes, set[str]] = {}
        self._heap: list[tuple[float, int, _Lease]] = []
        self._seq = 0
        self._count = 0
        self._names = Owners()

    def __len__(self) -> int:
        return self._count

    @property
    def owners(self) -> int:
        return len(self._owners)

    def holders(self, id_: bytes) -> frozenset[str]:
        return frozenset(self._holders.get(id_, ()))

    def is_leased(self, id_: bytes) -> bool:
        return id_ in self._holders

    def holds(self, owner: str, id_: bytes) -> bool:
        return id_ in self._owners.get(owner, {})

    def take(self, owner: str, id_: bytes, expires_at: float) -> None:
        """A new lease, or the later of both expiries for one that exists."""
        self._seq += 1
        if owner not in self._owners:
            self._owners[owner] = {}
            self._names.add(owner)
        mine = self._owners[owner]
        lease = mine.get(id_)
        if lease is not None:
            lease.expires_at = max(lease.expires_at, expires_at)
            return
        lease = _Lease(owner, id_, expires_at, self._seq)
        mine[id_] = lease
        self._holders.setdefault(id_, set()).add(owner)
        self._count += 1
        self._push(lease)

    def drop(self, owner: str, id_: bytes) -> bool:
        """True if there was such a lease."""
        lease = self._owners.get(owner, {}).get(id_)
        if lease is None:
            return False
        self._forget(lease)
        self._compact()
        return True

    def drop_owner(self, owner: str) -> list[bytes]:
        """Ids that `owner` and those below it (`kvstore.owners`) held, last taken first."""
        names = self._names.family(owner)
        held = [lease for name in names for lease in self._owners.get(name, {}).values()]
        leases = sorted(held, key=lambda lease: lease.seq, reverse=True)
        for lease in leases:
            self._forget(lease)
        self._compact()
        return [lease.id for lease in leases]

    def expire(self, now: float) -> list[bytes]:
        """Ends every lease whose time is up; the ids concerned, deepest first."""
        ended = []
        while self._heap and self._heap[0][0] <= now:
            lease = heapq.heappop(self._heap)[2]
            if not lease.live:
                continue
            if lease.expires_at > now:
                self._push(lease)
                continue
            self._forget(lease)
            ended.append(lease.id)
        return ended

    def _push(self, lease: _Lease) -> None:
        # Of leases that end together the youngest goes first: it is the deepest block of a prompt,
        # and a prefix without its leaf is still of use.
        heapq.heappush(self._heap, (lease.expires_at, -lease.seq, lease))

    def _forget(self, lease: _Lease) -> None:
        lease.live = False
        self._count -= 1
        mine = self._owners[lease.owner]
        del mine[lease.id]
        if not mine:
            del self._owners[lease.owner]
            self._names.discard(lease.owner)
        holders = self._holders[lease.id]
        holders.discard(lease.owner)
        if not holders:
            del self._holders[lease.id]

    def _compact(self) -> None:
        """Dead entries never outnumber the live ones by more than a constant."""
        if len(self._heap) > 2 * self._count + 1024:
            self._heap = [entry for entry in self._heap if entry[2].live]
            heapq.heapify(self._heap)
