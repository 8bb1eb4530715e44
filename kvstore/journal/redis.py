"""The journal's rows in a durable Redis (`--journal-url`): never the disposable one of the index.

    <prefix>v:<key>     value of a row
    <prefix>keys        sorted set of all keys (score 0), for ranges in byte order
    <prefix>version     counts commits: WATCHed, so that transactions are serialisable

One Redis or one shard. A commit is one MULTI; if another one was first, the work runs again.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError, WatchError
from redis.retry import Retry

from kvstore.journal.tables import Row, Transaction
from penstock.errors import JournalUnavailableError, UsageError

if TYPE_CHECKING:
    from redis.client import Pipeline

T = TypeVar("T")
_TIMEOUT_S = 5.0
_MOST_TRIES = 200
_PREFIX = b"penstock:journal:"


class RedisBackend:
    """`Backend` over one Redis that keeps an append-only file. Belongs to one thread at a time."""

    def __init__(self, url: str, *, prefix: bytes = _PREFIX, require_aof: bool = True) -> None:
        """Nothing connects yet. Raises UsageError for a URL that cannot be one.

        `require_aof`: refuse a Redis that would lose the journal when it restarts.
        """
        try:
            self._redis = Redis.from_url(
                url,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except (ValueError, TypeError) as error:
            # The URL may hold a password: it is never repeated.
            raise UsageError(
                "the journal URL must look like redis://[user:password@]host:port[/db], rediss:// "
                "or sqlite:///PATH"
            ) from error
        self._values = prefix + b"v:"
        self._keys = prefix + b"keys"
        self._version = prefix + b"version"
        self._checked = not require_aof
        self._pipeline: Pipeline | None = None

    @property
    def place(self) -> str:
        """Where Redis is, without credentials."""
        options = self._redis.connection_pool.connection_kwargs
        return str(options.get("path") or f"{options.get('host')}:{options.get('port', 6379)}")

    def read(self, key: bytes) -> bytes | None:
        value: Any = self._watching.get(self._values + key)
        return None if value is None else bytes(value)

    def read_range(self, start: bytes, end: bytes, limit: int) -> list[Row]:
        keys: Any = self._watching.zrangebylex(
            self._keys, b"[" + start, b"(" + end, start=0, num=limit
        )
        if not keys:
            return []
        values: Any = self._watching.mget([self._values + key for key in keys])
        return [(k, v) for k, v in zip(keys, values, strict=True) if v is not None]

    def transact(self, work: Callable[[Transaction], T], *, read_only: bool = False) -> T:
        with self._mapped():
            self._check_durable()
            for attempt in range(_MOST_TRIES):
                with self._redis.pipeline(transaction=True) as pipeline:
                    self._pipeline = pipeline
                    try:
                        pipeline.watch(self._version)  # type: ignore[no-untyped-call]
                        transaction = Transaction(self)
                        result = work(transaction)
                        pipeline.multi()
                        self._write(pipeline, transaction.writes)
                        pipeline.execute()
                        return result
                    except WatchError:
                        time.sleep(random.uniform(0, 0.002 * min(attempt + 1, 25)))
                    finally:
                        self._pipeline = None
        raise JournalUnavailableError(
            f"the journal in Redis at {self.place} is written by too many at once; try again"
        )

    def close(self) -> None:
        with contextlib.suppress(RedisError, OSError):
            self._redis.close()

    @property
    def _watching(self) -> Pipeline:
        assert self._pipeline is not None, "reads belong into a transaction"
        return self._pipeline

    def _write(self, pipeline: Pipeline, writes: dict[bytes, bytes | None]) -> None:
        if not writes:
            # Still executed: it tells whether what was read belonged together.
            pipeline.exists(self._version)
            return
        pipeline.incr(self._version)
        for key, value in writes.items():
            if value is None:
                pipeline.delete(self._values + key)
                pipeline.zrem(self._keys, key)
            else:
                pipeline.set(self._values + key, value)
                pipeline.zadd(self._keys, {key: 0})

    def _check_durable(self) -> None:
        if self._checked:
            return
        try:
            settings: Any = self._redis.config_get("appendonly")
        except ResponseError:
            # Managed services hide CONFIG; their operator has decided.
            settings = {}
        value = settings.get("appendonly", settings.get(b"appendonly", "yes"))
        if value in ("no", b"no"):
            raise UsageError(
                f"the Redis at {self.place} keeps no append-only file, so a restart would lose "
                "jobs; set `appendonly yes` there, or leave --journal-url out for a SQLite file"
            )
        self._checked = True

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            raise JournalUnavailableError(
                f"the journal in Redis at {self.place} did not answer ({type(error).__name__})"
            ) from error
