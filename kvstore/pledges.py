"""Bytes set aside for what an owner is going to put. Pure: the clock's value comes with each call.

A pledge is spent by its owner's commits, and ends with its owner, with its time, or when it is
spent. Nobody else's objects may take that room, so work that has begun does not fail for want of
it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvstore.owners import Owners


@dataclass
class _Pledge:
    size_bytes: int
    expires_at: float


class Pledges:
    """By owner."""

    def __init__(self) -> None:
        self._held: dict[str, _Pledge] = {}
        self._names = Owners()

    def __len__(self) -> int:
        return len(self._held)

    def total_bytes(self, now_s: float, *, but: str = "") -> int:
        """Of all owners but this one."""
        for owner in [o for o, pledge in self._held.items() if pledge.expires_at <= now_s]:
            self._forget(owner)
        return sum(pledge.size_bytes for owner, pledge in self._held.items() if owner != but)

    def take(self, owner: str, size_bytes: int, expires_at: float) -> None:
        """From now on it is this many; 0 ends it."""
        if size_bytes <= 0:
            self._forget(owner)
            return
        self._held[owner] = _Pledge(size_bytes, expires_at)
        self._names.add(owner)

    def spend(self, owner: str, size_bytes: int) -> None:
        """The owner has put so many."""
        pledge = self._held.get(owner)
        if pledge is not None:
            self.take(owner, pledge.size_bytes - size_bytes, pledge.expires_at)

    def drop(self, owner: str) -> None:
        """Its own and those of owners below it."""
        for name in self._names.family(owner):
            self._forget(name)

    def _forget(self, owner: str) -> None:
        if self._held.pop(owner, None) is not None:
            self._names.discard(owner)
