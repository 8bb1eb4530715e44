"""`contracts.Journal` over any backend: its calls run in one thread, so the loop never blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from kvstore.journal import files, jobs
from kvstore.journal.contracts import (
    BLOB_CHUNK_BYTES,
    Claim,
    Committed,
    File,
    ItemStatus,
    Job,
    NewGroup,
    Tokens,
)
from kvstore.journal.keys import blob_key
from kvstore.journal.redis import RedisBackend
from kvstore.journal.sqlite import SqliteBackend
from kvstore.journal.streams import StreamJournal
from kvstore.journal.sweep import sweep
from kvstore.journal.tables import Backend, Transaction
from penstock.errors import NotFoundError, UsageError

T = TypeVar("T")
RETENTION_S = 30 * 86_400.0


def open_journal(url: str, *, retention_s: float = RETENTION_S) -> RowJournal:
    """`sqlite:///PATH`, `redis://` or `rediss://`. Nothing is opened yet. Raises UsageError."""
    return RowJournal(_backend(url), retention_s=retention_s)


def check_url(url: str) -> None:
    """Raises UsageError for a URL that cannot be a journal's."""
    _backend(url).close()


def open_streams(url: str, *, ttl_s: float, most_bytes: int) -> StreamJournal:
    """The journal of streams, at a URL as `open_journal` takes; a file need not survive a power
    cut, which no stream does.
    """
    return StreamJournal(_backend(url, durable=False), ttl_s=ttl_s, most_bytes=most_bytes)


def _backend(url: str, *, durable: bool = True) -> Backend:
    if url.startswith("sqlite:///") and len(url) > len("sqlite:///"):
        # Three slashes and an absolute path make four; a relative one is taken as it is.
        path = Path(url.removeprefix("sqlite:///")).expanduser()
        return SqliteBackend(path, durable=durable)
    if url.startswith(("redis://", "rediss://")):
        return RedisBackend(url)
    raise UsageError(
        "the journal URL must look like sqlite:///PATH, redis://[user:password@]host:port[/db] or "
        "rediss://..."
    )


class RowJournal:
    """The journal over rows. Owns its backend."""

    def __init__(
        self,
        backend: Backend,
        *,
        retention_s: float = RETENTION_S,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._backend = backend
        self._retention_s = retention_s
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "journal")
        self._served_last = ""

    async def begin(self, job: Job) -> None:
        await self._run(lambda tx: jobs.begin(tx, job, self._clock()))

    async def append(self, job_id: str, groups: Sequence[NewGroup]) -> None:
        await self._run(lambda tx: jobs.append(tx, job_id, groups, self._clock()))

    async def put_blob(self, blob: str, number: int, data: bytes) -> None:
        if len(data) > BLOB_CHUNK_BYTES:
            raise ValueError(f"a chunk of {len(data)} bytes is above {BLOB_CHUNK_BYTES}")
        await self._run(lambda tx: tx.put(blob_key(blob, number), data))

    async def seal(self, job_id: str, digest: str) -> tuple[Job, bool]:
        job, created = await self._run(lambda tx: jobs.seal(tx, job_id, digest, self._clock()))
        if not created:
            await self.discard(job_id)
        return job, created

    async def discard(self, job_id: str) -> None:
        await self._run(lambda tx: jobs.discard(tx, job_id))

    async def get(self, job_id: str, tenant: str) -> Job:
        return await self._read(lambda tx: jobs.find(tx, job_id, tenant))

    async def list_jobs(self, tenant: str, *, limit: int, after: str = "") -> list[Job]:
        return await self._read(lambda tx: jobs.listed(tx, tenant, limit, after))

    async def claim(self, owner: str, *, models: Sequence[str], lease_s: float) -> Claim | None:
        after = self._served_last
        found = await self._run(
            lambda tx: jobs.claim(tx, owner, models, lease_s, self._clock(), after)
        )
        if found is not None:
            self._served_last = found.job.id
        return found

    async def renew(self, claim: Claim, *, lease_s: float, tokens: int = 0) -> None:
        await self._run(lambda tx: jobs.renew(tx, claim, lease_s, tokens, self._clock()))

    async def commit(
        self, claim: Claim, item: int, status: ItemStatus, result: dict[str, Any], tokens: Tokens
    ) -> int:
        return await self._run(
            lambda tx: jobs.commit(
                tx, claim, item, status, result, tokens, self._clock(), self._retention_s
            )
        )

    async def give_back(self, claim: Claim, *, delay_s: float, counted: bool = True) -> None:
        await self._run(lambda tx: jobs.give_back(tx, claim, delay_s, counted, self._clock()))

    async def cancel(self, job_id: str, tenant: str) -> Job:
        return await self._run(
            lambda tx: jobs.cancel(tx, job_id, tenant, self._clock(), self._retention_s)
        )

    async def resume(self, job_id: str, tenant: str, *, retry_failed: bool) -> Job:
        while True:
            job, more = await self._run(
                lambda tx: jobs.resume(tx, job_id, tenant, retry_failed, self._clock())
            )
            if not more:
                return job

    async def results(
        self, job_id: str, tenant: str, *, after: int = 0, limit: int = 256
    ) -> list[Committed]:
        return await self._read(lambda tx: jobs.results(tx, job_id, tenant, after, limit))

    async def read_blob(self, blob: str, chunks: int) -> bytes:
        pieces = [await self.read_chunk(blob, number) for number in range(chunks)]
        return b"".join(pieces)

    async def read_chunk(self, blob: str, number: int) -> bytes:
        data = await self._read(lambda tx: tx.get(blob_key(blob, number)))
        if data is None:
            raise NotFoundError("a document or file of the journal has expired")
        return data

    async def add_file(self, file: File) -> None:
        await self._run(lambda tx: files.add(tx, file))

    async def file(self, file_id: str, tenant: str) -> File:
        return await self._read(lambda tx: files.find(tx, file_id, tenant, self._clock()))

    async def list_files(self, tenant: str, *, limit: int, after: str = "") -> list[File]:
        return await self._run(lambda tx: files.listed(tx, tenant, limit, after, self._clock()))

    async def delete_file(self, file_id: str, tenant: str) -> None:
        await self._run(lambda tx: files.delete(tx, file_id, tenant, self._clock()))

    async def sweep(self) -> int:
        return await self._run(lambda tx: sweep(tx, self._clock()))

    async def close(self) -> None:
        """Waits for the call under way. May be called again."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self._thread.shutdown)
        self._backend.close()

    async def _run(self, work: Callable[[Transaction], T]) -> T:
        return await self._in_thread(lambda: self._backend.transact(work))

    async def _read(self, work: Callable[[Transaction], T]) -> T:
        return await self._in_thread(lambda: self._backend.transact(work, read_only=True))

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call)
