"""Least recently used: what today's stores do, and the yardstick of `kv trace`."""

from __future__ import annotations

from collections import OrderedDict

from kvstore.policy.contracts import Resident


class LeastRecentlyUsed:
    """Idle objects leave in the order in which they became idle."""

    def __init__(self) -> None:
        self._sizes: dict[bytes, int] = {}
        self._idle: OrderedDict[bytes, None] = OrderedDict()
        self._idle_bytes = 0

    @property
    def idle_bytes(self) -> int:
        return self._idle_bytes

    @property
    def idle_objects(self) -> int:
        return len(self._idle)

    def insert(self, item: Resident) -> None:
        self._sizes[item.id] = item.size_bytes

    def used(self, id_: bytes) -> None:
        if id_ in self._idle:
            self._idle.move_to_end(id_)

    def hold(self, id_: bytes) -> None:
        if id_ in self._idle:
            del self._idle[id_]
            self._idle_bytes -= self._sizes[id_]

    def free(self, id_: bytes) -> None:
        if id_ not in self._idle:
            self._idle_bytes += self._sizes[id_]
            self._idle[id_] = None
        self._idle.move_to_end(id_)

    def remove(self, id_: bytes) -> None:
        self.hold(id_)
        del self._sizes[id_]

    def victims(self, *, need_bytes: int, need_objects: int) -> list[bytes] | None:
        if need_bytes > self._idle_bytes or need_objects > len(self._idle):
            return None
        chosen: list[bytes] = []
        for id_ in self._idle:
            if need_bytes <= 0 and len(chosen) >= need_objects:
                break
            chosen.append(id_)
            need_bytes -= self._sizes[id_]
        return chosen
