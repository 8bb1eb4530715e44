"""The disk tier beside the memory tier: its own catalogue, write-behind, reads, quarantine.

Retained objects are queued for the disk when they are committed, so that eviction from memory costs
nothing and a node that is killed has its objects again when it restarts. Nothing here can fail or
delay a request: a queue that is full, a disk that is full, slow or broken, costs only that an
object is in memory alone, and is counted.

The catalogue is the same class as the memory tier's: leases protect an object on disk as they do in
memory. Belongs to one event loop; one thread writes, a few read.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from kvstore.catalog import Catalog, Entry, Reservation
from kvstore.codec import digest_now
from kvstore.disk.files import DiskFiles
from kvstore.disk.log import Place
from penstock.errors import InvalidRequestError, OverloadedError

_log = logging.getLogger(__name__)
_BATCH_BYTES = 32 << 20
_LOAD_SLICE = 2_000
_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 60.0


@dataclass
class DiskCounters:
    """Since the start; what an operator needs to see that a disk is too small, slow or ill."""

    hits: int = 0
    written_bytes: int = 0
    read_bytes: int = 0
    skipped: int = 0
    """Objects that stayed in memory alone: the queue or the disk had no room."""
    errors: int = 0
    """Writes and reads that the operating system refused."""
    quarantined: int = 0
    """Objects whose bytes did not match their digest; dropped, and misses for their readers."""


@dataclass(frozen=True)
class _Job:
    place: Place
    data: memoryview
    owner: str


class DiskTier:
    """Objects on disk. `start` and `close` once each; the rest between them."""

    def __init__(
        self,
        files: DiskFiles,
        catalog: Catalog,
        *,
        queue_bytes: int,
        readers: int,
        sync_s: float,
        added: Callable[[bytes], None],
        removed: Callable[[bytes], None],
    ) -> None:
        """`catalog`: empty, its capacity well below the files' size. `added`, `removed`: told of
        each object that appears on disk or leaves it.
        """
        self.catalog = catalog
        self.counters = DiskCounters()
        self.loaded = False
        self._files = files
        self._queue: deque[_Job] = deque()
        self._queued_bytes = 0
        self._queued_ids: set[bytes] = set()
        self._queue_bytes = queue_bytes
        self._sync_s = sync_s
        self._added = added
        self._removed = removed
        self._gone: list[bytes] = []
        self._wake = asyncio.Event()
        self._pause_s = _FIRST_PAUSE_S
        self._paused_until = 0.0
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-disk-write")
        self._readers = ThreadPoolExecutor(readers, thread_name_prefix="kv-disk-read")
        self._tasks: list[asyncio.Task[None]] = []

    def figures(self) -> dict[str, Any]:
        """For `StoreStat`: fields named `disk_*`."""
        usage = self.catalog.usage()
        self.settle()
        counters = {f"disk_{name}": value for name, value in asdict(self.counters).items()}
        return counters | {
            "disk_capacity_bytes": self.catalog.limits.capacity_bytes,
            "disk_used_bytes": usage.used_bytes,
            "disk_file_bytes": self._files.file_bytes,
            "disk_queued_bytes": self._queued_bytes,
            "disk_objects": usage.objects,
            "disk_leases": usage.leases,
            "disk_evictions": usage.evictions,
        }

    def start(self) -> None:
        """Load what the log names, in the background, and write what comes."""
        places = list(self._files.places.values())
        self._tasks = [asyncio.create_task(self._load(places)), asyncio.create_task(self._run())]

    async def close(self) -> None:
        """Write what is queued, as far as the disk takes it, and let the folder go."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._queue and not self._is_paused():
            await self._write_batch()
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writer, self._finish)
        self._writer.shutdown()
        self._readers.shutdown()

    def spill(self, place: Place, data: memoryview, *, owner: str) -> None:
        """Queue an object for the disk; never blocks. `place`: extent and offset are ignored."""
        known = self.catalog.entry(place.id) is not None or place.id in self._files.places
        if known or place.id in self._queued_ids:
            return
        if self._queued_bytes + len(data) > self._queue_bytes or self._is_paused():
            self.counters.skipped += 1
            return
        self._queue.append(_Job(place, data, owner))
        self._queued_ids.add(place.id)
        self._queued_bytes += len(data)
        self._wake.set()

    def lease(self, owner: str, ids: Sequence[bytes], ttl_s: float) -> list[bool]:
        held = self.catalog.lease(owner, ids, ttl_s)
        self.settle()
        return held

    def release(self, owner: str) -> int:
        released = self.catalog.release(owner)
        self.settle()
        return released

    async def read(self, id_: bytes) -> tuple[Entry, memoryview] | None:
        """The object, verified against its digest; None if it is not there or is damaged."""
        entry = self.catalog.open_read(id_)
        if entry is None:
            return None
        loop = asyncio.get_running_loop()
        data: bytearray | None = None
        damaged = False
        try:
            data = await loop.run_in_executor(self._readers, self._files.read, id_)
            if data is not None:
                digest = await loop.run_in_executor(self._readers, digest_now, data)
                damaged = digest != entry.digest
        except OSError as error:
            self.counters.errors += 1
            _log.warning("the disk tier could not read an object: %s", error.strerror)
        finally:
            self.catalog.close_read(entry)
        if data is None or damaged:
            # What cannot be read, or is not what was written, must not be offered again.
            self.counters.quarantined += damaged
            self.catalog.discard(id_)
            self.settle()
            return None
        self.counters.hits += 1
        self.counters.read_bytes += len(data)
        return entry, memoryview(data).toreadonly()

    def settle(self) -> None:
        """Let go of what the catalogue dropped, in the same step."""
        for id_ in self.catalog.take_dropped():
            self._gone.append(id_)
            self._removed(id_)
        if self._gone:
            self._wake.set()

    # Inside

    def _is_paused(self) -> bool:
        return asyncio.get_running_loop().time() < self._paused_until

    async def _load(self, places: Sequence[Place]) -> None:
        """In slices: a million objects take seconds, and requests must not wait for them."""
        rest = iter(places)
        while part := list(islice(rest, _LOAD_SLICE)):
            fresh = self.catalog.restore(
                (place.id, place.kind, place.size_bytes, place.digest, place.parent, place.position)
                for place in part
                if place.id in self._files.places
            )
            for id_ in fresh:
                self._added(id_)
            # What is loaded lives as long as the process. Left to the collector, a million objects
            # would be walked again and again, each time for a second in which nobody is served.
            gc.freeze()
            await asyncio.sleep(0)
        self.catalog.trim()
        self.settle()
        self.loaded = True

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        dirty_since: float | None = None
        while True:
            self._wake.clear()
            if (self._queue or self._gone) and not self._is_paused():
                await self._write_batch()
                dirty_since = loop.time() if dirty_since is None else dirty_since
            if dirty_since is not None and loop.time() - dirty_since >= self._sync_s:
                await self._on_writer(self._files.sync)
                dirty_since = None
            if (self._queue or self._gone) and not self._is_paused():
                continue
            try:
                async with asyncio.timeout(self._sync_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _write_batch(self) -> None:
        batch: list[tuple[_Job, Reservation]] = []
        size = 0
        while self._queue and size < _BATCH_BYTES:
            job = self._queue.popleft()
            try:
                reservation = self.catalog.reserve(job.place.id, job.place.kind, len(job.data))
            except (OverloadedError, InvalidRequestError):
                # Everything on disk is leased, or the object is larger than a file.
                self._leave_queue(job)
                self.counters.skipped += 1
                continue
            size += len(job.data)
            batch.append((job, reservation))
        self.settle()
        gone, self._gone = self._gone, []
        written: list[Place] = []
        await self._on_writer(self._write, gone, [job for job, _ in batch], written)
        for number, (job, reservation) in enumerate(batch):
            self._leave_queue(job)
            if number >= len(written):
                self.catalog.abort(reservation)
                self.counters.skipped += 1
                continue
            place = written[number]
            fresh = self.catalog.commit(
                reservation,
                digest=place.digest,
                owner=job.owner,
                ttl_s=0,
                rolling=False,
                parent=place.parent,
                position=place.position,
            )
            self.counters.written_bytes += place.size_bytes
            if fresh:
                self._added(place.id)
        self.settle()

    def _leave_queue(self, job: _Job) -> None:
        self._queued_ids.discard(job.place.id)
        self._queued_bytes -= len(job.data)

    async def _on_writer(self, call: Callable[..., None], *arguments: object) -> None:
        """`call` on the writing thread; a pause and a warning if the disk refuses."""
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._writer, call, *arguments)
        except Exception as error:
            # A fault of our own must not end the writer in silence either: it rests and goes on.
            self.counters.errors += 1
            self._paused_until = loop.time() + self._pause_s
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            refused = isinstance(error, OSError)
            _log.warning(
                "the disk tier in %s failed (%s); objects stay in memory until it is tried again",
                self._files.folder,
                (isinstance(error, OSError) and error.strerror) or type(error).__name__,
                exc_info=None if refused else error,
            )
        else:
            self._pause_s = _FIRST_PAUSE_S

    def _write(self, gone: Iterable[bytes], jobs: Iterable[_Job], written: list[Place]) -> None:
        """`written` grows as objects reach the disk: what it lacks after an error did not."""
        self._files.drop(gone)
        for job in jobs:
            # One by one, so that an error leaves those before it in the list.
            written.append(self._files.write(job.place, job.data))  # noqa: PERF401

    def _finish(self) -> None:
        try:
            self._files.sync()
        except OSError as error:
            _log.warning("the disk tier could not be flushed at the end: %s", error.strerror)
        self._files.close()
