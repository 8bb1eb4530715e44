"""Shared memory that holds a node's objects, so that a reader on the same host copies them itself.

One memfd, sparse and larger than the node's budget: it has no name that a killed process could
leave behind, and pages that are given back are punched out of it. A reader opens it through
`/proc/PID/fd`, which the kernel allows to the same user in the same PID namespace only.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import os
import secrets
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from kvstore.buffers import Buffers
from kvstore.contracts import Buffer

LEAST_BYTES = 1 << 16
"""Smaller objects are in ordinary memory: pages would cost more than they hold."""
RECYCLED_BYTES = 64 << 20
"""Most memory beyond the budget that is kept for the next objects; the rest goes back."""
PREPARED_BYTES = 64 << 20
"""Most memory that is taken before objects need it, within the budget."""
SECRET_BYTES = 32
_NAME = "penstock-kv"
_STEP_BYTES = 4 << 20
"""Prepared in one call, between which others find the lock of the address space."""
_POPULATE_WRITE = 23
"""MADV_POPULATE_WRITE of Linux 5.14: take pages now, all at once."""
_PAGE_BYTES = mmap.PAGESIZE
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_ROOM = 4
"""Addresses by budget: objects of other sizes leave gaps, and gaps cost addresses, not memory."""


def host_identity() -> bytes:
    """Equal for two processes that may open each other's memory; empty where none can."""
    if not sys.platform.startswith("linux"):
        return b""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
        space = Path("/proc/self/ns/pid").stat()
    except OSError:
        return b""
    parts = (boot, str(space.st_dev), str(space.st_ino), str(os.geteuid()))
    return hashlib.sha256(repr(parts).encode()).digest()


