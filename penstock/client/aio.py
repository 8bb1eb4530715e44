"""The async client. It connects, reconnects and goes on where it was by itself."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar

import grpc

from penstock.client.types import Document, Job, JobOptions, Result
from penstock.client.wire import Patience, error_of, open_channel
from penstock.errors import PenstockError, UnavailableError, UsageError
from protos.penstock.batch.v1 import batch_pb2, batch_pb2_grpc

T = TypeVar("T")
_CHUNK_BYTES = 1 << 20
# A watcher hears from its job every 10 s; a silence of this length is a dead connection.
_SILENCE_S = 40.0


class AsyncBatchClient:
    """Belongs to one event loop; an async context, or `close` it.

    Whatever fails for a moment (a server that restarts, no room) is tried again for `retry_s`
    without a success, then raised; what cannot get better is raised at once. All errors are
    `penstock.errors.PenstockError`.
    """

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
        """`target`: HOST:PORT of `penstock serve --grpc-port`. `ca`: certificate to trust (PEM);
        `tls` alone trusts the system's. `timeout_s`: of one call that is no stream.
        """
        host, separator, port = target.rpartition(":")
        if not (separator and host and port.isdigit()):
            raise UsageError(f"{target[:100]!a} is no address; write HOST:PORT")
        self._target = target
        self._timeout_s = timeout_s
        self._retry_s = retry_s
        self._channel = open_channel(target, ca=ca, tls=tls)
        self._stub: Any = batch_pb2_grpc.BatchStub(self._channel)
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def submit(
        self,
        documents: Iterable[Document],
        options: JobOptions | None = None,
        *,
        idempotency_key: str = "",
    ) -> Job:
        """The job, there once whatever happens on the way.

        With the same key again it is the same job, also after this process was restarted; other
        documents under that key raise ConflictError.
        """
        # A list: a try that failed reads them again.
        every = list(documents)
        # Without a key a try whose answer was lost would make a second job.
        key = idempotency_key or f"auto-{uuid.uuid4().hex}"
        spec = (options or JobOptions()).message(key)

        async def once() -> Job:
            call = self._stub.Submit(metadata=self._metadata)
            try:
                async for message in _upload(spec, every):
                    try:
                        await call.write(message)
                    except asyncio.InvalidStateError:
                        # The server has ended it already; its status says why.
                        break
                else:
                    await call.done_writing()
                return Job.of((await call).job)
            finally:
                call.cancel()

        return await self._retried(once)

    async def get(self, job_id: str) -> Job:
        return Job.of(await self._call(self._stub.Get, batch_pb2.GetRequest(job_id=job_id)))

    async def list(self, *, limit: int = 20, after: str = "") -> list[Job]:
        """Newest first; `after`: id of the last job of the page before."""
        request = batch_pb2.ListRequest(limit=limit, after=after)
        return [Job.of(job) for job in (await self._call(self._stub.List, request)).jobs]

    async def cancel(self, job_id: str) -> Job:
        """No further question is started; answers stay."""
        return Job.of(await self._call(self._stub.Cancel, batch_pb2.CancelRequest(job_id=job_id)))

    async def resume(self, job_id: str, *, retry_failed: bool = False) -> Job:
        request = batch_pb2.ResumeRequest(job_id=job_id, retry_failed=retry_failed)
        return Job.of(await self._call(self._stub.Resume, request))

    async def watch(
        self, job_id: str, *, cursor: int = 0, results: bool = True
    ) -> AsyncIterator[Job | Result]:
        """The job whenever it changes and its results as they come, until it has ended.

        Each result comes once, in the order of commits, from after `cursor` on.
        """
        patience = Patience(self._retry_s)
        while True:
            request = batch_pb2.WatchRequest(
                job_id=job_id, cursor=cursor, without_results=not results
            )
            call = self._stub.Watch(request, metadata=self._metadata)
            try:
                async for event in self._read(call):
                    patience.worked()
                    if event.WhichOneof("event") == "result":
                        cursor = event.result.cursor
                        yield Result.of(event.result)
                        continue
                    job = Job.of(event.job)
                    yield job
                    if job.done:
                        return
                raise UnavailableError(f"the batch service at {self._target} ended a watch early")
            except PenstockError as error:
                await asyncio.sleep(patience.pause_s(error))
            finally:
                call.cancel()

    async def results(
        self, job_id: str, *, cursor: int = 0, wait: bool = False
    ) -> AsyncIterator[Result]:
        """Results from after `cursor` on: those that are there, or with `wait` all of them."""
        if wait:
            async for event in self.watch(job_id, cursor=cursor):
                if isinstance(event, Result):
                    yield event
            return
        patience = Patience(self._retry_s)
        while True:
            request = batch_pb2.ResultsRequest(job_id=job_id, cursor=cursor)
            call = self._stub.Results(request, metadata=self._metadata)
            try:
                async for message in self._read(call):
                    patience.worked()
                    cursor = message.cursor
                    yield Result.of(message)
                return
            except PenstockError as error:
                await asyncio.sleep(patience.pause_s(error))
            finally:
                call.cancel()

    async def wait(self, job_id: str) -> Job:
        """The job, once it has ended."""
        last: Job | None = None
        async for event in self.watch(job_id, results=False):
            if isinstance(event, Job):
                last = event
        assert last is not None, "a watch ends with its job"
        return last

    async def _call(self, method: Any, request: Any) -> Any:
        async def once() -> Any:
            return await method(request, timeout=self._timeout_s, metadata=self._metadata)

        return await self._retried(once)

    async def _retried(self, once: Callable[[], Awaitable[T]]) -> T:
        patience = Patience(self._retry_s)
        while True:
            try:
                return await once()
            except grpc.aio.AioRpcError as error:
                await asyncio.sleep(patience.pause_s(error_of(error, self._target)))

    async def _read(self, call: Any) -> AsyncIterator[Any]:
        """Messages of a stream. Raises PenstockError, also when it goes silent."""
        try:
            while True:
                async with asyncio.timeout(_SILENCE_S):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    # The status of a stream that failed may come as its end.
                    code = await call.code()
                    if code is not grpc.StatusCode.OK:
                        raise grpc.aio.AioRpcError(
                            code,
                            grpc.aio.Metadata(),
                            await call.trailing_metadata(),
                            details=await call.details(),
                        )
                    return
                yield message
        except TimeoutError as error:
            raise UnavailableError(
                f"the batch service at {self._target} was silent for {_SILENCE_S:.0f} s"
            ) from error
        except grpc.aio.AioRpcError as error:
            raise error_of(error, self._target) from error


async def _upload(
    spec: batch_pb2.JobSpec, documents: list[Document]
) -> AsyncIterator[batch_pb2.SubmitRequest]:
    yield batch_pb2.SubmitRequest(job=spec)
    for document in documents:
        yield batch_pb2.SubmitRequest(document=document.header())
        if document.text is not None:
            raw = document.text.encode()
            for start in range(0, len(raw), _CHUNK_BYTES):
                yield batch_pb2.SubmitRequest(data=raw[start : start + _CHUNK_BYTES])
        elif document.path is not None:
            file = await asyncio.to_thread(_open, document.path)
            try:
                while piece := await asyncio.to_thread(file.read, _CHUNK_BYTES):
                    yield batch_pb2.SubmitRequest(data=piece)
            finally:
                file.close()


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise UsageError(f"cannot read the document {path}: {error.strerror}") from error
