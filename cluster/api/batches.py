"""`/v1/batches`: a thin front of the batch service, for clients that speak OpenAI's dialect."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field

from cluster.api.files import as_json, limit_of, page_of, room_of, tenant_of
from cluster.api.intake import parse, read_body, state_of
from cluster.api.schema import Body
from cluster.batch.lines import LINES, LineReader, groups_of, input_blob
from cluster.batch.room import BatchRoom
from cluster.batch.spec import caller_facts
from kvstore.journal.contracts import File, Job, NewGroup
from penstock.errors import InvalidRequestError, NotFoundError

router = APIRouter()
MOST_LISTED = 100
_GROUPS_PER_APPEND = 1024


class BatchBody(Body):
    """A batch over an uploaded file."""

    input_file_id: Annotated[str, Field(max_length=256)]
    endpoint: Literal["/v1/chat/completions", "/v1/completions"]
    completion_window: Literal["24h"]
    """Kept for the dialect: a batch runs until it is done."""
    metadata: dict[str, Annotated[str, Field(max_length=512)]] | None = None


@router.post("/v1/batches")
async def create(request: Request) -> Response:
    """Run every request of a file. A wrong line is refused here, with its number."""
    room, tenant = room_of(request), tenant_of(request)
    raw = await read_body(request, state_of(request).config.max_body_bytes)
    body = parse(BatchBody, raw)
    if len(body.metadata or {}) > 16:
        raise InvalidRequestError("metadata takes at most 16 entries", param="metadata")
    file = await room.journal.file(body.input_file_id, tenant)
    if file.purpose != "batch":
        raise InvalidRequestError(
            f"{file.id} was uploaded for {file.purpose}; upload it with the purpose batch",
            param="input_file_id",
        )
    caller = request.scope.get("penstock.caller")
    model = await state_of(request).model()
    job = Job(
        id=f"batch_{secrets.token_hex(12)}",
        tenant=tenant,
        kind=LINES,
        model=model.name,
        spec={
            "endpoint": body.endpoint,
            "input_file_id": file.id,
            "completion_window": body.completion_window,
            "metadata": body.metadata or {},
            "caller": caller_facts(caller) if caller is not None else {},
        },
        created_s=time.time(),
    )
    return as_json(batch_object(await _submitted(room, job, file, state_of(request).config)))


async def _submitted(room: BatchRoom, job: Job, file: File, front: Any) -> Job:
    reader = LineReader(
        endpoint=job.spec["endpoint"],
        most_lines=room.config.max_questions,
        most_line_bytes=front.max_body_bytes,
    )
    await room.journal.begin(job)
    try:
        for number in range(file.chunks):
            chunk = await room.journal.read_chunk(file.id, number)
            await asyncio.to_thread(reader.feed, chunk)
            await room.journal.put_blob(input_blob(job.id), number, chunk)
        waiting: list[NewGroup] = []
        for group in groups_of(reader.close()):
            waiting.append(group)
            if len(waiting) >= _GROUPS_PER_APPEND:
                await room.journal.append(job.id, waiting)
                waiting = []
        if waiting:
            await room.journal.append(job.id, waiting)
        sealed, _ = await room.journal.seal(job.id, file.id)
    except BaseException:
        await room.journal.discard(job.id)
        raise
    room.poke()
    return sealed


@router.get("/v1/batches")
async def list_batches(request: Request) -> Response:
    """Batches, newest first."""
    room, tenant = room_of(request), tenant_of(request)
    limit = limit_of(request.query_params.get("limit"), most=MOST_LISTED, default=20)
    found: list[Job] = []
    after = request.query_params.get("after", "")
    while len(found) <= limit:
        page = await room.journal.list_jobs(tenant, limit=MOST_LISTED, after=after)
        # Jobs that came through gRPC are no batches.
        found += [job for job in page if job.kind == LINES]
        if len(page) < MOST_LISTED:
            break
        after = page[-1].id
    objects = [batch_object(job) for job in found[:limit]]
    return as_json(page_of(objects, more=len(found) > limit))


@router.get("/v1/batches/{batch_id}")
async def one_batch(request: Request, batch_id: str) -> Response:
    return as_json(batch_object(await _job(request, batch_id)))


@router.post("/v1/batches/{batch_id}/cancel")
async def cancel(request: Request, batch_id: str) -> Response:
    """Start no further request; answers stay."""
    await _job(request, batch_id)
    room = room_of(request)
    job = await room.journal.cancel(batch_id, tenant_of(request))
    room.cancelled(job.id)
    return as_json(batch_object(job))


async def _job(request: Request, batch_id: str) -> Job:
    job = await room_of(request).journal.get(batch_id, tenant_of(request))
    if job.kind != LINES:
        raise NotFoundError(f"there is no batch {batch_id[:80]!a}; it is a gRPC job")
    return job


_STATES = {"running": "in_progress", "completed": "completed", "cancelled": "cancelled"}


def batch_object(job: Job) -> dict[str, Any]:
    finished = int(job.finished_s) if job.finished_s is not None else None
    ended = job.state != "running"
    completed, cancelled = job.state == "completed", job.state == "cancelled"
    return {
        "id": job.id,
        "object": "batch",
        "endpoint": job.spec["endpoint"],
        "model": job.model,
        "errors": None,
        "input_file_id": job.spec["input_file_id"],
        "completion_window": job.spec["completion_window"],
        "status": _STATES[job.state],
        "output_file_id": f"file-output-{job.id}" if ended and job.succeeded else None,
        "error_file_id": f"file-errors-{job.id}" if ended and job.failed else None,
        "created_at": int(job.created_s),
        "in_progress_at": int(job.started_s) if job.started_s is not None else None,
        "expires_at": int(job.expires_s) if job.expires_s is not None else None,
        "finalizing_at": finished if completed else None,
        "completed_at": finished if completed else None,
        "failed_at": None,
        "expired_at": None,
        "cancelling_at": finished if cancelled else None,
        "cancelled_at": finished if cancelled else None,
        "request_counts": {
            "total": job.items,
            "completed": job.succeeded,
            "failed": job.failed,
        },
        "usage": {
            "input_tokens": job.prompt_tokens,
            "input_tokens_details": {"cached_tokens": job.cached_tokens},
            "output_tokens": job.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": job.prompt_tokens + job.completion_tokens,
        },
        "metadata": job.spec["metadata"] or None,
    }