class Arena:
    """Hands out memory; what nobody refers to any more is used again. Safe from any thread.

    `secret` stands at its start: a reader that finds it has opened this arena and no other file.
    """

    def __init__(self, budget_bytes: int) -> None:
        """Takes addresses for four times `budget_bytes`, and memory as objects come."""
        self._lock = threading.Lock()
        self._budget_bytes = budget_bytes
        self._size_bytes = _PAGE_BYTES + _pages(_ROOM * budget_bytes + RECYCLED_BYTES)
        self.fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, self._size_bytes)
        # Others map it: memory that could become shorter would kill who touches it.
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
        self._map = mmap.mmap(self.fd, self._size_bytes)
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self._map[:SECRET_BYTES] = self.secret
        self._base = np.frombuffer(self._map, np.uint8).ctypes.data
        self._next = self._ready = _PAGE_BYTES
        """Memory from the first of these offsets to the second was never used, and is prepared."""
        self._held_bytes = 0
        self._is_preparing = False
        self._freed: deque[tuple[int, int]] = deque()
        self._warm: dict[int, list[int]] = {}
        """Offsets by size of what was freed and still has its memory."""
        self._warm_bytes = 0
        self._gaps: list[tuple[int, int]] = []
        """Offset and size of what was given back to the system."""

    def allocate(self, size_bytes: int) -> memoryview | None:
        """Memory with anything in it; None if there is no room for it in one piece."""
        length = _pages(size_bytes)
        with self._lock:
            self._sort()
            offset = self._find(length)
            if offset is not None:
                self._held_bytes += length
            self._prepare_more()
        if offset is None:
            return None
        region = np.frombuffer(self._map, np.uint8, count=size_bytes, offset=offset)
        # Every view of the region refers to this array: it ends with the last of them.
        weakref.finalize(region, self._free, offset, length).atexit = False
        return memoryview(region.data)

    def write(self, offset: int, chunk: Buffer) -> None:
        """Bytes into allocated memory. Not through a view of it: memory that is written to for the
        first time would be taken page by page, each zeroed before. Raises OSError.
        """
        data = memoryview(chunk)
        while len(data):
            written = os.pwrite(self.fd, data, offset)
            offset, data = offset + written, data[written:]

    def offset_of(self, data: memoryview) -> int | None:
        """Where `data` lies; None if it is other memory."""
        if not len(data):
            return None
        offset = int(np.frombuffer(data, np.uint8).ctypes.data) - self._base
        return offset if 0 < offset < self._size_bytes else None

    def empty(self, data: memoryview) -> None:
        """Gives the memory of `data` back to the system; it reads as zeros until it is written."""
        offset = self.offset_of(data)
        if offset is not None:
            with suppress(OSError):
                self._map.madvise(mmap.MADV_REMOVE, offset, _pages(len(data)))

    @property
    def memory_bytes(self) -> int:
        """Memory that it takes from the system."""
        return os.fstat(self.fd).st_blocks * 512

    def _find(self, length: int) -> int | None:
        same = self._warm.get(length)
        if same:
            self._warm_bytes -= length
            return same.pop()
        if self._next + length <= self._size_bytes:
            self._next += length
            return self._next - length
        self._give_back(0)
        self._join_gaps()
        for place, (offset, size) in enumerate(self._gaps):
            if size >= length:
                self._gaps[place] = (offset + length, size - length)
                return offset
        return None

    def _free(self, offset: int, length: int) -> None:
        # The garbage collector may call this while this very thread holds the lock.
        self._freed.append((offset, length))
        if self._lock.acquire(blocking=False):
            try:
                self._sort()
            finally:
                self._lock.release()

    def _sort(self) -> None:
        while self._freed:
            offset, length = self._freed.popleft()
            self._held_bytes -= length
            self._warm.setdefault(length, []).append(offset)
            self._warm_bytes += length
        prepared = max(0, self._ready - self._next)
        most_bytes = self._budget_bytes + RECYCLED_BYTES - self._held_bytes - prepared
        if self._warm_bytes > max(0, most_bytes):
            self._give_back(max(0, most_bytes - RECYCLED_BYTES // 2))

    def _prepare_more(self) -> None:
        """Take the pages of the next objects beside what is going on, as far as the budget goes.

        An object that comes into new memory costs three times one that comes into memory that is
        there: each page is zeroed and mapped when its first byte arrives.
        """
        wanted = self._wanted_bytes()
        # A step is worth a thread.
        if (
            wanted >= _STEP_BYTES
            and not self._is_preparing
            and self._ready - self._next < wanted // 2
        ):
            self._is_preparing = True
            threading.Thread(target=self._prepare, name="kv-arena", daemon=True).start()

    def _wanted_bytes(self) -> int:
        room = self._budget_bytes - self._held_bytes - self._warm_bytes
        return max(0, min(PREPARED_BYTES - self._warm_bytes, room, self._size_bytes - self._next))

    def _prepare(self) -> None:
        while True:
            with self._lock:
                start = max(self._ready, self._next)
                stop = min(self._next + self._wanted_bytes(), start + _STEP_BYTES)
                if stop <= start:
                    self._is_preparing = False
                    return
            failed = _madvise(self._base + start, stop - start, _POPULATE_WRITE)
            with self._lock:
                if failed:
                    # An older kernel, or no memory: pages are taken one by one, or refused then.
                    return
                self._ready = max(self._ready, stop)

    def _give_back(self, keep_bytes: int) -> None:
        for length, offsets in list(self._warm.items()):
            while offsets and self._warm_bytes > keep_bytes:
                offset = offsets.pop()
                self._map.madvise(mmap.MADV_REMOVE, offset, length)
                self._gaps.append((offset, length))
                self._warm_bytes -= length
            if not offsets:
                del self._warm[length]

    def _join_gaps(self) -> None:
        joined: list[tuple[int, int]] = []
        for offset, size in sorted(self._gaps):
            if joined and sum(joined[-1]) == offset:
                joined[-1] = (joined[-1][0], joined[-1][1] + size)
            elif size:
                joined.append((offset, size))
        self._gaps = joined


class ArenaReader:
    """Another process's arena, mapped for reading. Raises OSError unless it is that arena."""

    def __init__(self, pid: int, fd: int, secret: bytes, buffers: Buffers | None = None) -> None:
        """`buffers`: where copies go."""
        self.secret = secret
        self._memory: np.ndarray | None = _mapped(pid, fd, secret, writes=False)
        self._buffers = buffers or Buffers()

    def copy(self, offset: int, size_bytes: int) -> memoryview:
        """The bytes there now, in memory of one's own. Raises OSError if they end early."""
        memory = self._memory
        if memory is None or offset < 0 or offset + size_bytes > len(memory):
            raise OSError("the arena ends inside an object")
        data = self._buffers.new(size_bytes)
        # numpy lets go of the interpreter lock meanwhile.
        np.copyto(np.frombuffer(data, np.uint8), memory[offset : offset + size_bytes])
        return data

    def close(self) -> None:
        """May be called again. The mapping ends with the last copy that is under way."""
        self._memory = None


def _madvise(address: int, length: int, advice: int) -> bool:
    """Whether it failed. Lets go of the interpreter lock, which `mmap.madvise` keeps."""
    call = _LIBC.madvise
    return bool(call(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice)))


def _is_there(address: int, length: int) -> bool:
    """Whether every page from `address` on has its memory already: a tenth of asking for it."""
    seen = np.zeros(_pages(length) // _PAGE_BYTES, np.uint8)
    failed = _LIBC.mincore(
        ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_void_p(seen.ctypes.data)
    )
    return not failed and bool((seen & 1).all())


_LIBC = ctypes.CDLL(None)


class ArenaWriter:
    """Another process's arena, mapped for writing where its node says. Raises OSError as
    `ArenaReader` does.
    """

    def __init__(self, pid: int, fd: int, secret: bytes) -> None:
        self.secret = secret
        self._memory: np.ndarray | None = _mapped(pid, fd, secret, writes=True)

    def write(self, offset: int, parts: Sequence[memoryview]) -> None:
        """The parts one after the other. Raises OSError outside the arena."""
        memory = self._memory
        size = sum(map(len, parts))
        if memory is None or offset < _PAGE_BYTES or offset + size > len(memory):
            raise OSError("the place is not in the arena")
        place = memory.ctypes.data + offset // _PAGE_BYTES * _PAGE_BYTES
        length = memory.ctypes.data + offset + size - place
        if not _is_there(place, length) and _madvise(place, length, _POPULATE_WRITE):
            # Touching memory that the host does not have would end this process.
            raise OSError("the host has no memory for the place, or no way to ask for it")
        for part in parts:
            # numpy lets go of the interpreter lock meanwhile.
            np.copyto(memory[offset : offset + len(part)], np.frombuffer(part, np.uint8))
            offset += len(part)

    def close(self) -> None:
        """May be called again."""
        self._memory = None


def _mapped(pid: int, fd: int, secret: bytes, *, writes: bool) -> np.ndarray:
    """The memory of an arena by its descriptor in another process."""
    path = Path(f"/proc/{pid}/fd/{fd}")
    # Nothing else is opened: a pipe would wait, a device might act.
    if not str(path.readlink()).startswith(f"/memfd:{_NAME}"):
        raise FileNotFoundError(f"{path} is no arena")
    here = os.open(path, (os.O_RDWR if writes else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        if len(secret) != SECRET_BYTES or os.pread(here, SECRET_BYTES, 0) != secret:
            raise FileNotFoundError(f"{path} is another arena")
        if fcntl.fcntl(here, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise OSError(f"{path} might become shorter")
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writes else 0)
        return np.frombuffer(mmap.mmap(here, 0, prot=prot), np.uint8)
    finally:
        os.close(here)


def _pages(size_bytes: int) -> int:
    return -(-size_bytes // _PAGE_BYTES) * _PAGE_BYTES
