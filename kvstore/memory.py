"""The memory tier: where committed bytes live. Knows nothing of leases or budgets."""

from __future__ import annotations


class MemoryTier:
    """Objects' bytes by id. What may stay is the catalogue's decision."""

    def __init__(self) -> None:
        self._objects: dict[bytes, memoryview] = {}

    def __len__(self) -> int:
        return len(self._objects)

    @property
    def size_bytes(self) -> int:
        return sum(len(view) for view in self._objects.values())

    def store(self, id_: bytes, data: bytearray | memoryview) -> None:
        """Takes over `data`; nobody writes to it from now on."""
        self._objects[id_] = memoryview(data).toreadonly()

    def read(self, id_: bytes) -> memoryview:
        """Read-only bytes of a committed object; valid for as long as the caller keeps them."""
        return self._objects[id_]

    def drop(self, id_: bytes) -> None:
        del self._objects[id_]
