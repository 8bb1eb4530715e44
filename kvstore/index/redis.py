"""The index in Redis (6.2 commands only): an accelerator, lost without harm.

    kv:o:<32 id bytes>   u8 version | u64le epoch | u64le size in bytes | node id; PX safety TTL
    kv:node:<node id>    u8 version | u64le epoch | address; PX 5 s
    kv:nodes             set of node ids, to find the keys above without a scan

Entries are fenced: an earlier life of a node (a smaller epoch, same node id) neither overwrites nor
deletes what a later one wrote. Each script touches one key. Between nodes the latest entry wins:
their epochs are of different clocks, and a dead node's entry must not keep a live one's out.

A lookup is one MGET. Every call has a deadline and goes through a circuit breaker; whatever goes
wrong is an `IndexUnavailableError`. One Redis or one shard: keys carry no hash tag yet, so a Redis
Cluster cannot answer a whole prompt in one command.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from kvstore.contracts import Location
from kvstore.index.breaker import Breaker
from kvstore.index.mget import mget, read_all
from penstock.errors import IndexUnavailableError, UsageError

NODE_TTL_S = 5.0
_VERSION = 1
_OBJECT = struct.Struct("<BQQ")
_NODE = struct.Struct("<BQ")
_OBJECT_KEY = b"kv:o:"
_NODE_KEY = b"kv:node:"
_NODES_KEY = b"kv:nodes"
_BATCH = 4096
_READ_BYTES = 1 << 18

# 1 when the key holds an entry of a later life of the node in ARGV[1], 0 when one of this or an
# earlier life, -1 when anything else or nothing. Halves of the epoch, because Lua's numbers are
# exact to 53 bits only; `pcall`, because a foreign value may be of another type.
_RELATION = """
local function relation(held, own)
  if type(held) ~= 'string' or #held < 17 or string.byte(held) ~= 1 then return -1 end
  if string.sub(held, 18) ~= string.sub(own, 18) then return -1 end
  local held_low, held_high = struct.unpack('<I4I4', held, 2)
  local own_low, own_high = struct.unpack('<I4I4', own, 2)
  if held_high > own_high or (held_high == own_high and held_low > own_low) then return 1 end
  return 0
end
local related = relation(redis.pcall('GET', KEYS[1]), ARGV[1])
"""
_COMMIT = (
    _RELATION
    + """
if related == 1 then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""
)
# Another node, or a later life of this one, may have announced the same object since.
_REMOVE_OWN = (
    _RELATION
    + """
if related == 0 then return redis.call('DEL', KEYS[1]) end
return 0
"""
)


