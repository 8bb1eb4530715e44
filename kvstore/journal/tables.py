"""Ordered keys and values under serialisable transactions: all that the journal asks of a backend.

One logic (`kvstore.journal.jobs`, `.files`) runs over every backend, so a job behaves the same in
SQLite, in Redis and in the fake. Keys are ASCII paths, compared byte by byte.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import orjson

T = TypeVar("T")
Row = tuple[bytes, bytes]


class Reader(Protocol):
    """What a backend offers inside a transaction: its committed state, nothing newer."""

    def read(self, key: bytes) -> bytes | None: ...

    def read_range(self, start: bytes, end: bytes, limit: int) -> list[Row]:
        """Rows with start <= key < end, ascending, at most `limit`."""


class Transaction:
    """Reads through to the backend, keeps writes back until the backend commits them together."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self.writes: dict[bytes, bytes | None] = {}
        """What is to be committed; None: deleted."""

    def get(self, key: bytes) -> bytes | None:
        if key in self.writes:
            return self.writes[key]
        return self._reader.read(key)

    def load(self, key: bytes) -> Any:
        """The JSON value, or None."""
        raw = self.get(key)
        return None if raw is None else orjson.loads(raw)

    def put(self, key: bytes, value: bytes) -> None:
        self.writes[key] = value

    def save(self, key: bytes, value: Any) -> None:
        """`value`: what JSON can say, dataclasses included."""
        self.writes[key] = orjson.dumps(value)

    def delete(self, key: bytes) -> None:
        self.writes[key] = None

    def rows(self, prefix: bytes, *, after: bytes | None = None, limit: int = 1000) -> list[Row]:
        """Rows whose key begins with `prefix` and comes after `after` (a whole key), ascending."""
        start = prefix if after is None else max(prefix, after + b"\0")
        end = prefix_end(prefix)
        mine = {k: v for k, v in self.writes.items() if start <= k < end}
        found = dict(self._reader.read_range(start, end, limit + len(mine)))
        merged = {k: v for k, v in (found | mine).items() if v is not None}
        return sorted(merged.items())[:limit]


class Backend(Protocol):
    """Where the rows are. Calls block; one thread at a time."""

    def transact(self, work: Callable[[Transaction], T], *, read_only: bool = False) -> T:
        """Runs `work`; then its writes are committed all together, or not at all.

        `read_only` promises that there are none: then nobody who writes has to wait.

        Serialisable: `work` sees no other transaction half done, and if another one got in between
        it runs again, so it must do nothing but read and write through its argument. When this
        returns the writes are as durable as the backend promises. Raises JournalUnavailableError;
        whether the writes were made is then unknown, so callers repeat only what may be repeated.
        """

    def close(self) -> None: ...


def prefix_end(prefix: bytes) -> bytes:
    """The least key above all that begin with `prefix` (its last byte is below 0xff)."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


class MemoryBackend:
    """The fake: a dictionary. Lost with the process."""

    def __init__(self) -> None:
        self._values: dict[bytes, bytes] = {}
        self._keys: list[bytes] = []

    def read(self, key: bytes) -> bytes | None:
        return self._values.get(key)

    def read_range(self, start: bytes, end: bytes, limit: int) -> list[Row]:
        first, last = bisect_left(self._keys, start), bisect_left(self._keys, end)
        return [(key, self._values[key]) for key in self._keys[first : min(last, first + limit)]]

    def transact(self, work: Callable[[Transaction], T], *, read_only: bool = False) -> T:
        transaction = Transaction(self)
        result = work(transaction)
        for key, value in transaction.writes.items():
            if value is not None:
                self._values[key] = value
            else:
                self._values.pop(key, None)
        if transaction.writes:
            self._keys = sorted(self._values)
        return result

    def close(self) -> None:
        return
