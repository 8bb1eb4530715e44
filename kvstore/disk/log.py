"""The disk tier's catalogue: a log of fixed-size records, each with its own CRC-32.

A record says that an object lies somewhere (`put`) or is gone (`drop`). Records never change;
appending is the only write, and `rewrite` replaces the whole log by one `put` a live object, in a
new file that is renamed into place. Whatever a crash, a full disk or a flipped bit leaves behind,
reading yields the records that are whole and counts the others: a lost `put` is a miss, a lost
`drop` a place whose bytes fail their digest.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from penstock.blocks import ObjectKind

_BODY = struct.Struct("<4sBBHIQQQ32s32s32s")
_CRC = struct.Struct("<I")
RECORD_BYTES = _BODY.size + _CRC.size
_MAGIC = b"PKV1"
_PUT, _DROP = 1, 2
_KINDS = {ObjectKind.BLOCK: 1, ObjectKind.STATE: 2}
_KIND_OF = {number: kind for kind, number in _KINDS.items()}
_NO_DIGEST = bytes(32)


class Place(NamedTuple):
    """One object on disk: where it lies, and what the store must know of it without reading it.

    A tuple, because a million of them are made before a node with a full disk serves.
    """

    id: bytes
    kind: ObjectKind
    parent: bytes
    position: int
    """Tokens of the prompt up to and with it."""
    digest: bytes
    extent: int
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class LogContents:
    """What a log says now: live objects in order of writing, and how much of it was unreadable."""

    places: dict[bytes, Place]
    records: int
    damaged: int


def _pack_put(place: Place) -> bytes:
    body = _BODY.pack(
        _MAGIC,
        _PUT,
        _KINDS[place.kind],
        0,
        place.extent,
        place.offset,
        place.size_bytes,
        place.position,
        place.id,
        place.parent.ljust(32, b"\0"),
        place.digest,
    )
    return body + _CRC.pack(zlib.crc32(body))


def _pack_drop(id_: bytes) -> bytes:
    body = _BODY.pack(_MAGIC, _DROP, 0, 0, 0, 0, 0, 0, id_, _NO_DIGEST, _NO_DIGEST)
    return body + _CRC.pack(zlib.crc32(body))


def read_log(path: Path) -> LogContents:
    """Everything whole in the log; a file that is not there is an empty one. OSError passes."""
    places: dict[bytes, Place] = {}
    records = damaged = 0
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return LogContents(places, 0, 0)
    view = memoryview(raw)
    whole = len(raw) - len(raw) % RECORD_BYTES
    if whole != len(raw):
        damaged += 1
    crc32, crc_at, unpack = zlib.crc32, _CRC.unpack_from, _BODY.unpack_from
    for start in range(0, whole, RECORD_BYTES):
        end = start + _BODY.size
        if crc32(view[start:end]) != crc_at(view, end)[0]:
            damaged += 1
            continue
        magic, op, kind, _, extent, offset, size, position, id_, parent, digest = unpack(
            view, start
        )
        records += 1
        if magic != _MAGIC or (op == _PUT and (kind not in _KIND_OF or size == 0)):
            damaged += 1
        elif op == _PUT:
            places[id_] = Place(id_, _KIND_OF[kind], parent, position, digest, extent, offset, size)
        elif op == _DROP:
            places.pop(id_, None)
        else:
            damaged += 1
    return LogContents(places, records, damaged)


def sync_folder(folder: Path) -> None:
    """Names made or replaced in `folder` are on the medium. OSError passes."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class CatalogLog:
    """The log's writing end. One thread uses it. OSError passes; the log stays readable."""

    def __init__(self, path: Path, *, records: int) -> None:
        """`records`: how many the file has, from `read_log`. A torn last one is cut off."""
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self.records = records
        size = os.fstat(self._fd).st_size
        self._end = size - size % RECORD_BYTES
        os.ftruncate(self._fd, self._end)

    def put(self, place: Place) -> None:
        self._append(_pack_put(place))

    def drop(self, ids: Iterable[bytes]) -> None:
        self._append(b"".join(map(_pack_drop, ids)))

    def sync(self) -> None:
        os.fdatasync(self._fd)

    def rewrite(self, places: Iterable[Place]) -> None:
        """Replace the log by its live records. The old one stands until the new one is on disk."""
        fresh = self._path.with_suffix(".new")
        count = 0
        with fresh.open("wb") as file:
            os.fchmod(file.fileno(), 0o600)
            for place in places:
                file.write(_pack_put(place))
                count += 1
            file.flush()
            os.fdatasync(file.fileno())
        fresh.replace(self._path)
        sync_folder(self._path.parent)
        os.close(self._fd)
        self._fd = os.open(self._path, os.O_RDWR | os.O_APPEND)
        self._end = count * RECORD_BYTES
        self.records = count

    def close(self) -> None:
        os.close(self._fd)

    def _append(self, data: bytes) -> None:
        try:
            written = os.write(self._fd, data)
            if written != len(data):
                raise OSError(28, "the disk took only a part of a record")
        except OSError:
            # Half a record would shift every later one.
            os.ftruncate(self._fd, self._end)
            raise
        self._end += len(data)
        self.records += len(data) // RECORD_BYTES
