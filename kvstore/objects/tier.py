"""The object tier behind memory and disk: write-behind into a bucket, read-through with a deadline.

It is for what is worth more than a node: what several requests wanted survives the node, and other
nodes find it by its id. Nothing here can fail a request or delay it beyond `read_s`: a bucket that
is slow, full, broken or lying costs only that an object is computed again, and is counted. After
three failures in a row, or one that ran into its deadline, the tier rests and says that it has
nothing.

The catalogue knows what a listing of the bucket showed and what was written since. It is the same
class as the other tiers', so leases and the byte budget hold here too; another node may still
delete what this one leases, which is then a miss. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, TypeVar

from kvstore.catalog import Catalog, Entry
from kvstore.codec import digest_now
from kvstore.objects.bucket import Bucket, Stored
from penstock.blocks import ObjectKind
from penstock.errors import InvalidRequestError, OverloadedError

T = TypeVar("T")
_log = logging.getLogger(__name__)
_FAILURES_TO_REST = 3
_FIRST_REST_S = 1.0
_LONGEST_REST_S = 60.0
_MOST_COUNTED = 1 << 17
_LIST_DEADLINE_S = 120.0
_WRITE_DEADLINE_S = 30.0
_REMOVE_BATCH = 64


@dataclass
class ObjectCounters:
    """Since the start."""

    hits: int = 0
    written_bytes: int = 0
    read_bytes: int = 0
    skipped: int = 0
    """Objects that were worth keeping and were not: the queue was full or the bucket rested."""
    errors: int = 0
    """Calls of the bucket that failed or took too long."""
    quarantined: int = 0
    """Objects whose bytes were not what their id and digest promise; deleted."""


class ObjectTier:
    """Objects in a bucket. `start` and `close` once each; the rest between them."""

    def __init__(
        self,
        bucket: Bucket,
        catalog: Catalog,
        *,
        after_uses: int,
        queue_bytes: int,
        readers: int,
        read_s: float,
        list_s: float,
    ) -> None:
        """`after_uses`: requests beside the first one that must have wanted an object."""
        self.catalog = catalog
        self.counters = ObjectCounters()
        self.listed = 0
        """Listings that succeeded."""
        self._bucket = bucket
        self._after_uses = after_uses
        self._queue: deque[Stored] = deque()
        self._queued_ids: set[bytes] = set()
        self._queued_bytes = 0
        self._queue_bytes = queue_bytes
        self._slots = asyncio.Semaphore(readers)
        self._readers = readers
        self._next: OrderedDict[bytes, bytes] = OrderedDict()
        """What a request reads after an object."""
        self._ahead: OrderedDict[bytes, asyncio.Task[tuple[Entry, memoryview] | None]]
        self._ahead = OrderedDict()
        self._reads: set[asyncio.Task[tuple[Entry, memoryview] | None]] = set()
        self._read_s = read_s
        self._list_s = list_s
        self._uses: OrderedDict[bytes, tuple[int, str]] = OrderedDict()
        self._gone: list[bytes] = []
        self._known_before: set[bytes] = set()
        self._wake = asyncio.Event()
        self._failures = 0
        self._rest_s = _FIRST_REST_S
        self._rests_until = 0.0
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def is_resting(self) -> bool:
        return asyncio.get_running_loop().time() < self._rests_until

    def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._write_behind()),
            asyncio.create_task(self._list_again()),
        ]

    async def close(self) -> None:
        """What is still queued is given up: it is in memory or on disk, or will be made again."""
        tasks = [*self._tasks, *self._reads]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def figures(self) -> dict[str, Any]:
        """For `StoreStat`: fields named `object_*`."""
        usage = self.catalog.usage()
        self.settle()
        counters = {f"object_{name}": value for name, value in asdict(self.counters).items()}
        return counters | {
            "object_capacity_bytes": self.catalog.limits.capacity_bytes,
            "object_used_bytes": usage.used_bytes,
            "object_queued_bytes": self._queued_bytes,
            "object_objects": usage.objects,
            "object_evictions": usage.evictions,
            "object_resting": int(self.is_resting),
        }

    def has(self, ids: Sequence[bytes]) -> list[bool]:
        return [False] * len(ids) if self.is_resting else self.catalog.has(ids)

    def expect(self, ids: Sequence[bytes]) -> None:
        """A request is about to read these, in this order, as far as they are here: while one is
        sent the next ones come.
        """
        here = [] if self.is_resting else [id_ for id_ in ids if self.catalog.entry(id_)]
        for id_, following in pairwise(here):
            self._next[id_] = following
            self._next.move_to_end(id_)
        while len(self._next) > _MOST_COUNTED:
            self._next.popitem(last=False)

    def lease(self, owner: str, ids: Sequence[bytes], ttl_s: float) -> list[bool]:
        held = self.catalog.lease(owner, ids, ttl_s)
        self.settle()
        return [False] * len(ids) if self.is_resting else held

    def release(self, owner: str) -> int:
        released = self.catalog.release(owner)
        self.settle()
        return released

    def wanted(self, item: Stored, *, owner: str) -> None:
        """A request put or read this object; perhaps that makes it worth keeping. Never blocks."""
        if self.catalog.entry(item.id) is not None or item.id in self._queued_ids:
            return
        request = owner.partition("/")[0]
        uses, last = self._uses.pop(item.id, (-1, ""))
        uses += request != last
        if uses < self._after_uses:
            self._uses[item.id] = uses, request
            if len(self._uses) > _MOST_COUNTED:
                self._uses.popitem(last=False)
        elif self.is_resting or self._queued_bytes + len(item.data) > self._queue_bytes:
            self.counters.skipped += 1
        else:
            self._queue.append(item)
            self._queued_ids.add(item.id)
            self._queued_bytes += len(item.data)
            self._wake.set()

    async def read(self, id_: bytes) -> tuple[Entry, memoryview] | None:
        """The object, verified; None if it is not there, is damaged, or does not come in time."""
        reading = self._ahead.pop(id_, None)
        if reading is None or (reading.done() and reading.result() is None):
            # What could not be had a while ago may be there again.
            reading = self._begin(id_)
        self._read_ahead(id_)
        # A reader that goes away must not take it from another one.
        return await asyncio.shield(reading)

    def _begin(self, id_: bytes) -> asyncio.Task[tuple[Entry, memoryview] | None]:
        task = asyncio.create_task(self._read(id_))
        self._reads.add(task)
        task.add_done_callback(self._reads.discard)
        return task

    def _read_ahead(self, id_: bytes) -> None:
        """Begin the reads of those that were said to follow. The oldest of too many is given up."""
        for _ in range(self._readers - 1):
            following = self._next.get(id_)
            if following is None or self.is_resting:
                return
            id_ = following
            if id_ not in self._ahead and self.catalog.entry(id_) is not None:
                self._ahead[id_] = self._begin(id_)
        while len(self._ahead) > 2 * self._readers:
            self._ahead.popitem(last=False)

    async def _read(self, id_: bytes) -> tuple[Entry, memoryview] | None:
        known = self.catalog.open_read(id_)
        if known is None or self.is_resting:
            if known is not None:
                self.catalog.close_read(known)
            return None
        try:
            item = await self._call(self._fetch, id_, within_s=self._read_s)
        except Exception as error:
            self._failed("read", error)
            return None
        finally:
            self.catalog.close_read(known)
        self._succeeded()
        if item is None:
            # Another node deleted it, or it is not what was written; either way not to be offered.
            self._forget(id_)
            return None
        self.counters.hits += 1
        self.counters.read_bytes += len(item.data)
        entry = Entry(
            id_,
            item.kind,
            len(item.data),
            item.digest,
            retained=True,
            parent=item.parent,
            position=item.position,
            last_owner="",
        )
        return entry, item.data

    def settle(self) -> None:
        """Delete from the bucket what the catalogue let go of, soon."""
        self._gone += self.catalog.take_dropped()
        if self._gone:
            self._wake.set()

    # Inside

    def _fetch(self, id_: bytes) -> Stored | None:
        """In a thread."""
        item = self._bucket.get(id_)
        if item is not None and digest_now(item.data) == item.digest:
            return item
        if item is not None:
            self.counters.quarantined += 1
        return None

    def _forget(self, id_: bytes) -> None:
        self.catalog.discard(id_)
        self.settle()

    async def _call(self, call: Callable[..., T], *arguments: Any, within_s: float) -> T:
        """On a thread of its own that nobody waits for at the end: a bucket may hang for ever.
        Raises what it raised, or TimeoutError. At most `readers` are under way.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def finish(value: T | None, error: BaseException | None) -> None:
            self._slots.release()
            if done.cancelled():
                return
            if error is not None:
                done.set_exception(error)
            else:
                done.set_result(value)  # type: ignore[arg-type]

        def work() -> None:
            value, error = None, None
            try:
                value = call(*arguments)
            except BaseException as raised:
                error = raised
            try:
                loop.call_soon_threadsafe(finish, value, error)
            except RuntimeError:
                return  # The node has ended meanwhile.

        async with asyncio.timeout(within_s):
            await self._slots.acquire()
            threading.Thread(target=work, name="kv-objects", daemon=True).start()
            return await done

    def _failed(self, what: str, error: Exception) -> None:
        self.counters.errors += 1
        # A slow bucket has cost somebody the whole deadline: nobody else should pay it.
        self._failures += _FAILURES_TO_REST if isinstance(error, TimeoutError) else 1
        if self._failures >= _FAILURES_TO_REST:
            self._rests_until = asyncio.get_running_loop().time() + self._rest_s
            _log.warning(
                "the object tier rests for %.0f s: a %s failed (%s)",
                self._rest_s,
                what,
                str(error)[:200] or type(error).__name__,
            )
            self._rest_s = min(2 * self._rest_s, _LONGEST_REST_S)

    def _succeeded(self) -> None:
        self._failures, self._rest_s = 0, _FIRST_REST_S

    async def _write_behind(self) -> None:
        while True:
            self._wake.clear()
            if self.is_resting:
                await asyncio.sleep(0.05)
                continue
            if self._gone:
                await self._remove_some()
            elif self._queue:
                await self._write_one()
            else:
                await self._wake.wait()

    async def _remove_some(self) -> None:
        some, self._gone = self._gone[:_REMOVE_BATCH], self._gone[_REMOVE_BATCH:]
        for id_ in some:
            if self.catalog.entry(id_) is not None:
                continue
            try:
                await self._call(self._bucket.remove, id_, within_s=_WRITE_DEADLINE_S)
                self._succeeded()
            except Exception as error:
                # A later listing shows it again, and it is let go of again.
                self._failed("deletion", error)

    async def _write_one(self) -> None:
        item = self._queue.popleft()
        try:
            reservation = self.catalog.reserve(item.id, item.kind, len(item.data))
        except (OverloadedError, InvalidRequestError):
            self.counters.skipped += 1
            self._leave_queue(item)
            return
        self.settle()
        try:
            await self._call(self._bucket.put, item, within_s=_WRITE_DEADLINE_S)
        except Exception as error:
            self.counters.skipped += 1
            self._failed("write", error)
            self.catalog.abort(reservation)
            return
        finally:
            self._leave_queue(item)
        self._succeeded()
        self.catalog.commit(
            reservation,
            digest=item.digest,
            owner="",
            ttl_s=0,
            rolling=False,
            parent=item.parent,
            position=item.position,
        )
        self.counters.written_bytes += len(item.data)
        self.settle()

    def _leave_queue(self, item: Stored) -> None:
        self._queued_ids.discard(item.id)
        self._queued_bytes -= len(item.data)

    async def _list_again(self) -> None:
        while True:
            try:
                listed = await self._call(self._bucket.list, within_s=_LIST_DEADLINE_S)
            except Exception as error:
                self._failed("listing", error)
                await asyncio.sleep(min(self._rest_s, self._list_s))
                continue
            self._succeeded()
            seen = {item.id for item in listed}
            ordered = sorted(listed, key=lambda item: item.written_at)
            self.catalog.restore(
                (item.id, ObjectKind.BLOCK, item.size_bytes, b"", b"", 0)
                for item in ordered
                if item.size_bytes
            )
            # What this node wrote while the listing ran is not in it, nor deleted.
            for id_ in self._known_before - seen:
                self._forget(id_)
            self.catalog.trim()
            self.settle()
            self._known_before = set(self.catalog.ids())
            self.listed += 1
            await asyncio.sleep(self._list_s)
