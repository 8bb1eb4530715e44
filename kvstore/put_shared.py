"""The writer's side of the node's memory: objects written where they stay, and hashed meanwhile."""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3

from kvstore.arena import ArenaWriter
from kvstore.data.deliver import Parts
from protos.penstock.kv.v1 import kv_pb2


class SharedWriter:
    """A client's hold on the memory of the node that it writes to. Used by one thread at a time
    for each `places`.
    """

    def __init__(self, host: bytes) -> None:
        """`host`: what to say in an Offer; empty if the node's memory cannot be opened."""
        self.host = host
        self._arena: ArenaWriter | None = None

    def open(self, places: kv_pb2.OfferedPlaces) -> ArenaWriter | None:
        """The memory that holds `places`."""
        if self._arena is not None and self._arena.secret == places.secret:
            return self._arena
        self.close()
        try:
            self._arena = ArenaWriter(places.pid, places.fd, places.secret)
        except OSError:
            # Another container or user after all, or the node has ended: do without from now on.
            self.host = b""
        return self._arena

    def close(self) -> None:
        """May be called again."""
        arena, self._arena = self._arena, None
        if arena is not None:
            arena.close()


def write_all(arena: ArenaWriter, offsets: Sequence[int], objects: Sequence[Parts]) -> list[bytes]:
    """Each object to its place; their BLAKE3. Raises OSError for places outside the arena."""
    digests = []
    for offset, parts in zip(offsets, objects, strict=True):
        arena.write(offset, parts)
        hasher = blake3()
        for part in parts:
            hasher.update(part)
        digests.append(hasher.digest())
    return digests
