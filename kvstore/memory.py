"""The memory tier: where committed bytes live. Knows nothing of leases or budgets."""

from __future__ import annotations

import os

from kvstore.arena import LEAST_BYTES, Arena
from kvstore.contracts import Buffer
from penstock.errors import OverloadedError


class MemoryTier:
    """Objects' bytes by id. What may stay is the catalogue's decision."""

    def __init__(self, budget_bytes: int = 0) -> None:
        """`budget_bytes`: what the objects may take together; 0: never shared memory."""
        self._objects: dict[bytes, memoryview] = {}
        self._budget_bytes = budget_bytes if hasattr(os, "memfd_create") else 0
        self._arena: Arena | None = None

    def __len__(self) -> int:
        return len(self._objects)

    @property
    def size_bytes(self) -> int:
        return sum(len(view) for view in self._objects.values())

    @property
    def arena(self) -> Arena | None:
        """The shared memory, if any object has needed it."""
        return self._arena

    def allocate(self, size_bytes: int) -> memoryview:
        """Memory for one object; in the arena if it is large enough and there is room."""
        if self._budget_bytes and size_bytes >= LEAST_BYTES:
            if self._arena is None:
                self._arena = self._open()
            shared = None if self._arena is None else self._arena.allocate(size_bytes)
            if shared is not None:
                return shared
        return memoryview(bytearray(size_bytes))

    def fill(self, data: memoryview, start: int, chunk: Buffer) -> None:
        """`chunk` into allocated memory `data` from `start` on. Safe from any thread.

        Raises OverloadedError if the system has no memory for it.
        """
        offset = None if self._arena is None else self._arena.offset_of(data)
        if self._arena is None or offset is None:
            data[start : start + len(chunk)] = chunk
        else:
            try:
                self._arena.write(offset + start, chunk)
            except OSError as error:
                raise OverloadedError(
                    f"this host has no memory left for the object ({error.strerror}); give the "
                    "store less (--memory), or the host more"
                ) from error

    def store(self, id_: bytes, data: bytearray | memoryview) -> None:
        """Takes over `data`; nobody writes to it from now on."""
        self._objects[id_] = memoryview(data).toreadonly()

    def read(self, id_: bytes) -> memoryview:
        """Read-only bytes of a committed object; valid for as long as the caller keeps them."""
        return self._objects[id_]

    def drop(self, id_: bytes) -> None:
        del self._objects[id_]

    def _open(self) -> Arena | None:
        try:
            return Arena(self._budget_bytes)
        except (OSError, ValueError, OverflowError):
            # A limit on addresses or descriptors: ordinary memory serves.
            self._budget_bytes = 0
            return None
