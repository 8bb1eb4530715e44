"""Objects in a bucket: names, bytes, and what fsspec does with them. Blocking; threads call it.

`ROOT/v1/AB/ABCD....kv` holds the object whose id is `ABCD...` in hex: ids already are functions of
content, fingerprint and tenant (docs/kv-identity.md), so one bucket serves several nodes, models
and tenants, and a node finds what another one wrote. The bytes are a header with a CRC-32, then the
object as it lies in memory.
"""

from __future__ import annotations

import re
import secrets
import struct
import time
import zlib
from dataclasses import dataclass
from typing import Any, Protocol

import fsspec

from penstock.blocks import ObjectKind
from penstock.errors import UsageError

_HEADER = struct.Struct("<4sB3xQQ32s32s32s")
_CRC = struct.Struct("<I")
_MAGIC = b"PKO1"
_KINDS = {ObjectKind.BLOCK: 1, ObjectKind.STATE: 2}
_KIND_OF = {number: kind for kind, number in _KINDS.items()}
_NAME = re.compile(r"/([0-9a-f]{2})/(\1[0-9a-f]{62})\.kv$")
_STALE_S = 3600.0


@dataclass(frozen=True)
class Stored:
    """One object with what a catalogue must know of it. `data` is not yet verified."""

    id: bytes
    kind: ObjectKind
    parent: bytes
    position: int
    digest: bytes
    data: memoryview


@dataclass(frozen=True)
class Listed:
    """What a listing tells of an object: its bytes (header aside), and when it was written."""

    id: bytes
    size_bytes: int
    written_at: float


class Bucket(Protocol):
    """Every call blocks for as long as the network pleases; failures pass as they come."""

    def put(self, item: Stored) -> None: ...

    def get(self, id_: bytes) -> Stored | None:
        """None for an object that is not there, or whose header is not whole."""

    def remove(self, id_: bytes) -> None:
        """Idempotent."""

    def list(self) -> list[Listed]: ...


def pack(item: Stored) -> bytes:
    header = _HEADER.pack(
        _MAGIC,
        _KINDS[item.kind],
        item.position,
        len(item.data),
        item.id,
        item.parent.ljust(32, b"\0"),
        item.digest,
    )
    return b"".join((header, _CRC.pack(zlib.crc32(header)), item.data))


def unpack(id_: bytes, raw: bytes) -> Stored | None:
    """None unless these are the whole bytes of this object; its digest is the caller's to check."""
    start = _HEADER.size + _CRC.size
    if (
        len(raw) < start
        or zlib.crc32(raw[: _HEADER.size]) != _CRC.unpack_from(raw, _HEADER.size)[0]
    ):
        return None
    magic, kind, position, size, own_id, parent, digest = _HEADER.unpack_from(raw)
    data = memoryview(raw)[start:]
    if magic != _MAGIC or kind not in _KIND_OF or own_id != id_ or size != len(data):
        return None
    return Stored(id_, _KIND_OF[kind], parent, position, digest, data)


class FsBucket:
    """A `Bucket` over any fsspec filesystem. Credentials come from where that library looks."""

    def __init__(self, fs: Any, root: str) -> None:
        self._fs = fs
        self._root = f"{root.rstrip('/')}/v1"
        protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
        self._renames = protocol in ("file", "local")

    def put(self, item: Stored) -> None:
        path = self._path(item.id)
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)
        if not self._renames:
            self._fs.pipe_file(path, pack(item))
            return
        # A file system shows what is half written; object stores do not.
        fresh = f"{self._root}/new-{secrets.token_hex(8)}"
        try:
            self._fs.pipe_file(fresh, pack(item))
            self._fs.mv(fresh, path)
        except BaseException:
            if self._fs.exists(fresh):
                self._fs.rm_file(fresh)
            raise

    def get(self, id_: bytes) -> Stored | None:
        try:
            return unpack(id_, self._fs.cat_file(self._path(id_)))
        except FileNotFoundError:
            return None

    def remove(self, id_: bytes) -> None:
        try:
            self._fs.rm_file(self._path(id_))
        except FileNotFoundError:
            return

    def list(self) -> list[Listed]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.find(self._root, detail=True)
        except FileNotFoundError:
            return []
        listed, overhead = [], _HEADER.size + _CRC.size
        for path, info in found.items():
            name = _NAME.search(path)
            written = _seconds(info)
            if name is None:
                self._sweep(path, written)
            else:
                size = max(int(info.get("size") or 0) - overhead, 0)
                listed.append(Listed(bytes.fromhex(name[2]), size, written))
        return listed

    def _sweep(self, path: str, written: float) -> None:
        """What a killed writer left half done."""
        if "/new-" in path and self._renames and time.time() - written > _STALE_S:
            self._fs.rm_file(path)

    def _path(self, id_: bytes) -> str:
        name = id_.hex()
        return f"{self._root}/{name[:2]}/{name}.kv"


def open_bucket(url: str) -> FsBucket:
    """Raises UsageError for a URL that no installed library serves."""
    try:
        fs, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(
            f"the object tier cannot use kvstore.object_url ({error}); install the library that "
            "fsspec needs for it (s3fs for s3://), or name file:///FOLDER"
        ) from error
    return FsBucket(fs, root)


def _seconds(info: dict[str, Any]) -> float:
    """When it was written, as far as the listing tells; libraries name and type it differently."""
    for key in ("mtime", "LastModified", "created", "last_modified"):
        value = info.get(key)
        if value is not None:
            return float(value.timestamp() if hasattr(value, "timestamp") else value)
    return 0.0
