"""The same client for code without an event loop: one runs in a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator
from pathlib import Path
from typing import Any, Self, TypeVar

from penstock.client.aio import AsyncBatchClient
from penstock.client.types import Document, Job, JobOptions, Result

T = TypeVar("T")


class BatchClient:
    """`AsyncBatchClient`, blocking. Safe for several threads; a context, or `close` it."""

    def __init__(
        self,
        target: str = "127.0.0.1:8001",
        *,
        api_key: str | None = None,
        ca: str | Path | None = None,
        tls: bool = False,
        timeout_s: float = 30.0,
        retry_s: float = 300.0,
    ) -> None:
        """As `AsyncBatchClient`."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="penstock-client", daemon=True
        )
        self._thread.start()

        async def make() -> AsyncBatchClient:
            return AsyncBatchClient(
                target, api_key=api_key, ca=ca, tls=tls, timeout_s=timeout_s, retry_s=retry_s
            )

        self._closed = False
        try:
            self._client = self._run(make())
        except BaseException:
            self._end()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """May be called again."""
        if not self._closed:
            self._run(self._client.close())
            self._end()

    def submit(
        self,
        documents: Iterable[Document],
        options: JobOptions | None = None,
        *,
        idempotency_key: str = "",
    ) -> Job:
        """As `AsyncBatchClient.submit`."""
        return self._run(self._client.submit(documents, options, idempotency_key=idempotency_key))

    def get(self, job_id: str) -> Job:
        return self._run(self._client.get(job_id))

    def list(self, *, limit: int = 20, after: str = "") -> list[Job]:
        return self._run(self._client.list(limit=limit, after=after))

    def cancel(self, job_id: str) -> Job:
        return self._run(self._client.cancel(job_id))

    def resume(self, job_id: str, *, retry_failed: bool = False) -> Job:
        return self._run(self._client.resume(job_id, retry_failed=retry_failed))

    def watch(
        self, job_id: str, *, cursor: int = 0, results: bool = True
    ) -> Iterator[Job | Result]:
        """As `AsyncBatchClient.watch`."""
        return self._iterate(lambda: self._client.watch(job_id, cursor=cursor, results=results))

    def results(self, job_id: str, *, cursor: int = 0, wait: bool = False) -> Iterator[Result]:
        """As `AsyncBatchClient.results`."""
        return self._iterate(lambda: self._client.results(job_id, cursor=cursor, wait=wait))

    def wait(self, job_id: str) -> Job:
        return self._run(self._client.wait(job_id))

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        if self._closed:
            call.close()
            raise RuntimeError("this client has been closed")
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C ends the wait here; the call must not go on by itself.
            future.cancel()
            raise

    def _iterate(self, make: Callable[[], AsyncIterator[T]]) -> Iterator[T]:
        iterator: Any = make()
        try:
            while True:
                item = self._run(_next(iterator))
                if item is None:
                    return
                yield item
        finally:
            if not self._closed:
                self._run(_close(iterator))

    def _end(self) -> None:
        self._closed = True
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _next(iterator: AsyncIterator[T]) -> T | None:
    return await anext(iterator, None)


async def _close(iterator: Any) -> None:
    await iterator.aclose()
