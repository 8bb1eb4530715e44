"""Memory for objects that come in, used again when nobody refers to it any more.

New memory is taken from the system page by page, each zeroed: that costs several times what
filling it does. Objects of a model have few sizes, so exact ones are kept.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque

import numpy as np

KEPT_BYTES = 96 << 20
"""Most freed memory that is kept for the next objects: a ticket's bytes and some."""


class Buffers:
    """Safe from any thread."""

    def __init__(self, kept_bytes: int = KEPT_BYTES) -> None:
        self._most_bytes = kept_bytes
        self._lock = threading.Lock()
        self._freed: deque[np.ndarray] = deque()
        self._kept: dict[int, list[np.ndarray]] = {}
        self._kept_bytes = 0

    @property
    def kept_bytes(self) -> int:
        return self._kept_bytes

    def new(self, size_bytes: int) -> memoryview:
        """Memory with anything in it, the caller's until the last view of it ends."""
        with self._lock:
            self._sort()
            memory = self._take(size_bytes) if size_bytes in self._kept else None
        if memory is None:
            memory = np.empty(size_bytes, np.uint8)
        shown = memory[:]
        # Every view refers to this array: it ends with the last of them.
        weakref.finalize(shown, self._free, memory).atexit = False
        return memoryview(shown.data)

    def _free(self, memory: np.ndarray) -> None:
        # The garbage collector may call this while this very thread holds the lock.
        self._freed.append(memory)
        if self._lock.acquire(blocking=False):
            try:
                self._sort()
            finally:
                self._lock.release()

    def _sort(self) -> None:
        while self._freed:
            memory = self._freed.popleft()
            if memory.nbytes > self._most_bytes:
                continue
            while self._kept_bytes and self._kept_bytes + memory.nbytes > self._most_bytes:
                self._forget_one(but=memory.nbytes)
            self._kept.setdefault(memory.nbytes, []).append(memory)
            self._kept_bytes += memory.nbytes

    def _forget_one(self, *, but: int) -> None:
        """One buffer of another size than `but`, if there is one: sizes in use stay."""
        self._take(next((size for size in self._kept if size != but), but))

    def _take(self, size: int) -> np.ndarray:
        same = self._kept[size]
        memory = same.pop()
        self._kept_bytes -= size
        if not same:
            del self._kept[size]
        return memory
