"""S3-FIFO: three static queues (Yang et al., SOSP 2023), as a comparison for `kv trace`.

New objects enter a small queue of a tenth of the bytes; those used meanwhile move to the main
queue, the others leave and are remembered by id in a ghost queue. An id that comes back from the
ghosts enters the main queue, where each use (up to three) buys another round.
"""

from __future__ import annotations

from collections import OrderedDict

from kvstore.policy.contracts import Resident

_SMALL_SHARE = 0.1
_MOST_USES = 3


class S3Fifo:
    """Queues of (id) in order of arrival; held objects are passed over, not moved."""

    def __init__(self, capacity_bytes: int) -> None:
        self._small_bytes = int(capacity_bytes * _SMALL_SHARE)
        self._sizes: dict[bytes, int] = {}
        self._uses: dict[bytes, int] = {}
        self._idle: set[bytes] = set()
        self._idle_bytes = 0
        self._small: OrderedDict[bytes, None] = OrderedDict()
        self._small_used = 0
        self._main: OrderedDict[bytes, None] = OrderedDict()
        self._ghosts: OrderedDict[bytes, None] = OrderedDict()

    @property
    def idle_bytes(self) -> int:
        return self._idle_bytes

    @property
    def idle_objects(self) -> int:
        return len(self._idle)

    def insert(self, item: Resident) -> None:
        self._sizes[item.id] = item.size_bytes
        self._uses[item.id] = 0
        if item.id in self._ghosts:
            del self._ghosts[item.id]
            self._main[item.id] = None
        else:
            self._small[item.id] = None
            self._small_used += item.size_bytes

    def used(self, id_: bytes) -> None:
        self._uses[id_] = min(self._uses[id_] + 1, _MOST_USES)

    def hold(self, id_: bytes) -> None:
        if id_ in self._idle:
            self._idle.discard(id_)
            self._idle_bytes -= self._sizes[id_]

    def free(self, id_: bytes) -> None:
        if id_ not in self._idle:
            self._idle.add(id_)
            self._idle_bytes += self._sizes[id_]

    def remove(self, id_: bytes) -> None:
        self.hold(id_)
        if id_ in self._small:
            del self._small[id_]
            self._small_used -= self._sizes[id_]
            self._ghosts[id_] = None
            while len(self._ghosts) > max(len(self._sizes), 1024):
                self._ghosts.popitem(last=False)
        else:
            del self._main[id_]
        del self._sizes[id_], self._uses[id_]

    def victims(self, *, need_bytes: int, need_objects: int) -> list[bytes] | None:
        if need_bytes > self._idle_bytes or need_objects > len(self._idle):
            return None
        chosen: dict[bytes, None] = {}
        while need_bytes > 0 or len(chosen) < need_objects:
            id_ = self._next(chosen)
            chosen[id_] = None
            need_bytes -= self._sizes[id_]
        return list(chosen)

    def _next(self, chosen: dict[bytes, None]) -> bytes:
        small_first = self._small_used >= self._small_bytes or not self._main
        for queue in (self._small, self._main) if small_first else (self._main, self._small):
            id_ = self._from_small(chosen) if queue is self._small else self._from_main(chosen)
            if id_ is not None:
                return id_
        # What is left idle was promoted a moment ago: the main queue has it now.
        found = self._from_main(chosen)
        if found is None:
            raise AssertionError("the idle bytes were counted wrong")
        return found

    def _from_small(self, chosen: dict[bytes, None]) -> bytes | None:
        found = None
        promoted = []
        for id_ in self._small:
            if id_ in chosen or id_ not in self._idle:
                continue
            if self._uses[id_] == 0:
                found = id_
                break
            promoted.append(id_)
        for id_ in promoted:
            del self._small[id_]
            self._small_used -= self._sizes[id_]
            self._uses[id_] = 0
            self._main[id_] = None
        return found

    def _from_main(self, chosen: dict[bytes, None]) -> bytes | None:
        for _ in range(_MOST_USES + 1):
            found = None
            spared = []
            for id_ in self._main:
                if id_ in chosen or id_ not in self._idle:
                    continue
                if self._uses[id_] == 0:
                    found = id_
                    break
                spared.append(id_)
            for id_ in spared:
                self._uses[id_] -= 1
                self._main.move_to_end(id_)
            if found is not None:
                return found
        return None