class RedisIndex:
    """`Index` over one Redis. Belongs to one event loop; `close` when done."""

    def __init__(
        self,
        url: str,
        *,
        lookup_timeout_s: float = 0.05,
        write_timeout_s: float = 1.0,
        entry_ttl_s: float = 600.0,
        max_connections: int = 8,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`url`: redis:// or rediss://, with user and password if need be. Nothing connects yet.

        Raises UsageError for a URL that cannot be one.
        """
        self._lookup_timeout_s = lookup_timeout_s
        self._write_timeout_s = write_timeout_s
        self._entry_ttl_ms = int(entry_ttl_s * 1000)
        self._breaker = Breaker(clock=clock)
        try:
            self._pool = BlockingConnectionPool.from_url(
                url,
                max_connections=max_connections,
                timeout=write_timeout_s,
                socket_timeout=write_timeout_s,
                socket_connect_timeout=write_timeout_s,
                socket_read_size=_READ_BYTES,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
            )
        except (ValueError, TypeError) as error:
            # The URL may hold a password: it is never repeated.
            raise UsageError(
                "the index URL must look like redis://[user:password@]host:port[/db] or rediss://"
            ) from error
        self._redis: Redis = Redis(connection_pool=self._pool)
        self._commit = self._redis.register_script(_COMMIT)
        self._remove_own = self._redis.register_script(_REMOVE_OWN)

    @property
    def backend(self) -> str:
        return "redis"

    @property
    def place(self) -> str:
        """Where Redis is, without credentials."""
        options = self._pool.connection_kwargs
        return str(options.get("path") or f"{options.get('host')}:{options.get('port', 6379)}")

    @property
    def healthy(self) -> bool:
        return self._breaker.closed

    async def add(self, entries: Sequence[tuple[bytes, Location]]) -> None:
        for start in range(0, len(entries), _BATCH):
            async with self._guarded(self._write_timeout_s):
                pipeline = self._redis.pipeline(transaction=False)
                for id_, location in entries[start : start + _BATCH]:
                    await self._commit(
                        keys=[_OBJECT_KEY + id_],
                        args=[_pack(location), self._entry_ttl_ms],
                        client=pipeline,
                    )
                await pipeline.execute()

    async def remove(self, ids: Sequence[bytes], *, node_id: str, epoch: int) -> None:
        own = _pack(Location(node_id, epoch, 0))
        for start in range(0, len(ids), _BATCH):
            async with self._guarded(self._write_timeout_s):
                pipeline = self._redis.pipeline(transaction=False)
                for id_ in ids[start : start + _BATCH]:
                    await self._remove_own(keys=[_OBJECT_KEY + id_], args=[own], client=pipeline)
                await pipeline.execute()

    async def lookup(self, ids: Sequence[bytes]) -> list[Location | None]:
        if not ids:
            return []
        async with self._guarded(self._lookup_timeout_s):
            values = await mget(self._pool, _OBJECT_KEY, ids)
        return read_all(values, _unpack)

    async def heartbeat(self, node_id: str, address: str, epoch: int) -> bool:
        value = _NODE.pack(_VERSION, epoch) + address.encode()
        async with self._guarded(self._write_timeout_s):
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.sadd(_NODES_KEY, node_id)
            pipeline.set(_NODE_KEY + node_id.encode(), value, px=int(NODE_TTL_S * 1000), get=True)
            replies = await pipeline.execute()
        return bool(replies[1] == value)

    async def nodes(self) -> dict[str, tuple[str, int]]:
        async with self._guarded(self._write_timeout_s):
            ids = sorted(_as_bytes(id_) for id_ in await self._redis.smembers(_NODES_KEY))
            values = await self._redis.mget([_NODE_KEY + id_ for id_ in ids]) if ids else []
            live = {}
            for id_, value in zip(ids, values, strict=True):
                if isinstance(value, bytes) and len(value) >= _NODE.size:
                    _, epoch = _NODE.unpack_from(value)
                    live[id_.decode("utf-8", "replace")] = (
                        value[_NODE.size :].decode("utf-8", "replace"),
                        epoch,
                    )
                else:
                    # A node that comes back adds itself again with its next heartbeat.
                    await self._redis.srem(_NODES_KEY, id_)
        return live

    async def close(self) -> None:
        await self._redis.aclose()
        await self._pool.disconnect()

    @asynccontextmanager
    async def _guarded(self, timeout_s: float) -> AsyncIterator[None]:
        if not self._breaker.allow():
            raise IndexUnavailableError("the index is not reachable; it is tried again shortly")
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except (RedisError, OSError, TimeoutError) as error:
            self._breaker.failed()
            raise IndexUnavailableError(
                f"the index in Redis at {self.place} did not answer ({type(error).__name__})"
            ) from error
        self._breaker.succeeded()


def _pack(location: Location) -> bytes:
    packed = _OBJECT.pack(_VERSION, location.epoch, location.size_bytes)
    return packed + location.node_id.encode()


def _unpack(value: object) -> Location | None:
    """None for whatever is not ours: a wrong entry costs a wasted call, never an error."""
    if not isinstance(value, bytes) or len(value) < _OBJECT.size or value[0] != _VERSION:
        return None
    _, epoch, size_bytes = _OBJECT.unpack_from(value)
    return Location(value[_OBJECT.size :].decode("utf-8", "replace"), epoch, size_bytes)


def _as_bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()
