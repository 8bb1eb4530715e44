"""The safetensors files of a model folder: where every tensor lies, and its bytes.

Bytes are read with `pread` into buffers of a bounded size, never mapped: mapped pages would count
as this process's memory, and a file cut short under a mapping kills the process instead of raising.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.errors import ModelLoadError

Bytes = npt.NDArray[np.uint8]

INDEX_FILE = "model.safetensors.index.json"
BUFFER_BYTES = 512 << 10
"""Most bytes read at once: what they become still fits a core's cache."""
LARGEST_HEADER = 128 << 20
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8}
_BITS |= {"I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8}
_BITS |= {"BOOL": 8, "F4": 4}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; `at` and `size_bytes` are its place in the file."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    at: int
    size_bytes: int

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def row_bytes(self) -> int:
        return self.size_bytes // max(self.rows, 1)


class Shards:
    """All tensors of a folder by name. Close it, or use it as a context."""

    def __init__(self, root: Path, entries: dict[str, Entry]) -> None:
        self.root, self.entries = root, entries
        self._files: dict[Path, int] = {}
        self.bytes_read = 0

    @classmethod
    def open(cls, folder: Path | str) -> Shards:
        """Read the headers. Raises `ModelLoadError` with one sentence."""
        root = Path(folder)
        index = root / INDEX_FILE
        return cls(root, _indexed(root, index) if index.exists() else _unindexed(root))

    def rows(self, entry: Entry, first: int, last: int) -> Bytes:
        """Bytes [last - first, row_bytes] of rows `first` .. `last` - 1, in a buffer of its own."""
        out = np.empty((last - first, entry.row_bytes), np.uint8)
        view, at = out.reshape(-1).data, 0
        try:
            file = self._file(entry.path)
            while at < len(view):
                start = entry.at + first * entry.row_bytes + at
                got = os.preadv(file, [view[at:]], start)
                if not got:
                    raise ModelLoadError(f"{entry.path} became shorter while it was read")
                at += got
        except OSError as error:
            raise ModelLoadError(f"{entry.path} cannot be read: {error}") from None
        self.bytes_read += at
        return out

    def blocks(self, entry: Entry, first: int, last: int) -> Iterator[tuple[int, Bytes]]:
        """`rows` in pieces of at most about `BUFFER_BYTES`: (number of the first row, bytes)."""
        most = max(BUFFER_BYTES // max(entry.row_bytes, 1), 1)
        for start in range(first, last, most):
            yield start, self.rows(entry, start, min(start + most, last))

    def _file(self, path: Path) -> int:
        if path not in self._files:
            self._files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return self._files[path]

    def close(self) -> None:
        for file in self._files.values():
            os.close(file)
        self._files.clear()

    def __enter__(self) -> Shards:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


def _indexed(root: Path, index: Path) -> dict[str, Entry]:
    """Exactly the index's tensors: the files that it names must hold these and no others."""
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        wanted = {str(name): str(file) for name, file in listed.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelLoadError(f"{index} cannot be read as a tensor index: {error!r}") from None
    if outside := sorted({file for file in wanted.values() if Path(file).name != file}):
        raise ModelLoadError(f"{index} names {outside[0]!r}, which is not a file of this folder")
    files = sorted(set(wanted.values()))
    if absent := [file for file in files if not (root / file).is_file()]:
        raise ModelLoadError(
            f"{index.name} of {root} names {named(absent)}, which "
            f"{'is' if len(absent) == 1 else 'are'} not there; the download is not complete"
        )
    found: dict[str, Entry] = {}
    for file in files:
        held = read_header(root / file)
        found |= {name: entry for name, entry in held.items() if wanted.get(name) == file}
        if extra := [name for name in held if wanted.get(name) != file]:
            raise ModelLoadError(f"{root / file} holds {named(extra)} against its index")
    if lacking := [name for name in wanted if name not in found]:
        where = sorted({wanted[name] for name in lacking})
        raise ModelLoadError(
            f"{named(lacking)} is listed in the index but not in {named(where)} of {root}"
        )
    return found


def _unindexed(root: Path) -> dict[str, Entry]:
    """`model.safetensors` alone if it is there (other files beside it, such as an oracle's, are not
    the model); else every file.
    """
    only = root / "model.safetensors"
    files = [only] if only.exists() else sorted(root.glob("*.safetensors"))
    found: dict[str, Entry] = {}
    for path in files:
        for name, entry in read_header(path).items():
            if name in found:
                raise ModelLoadError(f"{name} is in both {found[name].path.name} and {path.name}")
            found[name] = entry
    if not found:
        raise ModelLoadError(f"{root} holds no *.safetensors file with tensors")
    return found


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of one file, checked against the file's length."""
    try:
        return _parse_header(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"{path} is not a whole safetensors file: {error}") from None


def _parse_header(path: Path) -> dict[str, Entry]:
    """Raises ValueError (or a look-up's error) that says what is wrong."""
    with path.open("rb") as file:
        total = os.fstat(file.fileno()).st_size
        size = int.from_bytes(file.read(8), "little")
        if total < 8 or size > min(total - 8, LARGEST_HEADER):
            raise ValueError(f"its header of {size} bytes does not fit its {total} bytes")
        raw: dict[str, Any] = json.loads(file.read(size))
    start, end = 8 + size, 8 + size
    entries: dict[str, Entry] = {}
    for name, given in raw.items():
        if name == "__metadata__":
            continue
        first, last = (int(offset) for offset in given["data_offsets"])
        shape = tuple(int(length) for length in given["shape"])
        bits = _BITS[given["dtype"]] * math.prod(shape)
        if first < 0 or (last - first) * 8 != bits or min(shape, default=0) < 0:
            raise ValueError(f"{name} has {last - first} bytes for {given['dtype']} {list(shape)}")
        entries[name] = Entry(path, str(given["dtype"]), shape, start + first, last - first)
        end = max(end, start + last)
    if end != total:
        raise ValueError(f"its tensors end at byte {end}, the file at {total}")
    return entries


def named(names: list[str], most: int = 8) -> str:
    """A list for a sentence, cut to a bearable length."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
