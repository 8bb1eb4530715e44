"""The seam of eviction: `EvictionPolicy`, told of everything that happens to resident objects.

Rules for every implementation; `tests/kvstore/test_policy.py` follows them:
- No I/O and no time: what it is told, in the order in which it is told, decides everything.
- `victims` names idle objects only (inserted, freed, not held), none twice, and as many as are
  needed; it returns None if all idle objects together are not enough, and then has named nobody.
- Naming a victim does not remove it: the caller removes it, or keeps it and names it again later.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from penstock.blocks import ObjectKind


@dataclass(frozen=True, slots=True)
class Resident:
    """What a policy may know of an object. `parent`: id of the block before it in its prompt."""

    id: bytes
    parent: bytes
    kind: ObjectKind
    size_bytes: int
    position: int
    """Tokens of the prompt up to and with this object."""


class EvictionPolicy(Protocol):
    """Order in which idle objects leave. An object is held from `insert` on until `free`."""

    @property
    def idle_bytes(self) -> int:
        """Bytes of all idle objects."""

    @property
    def idle_objects(self) -> int: ...

    def insert(self, item: Resident) -> None:
        """A new object, held."""

    def used(self, id_: bytes) -> None:
        """A request other than the last one wants it: the event that a cache lives for."""

    def hold(self, id_: bytes) -> None:
        """Not to be evicted for now. Idempotent."""

    def free(self, id_: bytes) -> None:
        """Nobody needs it any more right now: evictable, and the youngest of those."""

    def remove(self, id_: bytes) -> None:
        """It is gone, evicted or dropped."""

    def victims(self, *, need_bytes: int, need_objects: int) -> list[bytes] | None:
        """Idle objects that free at least so much, the least valuable first."""
