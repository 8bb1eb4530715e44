"""`penstock.batch.v1.Batch` over the journal. Errors cross with code, sentence and retry time."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc

from cluster.auth.contracts import Caller
from cluster.batch.config import BatchSection
from cluster.batch.intake import Intake
from cluster.batch.sources import Sources
from cluster.batch.spec import DOCUMENTS
from cluster.batch.surroundings import Surroundings
from cluster.batch.view import job_message, result_message
from kvstore.journal.contracts import Job, Journal
from penstock.errors import InvalidRequestError, OverloadedError, PenstockError
from penstock.rpc import abort_with
from protos.penstock.batch.v1 import batch_pb2, batch_pb2_grpc

_log = logging.getLogger(__name__)
_POLL_S = 0.25
# A watcher hears at least this often, so that a dead connection is noticed.
_HEARTBEAT_S = 10.0
_PAGE = 256
# What a refused submission still sends is read and dropped for so long.
_DRAIN_S = 2.0
_MOST_LISTED = 100


def _mapped(method: Callable[..., Any]) -> Callable[..., Any]:
    """A unary answer, errors mapped."""

    @functools.wraps(method)
    async def call(self: BatchService, request: Any, context: Any) -> Any:
        try:
            return await method(self, request, context)
        except PenstockError as error:
            await abort_with(context, error)
        except grpc.aio.BaseError:
            raise
        except Exception:
            _log.exception("a batch call failed in an unexpected way")
            await abort_with(context, _bug())

    return call


def _mapped_stream(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    async def call(self: BatchService, request: Any, context: Any) -> AsyncIterator[Any]:
        try:
            async for message in method(self, request, context):
                yield message
        except PenstockError as error:
            await abort_with(context, error)
        except (grpc.aio.BaseError, GeneratorExit):
            raise
        except Exception:
            _log.exception("a batch stream failed in an unexpected way")
            await abort_with(context, _bug())

    return call


def _readable(job: Job) -> None:
    """Raises InvalidRequestError for a job whose results have another form."""
    if job.kind != DOCUMENTS:
        raise InvalidRequestError(
            f"{job.id} came through /v1/batches; read its output file from /v1/files"
        )


def _bug() -> PenstockError:
    return PenstockError("the server failed on this call; its log has the cause")


class BatchService(batch_pb2_grpc.BatchServicer):
    """Belongs to one event loop. `on_work` is called when there is something new to run,
    `on_cancel` with the id of a job that is not to run any more.
    """

    def __init__(
        self,
        journal: Journal,
        config: BatchSection,
        sources: Sources,
        around: Surroundings,
        on_work: Callable[[], None],
        on_cancel: Callable[[str], None],
    ) -> None:
        self._journal = journal
        self._config = config
        self._sources = sources
        self._around = around
        self._on_work = on_work
        self._on_cancel = on_cancel
        self._submissions = 0
        self._watchers = 0

    @_mapped
    async def Submit(self, request: Any, context: Any) -> batch_pb2.SubmitResponse:
        requests = aiter(request)
        try:
            return await self._submit(requests, context)
        except PenstockError:
            # A client whose write meets an ended call may never read why it was refused.
            with contextlib.suppress(TimeoutError, grpc.aio.BaseError):
                async with asyncio.timeout(_DRAIN_S):
                    async for _ in requests:
                        continue
            raise

    async def _submit(self, requests: Any, context: Any) -> batch_pb2.SubmitResponse:
        caller = self._caller(context)
        if self._submissions >= self._config.max_submissions:
            raise OverloadedError(
                f"{self._submissions} submissions are on their way in, which is this front's limit"
            )
        self._submissions += 1
        try:
            model = await self._around.service.model()
            intake = Intake(self._journal, self._config, self._sources, caller, model.name)
            job, created = await intake.take(requests)
        finally:
            self._submissions -= 1
        self._on_work()
        return batch_pb2.SubmitResponse(job=self._job(job), existing=not created)

    @_mapped
    async def Get(self, request: Any, context: Any) -> batch_pb2.Job:
        caller = self._caller(context)
        return self._job(await self._journal.get(request.job_id, caller.tenant))

    @_mapped
    async def List(self, request: Any, context: Any) -> batch_pb2.ListResponse:
        caller = self._caller(context)
        limit = min(request.limit or 20, _MOST_LISTED)
        jobs = await self._journal.list_jobs(caller.tenant, limit=limit, after=request.after)
        return batch_pb2.ListResponse(jobs=[self._job(job) for job in jobs])

    @_mapped
    async def Cancel(self, request: Any, context: Any) -> batch_pb2.Job:
        caller = self._caller(context)
        job = await self._journal.cancel(request.job_id, caller.tenant)
        self._on_cancel(job.id)
        return self._job(job)

    @_mapped
    async def Resume(self, request: Any, context: Any) -> batch_pb2.Job:
        caller = self._caller(context)
        job = await self._journal.resume(
            request.job_id, caller.tenant, retry_failed=request.retry_failed
        )
        self._on_work()
        return self._job(job)

    @_mapped_stream
    async def Results(self, request: Any, context: Any) -> AsyncIterator[batch_pb2.Result]:
        caller = self._caller(context)
        _readable(await self._journal.get(request.job_id, caller.tenant))
        cursor = request.cursor
        while page := await self._journal.results(
            request.job_id, caller.tenant, after=cursor, limit=_PAGE
        ):
            for entry in page:
                yield result_message(entry)
            cursor = page[-1].seq

    @_mapped_stream
    async def Watch(self, request: Any, context: Any) -> AsyncIterator[batch_pb2.WatchResponse]:
        caller = self._caller(context)
        if self._watchers >= self._config.max_watchers:
            raise OverloadedError(
                f"{self._watchers} jobs are being watched, which is this front's limit"
            )
        self._watchers += 1
        try:
            async for event in self._watch(request, caller.tenant):
                yield event
        finally:
            self._watchers -= 1

    async def _watch(self, request: Any, tenant: str) -> AsyncIterator[batch_pb2.WatchResponse]:
        cursor = request.cursor
        told: tuple[int, int] | None = None
        told_at = 0.0
        while True:
            # The job before its results: when it says that it has ended, all of them are there.
            job = await self._journal.get(request.job_id, tenant)
            if not request.without_results:
                _readable(job)
            if not request.without_results and job.seq > cursor:
                while page := await self._journal.results(
                    job.id, tenant, after=cursor, limit=_PAGE
                ):
                    for entry in page:
                        yield batch_pb2.WatchResponse(result=result_message(entry))
                    cursor = page[-1].seq
            state = (job.seq, job.tokens_read)
            if state != told or time.monotonic() - told_at > _HEARTBEAT_S:
                told, told_at = state, time.monotonic()
                yield batch_pb2.WatchResponse(job=self._job(job))
            if job.state != "running":
                return
            await asyncio.sleep(_POLL_S)

    def _job(self, job: Job) -> batch_pb2.Job:
        return job_message(job, self._config)

    def _caller(self, context: Any) -> Caller:
        """Who asks. Raises AuthenticationError, PermissionDeniedError, RateLimitError."""
        authorization = None
        for key, value in context.invocation_metadata() or ():
            if key == "authorization":
                authorization = value if isinstance(value, str) else value.decode("latin-1")
        caller = self._around.authenticator.authenticate(authorization)
        caller.require("batch")
        # Counted and let go at once: who watches a job must not take the job's own place.
        self._around.limiter.enter(caller).leave()
        return caller
