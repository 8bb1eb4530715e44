"""Extents and their log in one folder: write, drop, read, compact. Blocking; no asyncio.

Objects are appended to an extent file until it is full, then the next one begins. A dropped object
leaves a hole; an extent without live objects is deleted, and when holes have eaten the space the
extent with the fewest live bytes is copied to the end and deleted. One thread writes; any thread
may read meanwhile. Buffered I/O: the page cache is the kernel's to give away, and reads of a
prefix's blocks are sequential, so direct I/O would only lose the read-ahead.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from kvstore.disk.log import CatalogLog, LogContents, Place, read_log, sync_folder
from penstock.errors import UsageError

_LOG = "catalog.log"
_LOCK = "lock"
_REWRITE_AFTER = 8192
"""A log is rewritten when it has so many records more than twice the live objects."""


class DiskFiles:
    """The files of one node's disk tier; holds the folder's lock until `close`."""

    def __init__(self, folder: Path, *, size_bytes: int, extent_bytes: int) -> None:
        """Reads the log. Raises UsageError for a folder that cannot be used, or is in use."""
        self.folder = folder
        self._size_bytes = size_bytes
        self._extent_bytes = extent_bytes
        self._lock = _take_lock(folder)
        try:
            contents = self._read()
            self._log = CatalogLog(folder / _LOG, records=contents.records)
        except OSError as error:
            os.close(self._lock)
            raise UsageError(
                f"the disk tier in {folder} cannot be read: {error.strerror}"
            ) from error
        self.damaged = contents.damaged
        self.unreadable = 0
        """Objects given up because compaction could not read them."""
        self._places = contents.places
        self._live: dict[int, dict[bytes, None]] = {}
        self._live_bytes: dict[int, int] = {}
        self._sizes = self._extent_sizes()
        for place in self._places.values():
            self._count(place)
        # A new extent for each start: what a crash left at the end of the last one stays a hole.
        self._head = max([*self._sizes, self._highest], default=-1) + 1
        self._head_fd: int | None = None
        self._new_name = True
        # A process that was killed may have left extents that no one synced.
        self._inherited = list(self._sizes)
        for extent in [number for number in self._sizes if number not in self._live]:
            self._try_delete(extent)

    @property
    def places(self) -> dict[bytes, Place]:
        """Live objects in order of writing. The writing thread changes it."""
        return self._places

    @property
    def file_bytes(self) -> int:
        """Bytes of all extents, holes included."""
        return sum(self._sizes.values())

    def write(self, place: Place, data: memoryview) -> Place:
        """Append an object and its record; where it lies now. OSError leaves no trace but a hole.

        `place`'s extent and offset are chosen here.
        """
        self._trim_log()
        self._make_space(len(data))
        placed = self._append(place, data)
        self._log.put(placed)
        before = self._places.get(placed.id)
        if before is not None:
            self._uncount(before)
        self._places[placed.id] = placed
        self._count(placed)
        return placed

    def drop(self, ids: Iterable[bytes]) -> None:
        """Forget objects; unknown ids are passed over. The space comes back with their extents."""
        gone = [self._places.pop(id_) for id_ in ids if id_ in self._places]
        for place in gone:
            self._uncount(place)
        if gone:
            self._log.drop([place.id for place in gone])
        self._trim_log()

    def read(self, id_: bytes) -> bytearray | None:
        """The object's bytes, unverified; None if it is gone. OSError passes. Any thread."""
        for _ in range(2):
            place = self._places.get(id_)
            if place is None:
                return None
            try:
                return _read_range(self._path(place.extent), place.offset, place.size_bytes)
            except FileNotFoundError:
                # Compaction has just moved it: its new place is already known.
                continue
        return None

    def sync(self) -> None:
        """Everything written so far is on the medium: extents first, then what names them."""
        while self._inherited:
            self._sync_extent(self._inherited[-1])
            self._inherited.pop()
        if self._head_fd is not None:
            os.fdatasync(self._head_fd)
        if self._new_name:
            sync_folder(self.folder)
            self._new_name = False
        self._log.sync()

    def close(self) -> None:
        if self._head_fd is not None:
            os.close(self._head_fd)
            self._head_fd = None
        self._log.close()
        os.close(self._lock)

    # Inside

    def _read(self) -> LogContents:
        """The log's objects whose bytes can be there at all."""
        contents = read_log(self.folder / _LOG)
        sizes = self._extent_sizes()
        # A number that the log names is never used again, whether or not its file is still there.
        self._highest = max((place.extent for place in contents.places.values()), default=-1)
        for place in list(contents.places.values()):
            if place.offset + place.size_bytes > sizes.get(place.extent, 0):
                del contents.places[place.id]
        return contents

    def _extent_sizes(self) -> dict[int, int]:
        sizes = {}
        for path in self.folder.glob("extent-*.kv"):
            number = path.stem.removeprefix("extent-")
            if number.isdigit():
                sizes[int(number)] = path.stat().st_size
        return sizes

    def _path(self, extent: int) -> Path:
        return self.folder / f"extent-{extent:010}.kv"

    def _append(self, place: Place, data: memoryview) -> Place:
        if self._sizes.get(self._head, 0) + len(data) > self._extent_bytes:
            self._seal()
        if self._head_fd is None:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            self._head_fd = os.open(self._path(self._head), flags, 0o600)
            self._new_name = True
            self._sizes[self._head] = os.fstat(self._head_fd).st_size
        offset = self._sizes[self._head]
        try:
            done = 0
            while done < len(data):
                done += os.write(self._head_fd, data[done:])
        finally:
            # After a failure too: the next object must know where the file really ends.
            self._sizes[self._head] = os.fstat(self._head_fd).st_size
        return Place(
            place.id,
            place.kind,
            place.parent,
            place.position,
            place.digest,
            self._head,
            offset,
            len(data),
        )

    def _sync_extent(self, extent: int) -> None:
        try:
            fd = os.open(self._path(extent), os.O_RDONLY)
        except FileNotFoundError:
            return
        try:
            os.fdatasync(fd)
        finally:
            os.close(fd)

    def _seal(self) -> None:
        if self._head_fd is None:
            return
        os.fdatasync(self._head_fd)
        os.close(self._head_fd)
        self._head_fd = None
        if self._head not in self._live:
            self._try_delete(self._head)
        self._head += 1

    def _make_space(self, size_bytes: int) -> None:
        """Compact until `size_bytes` fit. The catalogue keeps live bytes well below the size."""
        while self.file_bytes + size_bytes > self._size_bytes:
            sealed = [number for number in self._sizes if number != self._head]
            if not sealed:
                self._seal()
                if not self._sizes:
                    return
                continue
            worst = min(sealed, key=lambda number: self._live_bytes.get(number, 0))
            holes = self._sizes[worst] - self._live_bytes.get(worst, 0)
            if holes <= 0:
                raise OSError(28, "the disk tier's extents hold no space to win back")
            if worst in self._live:
                self._move(list(self._live[worst]))
                # Until the copies are on the medium a power cut may take them.
                self.sync()
            self._delete(worst)

    def _move(self, ids: Sequence[bytes]) -> None:
        for id_ in ids:
            place = self._places[id_]
            try:
                data = _read_range(self._path(place.extent), place.offset, place.size_bytes)
            except OSError:
                # One bad sector must not stop every later write; its readers will miss.
                self.unreadable += 1
                self._log.drop([id_])
                self._uncount(self._places.pop(id_), keep_file=True)
                continue
            placed = self._append(place, memoryview(data))
            self._log.put(placed)
            self._uncount(place, keep_file=True)
            self._places[id_] = placed
            self._count(placed)

    def _trim_log(self) -> None:
        if self._log.records > 2 * len(self._places) + _REWRITE_AFTER:
            self._log.rewrite(self._places.values())

    def _count(self, place: Place) -> None:
        self._live.setdefault(place.extent, {})[place.id] = None
        self._live_bytes[place.extent] = self._live_bytes.get(place.extent, 0) + place.size_bytes

    def _uncount(self, place: Place, *, keep_file: bool = False) -> None:
        live = self._live[place.extent]
        del live[place.id]
        self._live_bytes[place.extent] -= place.size_bytes
        if not live:
            del self._live[place.extent], self._live_bytes[place.extent]
            if place.extent != self._head and not keep_file:
                self._try_delete(place.extent)

    def _try_delete(self, extent: int) -> None:
        """A file that cannot be deleted now stays a hole, and compaction tries again."""
        with suppress(OSError):
            self._delete(extent)

    def _delete(self, extent: int) -> None:
        self._path(extent).unlink(missing_ok=True)
        self._sizes.pop(extent, None)


def _read_range(path: Path, offset: int, size: int) -> bytearray:
    """Exactly `size` bytes, or fewer where the file ends: the digest tells."""
    data = bytearray(size)
    fd = os.open(path, os.O_RDONLY)
    try:
        view, done = memoryview(data), 0
        while done < size:
            got = os.preadv(fd, [view[done:]], offset + done)
            if got == 0:
                break
            done += got
    finally:
        os.close(fd)
    return data


def _take_lock(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise UsageError(
            f"the disk tier cannot use {folder}: {error.strerror}; give another folder by --disk"
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise UsageError(
            f"another store node uses {folder}; give each node a folder of its own by --disk"
        ) from error
    return lock
