"""The journal's rows in one SQLite file: the default. Several processes may share it."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from kvstore.journal.tables import Row, Transaction
from penstock.errors import JournalUnavailableError, UsageError

T = TypeVar("T")
_SCHEMA = 1
_BUSY_TIMEOUT_S = 10.0
_PUT = "INSERT INTO rows VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value"


class SqliteBackend:
    """`Backend` over a file. The file and its folder are made at the first transaction.

    Commits wait for the disk (`synchronous=FULL`): what a caller was told survives a power cut.
    Belongs to one thread at a time.
    """

    def __init__(self, path: Path, *, durable: bool = True) -> None:
        """`durable` False: what is committed survives the process, perhaps not a power cut."""
        self.path = path
        self._synchronous = "FULL" if durable else "OFF"
        self._connection: sqlite3.Connection | None = None

    def read(self, key: bytes) -> bytes | None:
        row = self._open().execute("SELECT value FROM rows WHERE key = ?", (key,)).fetchone()
        return None if row is None else bytes(row[0])

    def read_range(self, start: bytes, end: bytes, limit: int) -> list[Row]:
        return [
            (bytes(key), bytes(value))
            for key, value in self._open().execute(
                "SELECT key, value FROM rows WHERE key >= ? AND key < ? ORDER BY key LIMIT ?",
                (start, end, limit),
            )
        ]

    def transact(self, work: Callable[[Transaction], T], *, read_only: bool = False) -> T:
        with self._mapped():
            connection = self._open()
            # Immediate: a reader that later wants to write would have to fail instead of waiting.
            connection.execute("BEGIN" if read_only else "BEGIN IMMEDIATE")
            try:
                transaction = Transaction(self)
                result = work(transaction)
                for key, value in transaction.writes.items():
                    if value is None:
                        connection.execute("DELETE FROM rows WHERE key = ?", (key,))
                    else:
                        connection.execute(_PUT, (key, value))
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise
            return result

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _open(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
        )
        try:
            # It holds documents and answers.
            self.path.chmod(0o600)
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA synchronous={self._synchronous}")
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version not in (0, _SCHEMA):
                raise UsageError(
                    f"the journal {self.path} was written by another version of Penstock (schema "
                    f"{version}, this one knows {_SCHEMA}); name another file with --journal-url"
                )
            connection.execute(
                "CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, value BLOB NOT NULL) "
                "WITHOUT ROWID"
            )
            connection.execute(f"PRAGMA user_version={_SCHEMA}")
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        return connection

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            if not isinstance(error, sqlite3.OperationalError):
                raise UsageError(
                    f"{self.path} is no journal ({error}); name another file with --journal-url"
                ) from error
            raise JournalUnavailableError(
                f"the journal {self.path} cannot be used: {error}"
            ) from error
        except OSError as error:
            raise JournalUnavailableError(
                f"the journal {self.path} cannot be used: {error.strerror}; name another file with "
                "--journal-url"
            ) from error
