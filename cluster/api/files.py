"""`/v1/files`: uploads for batches, and the output of batches, over the journal."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import replace
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response
from fastapi.responses import StreamingResponse
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from cluster.api.errors import HttpError
from cluster.batch.lines import LINES, output_line
from cluster.batch.room import BatchRoom
from kvstore.journal.contracts import BLOB_CHUNK_BYTES, File, ItemStatus, Job
from penstock.errors import InvalidRequestError, NotFoundError

router = APIRouter()
PURPOSES = ("batch", "assistants", "fine-tune", "vision", "user_data", "evals")
_UPLOAD_S = 3600.0
SHORTEST_EXPIRY_S = 3600
_MOST_FIELDS = 8
MOST_LISTED = 10_000
_LONGEST_NAME = 512
_PAGE = 256
OUTPUTS: dict[str, ItemStatus] = {"output": "succeeded", "errors": "failed"}
"""Files that a batch has without storing them: its results of one status."""


def room_of(request: Request) -> BatchRoom:
    room: BatchRoom | None = request.app.state.batch
    if room is None:
        raise NotFoundError("this server keeps no files and runs no batches")
    return room


def tenant_of(request: Request) -> str:
    tenant: str = request.scope["penstock.tenant"]
    return tenant


def as_json(content: Any) -> Response:
    return Response(orjson.dumps(content), media_type="application/json")


def _is_number(text: str) -> bool:
    """Python refuses to read numbers of thousands of digits."""
    return text.isascii() and text.isdigit() and len(text) < 20


def limit_of(text: str | None, *, most: int, default: int) -> int:
    if text is None:
        return default
    if not (_is_number(text) and 1 <= int(text) <= most):
        raise InvalidRequestError(f"limit must be a number from 1 to {most}", param="limit")
    return int(text)


@router.post("/v1/files")
async def upload(request: Request) -> Response:
    """Keep a file; for batches with the purpose `batch`, JSONL with one request a line."""
    room, tenant = room_of(request), tenant_of(request)
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise InvalidRequestError("send the file as multipart/form-data", param="file")
    parser = MultiPartParser(
        request.headers,
        _bounded(request, room.config.max_file_bytes),
        max_files=1,
        max_fields=_MOST_FIELDS,
    )
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, UnicodeDecodeError) as error:
        raise InvalidRequestError(
            f"the upload is no valid multipart/form-data: {str(error)[:200]}", param="file"
        ) from error
    try:
        if len(form.multi_items()) != len(form):
            raise InvalidRequestError("a field of the form is sent twice; send it once")
        upload_, purpose = form.get("file"), form.get("purpose")
        if not isinstance(upload_, UploadFile):
            raise InvalidRequestError("'file' is required", param="file")
        if purpose not in PURPOSES:
            raise InvalidRequestError(
                f"purpose must be one of {', '.join(PURPOSES)}", param="purpose"
            )
        kept_s = _kept_s(form, room.config.retention_s)
        file = await _keep(room, tenant, upload_, str(purpose), kept_s)
    finally:
        await form.close()
    return as_json(file_object(file))


async def _bounded(request: Request, most_bytes: int) -> AsyncGenerator[bytes, None]:
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > most_bytes:
            raise HttpError(
                413,
                f"the file is larger than {most_bytes} bytes, the limit of this server",
                code="request_too_large",
            )
        yield chunk


def _kept_s(form: Any, longest_s: float) -> float:
    anchor, seconds = form.get("expires_after[anchor]"), form.get("expires_after[seconds]")
    if anchor is None and seconds is None:
        return longest_s
    good = isinstance(seconds, str) and _is_number(seconds)
    if anchor != "created_at" or not good or not SHORTEST_EXPIRY_S <= int(seconds) <= longest_s:
        raise InvalidRequestError(
            "expires_after must have the anchor created_at and seconds from "
            f"{SHORTEST_EXPIRY_S} to {longest_s:.0f}",
            param="expires_after",
        )
    return float(seconds)


async def _keep(
    room: BatchRoom, tenant: str, upload_: UploadFile, purpose: str, kept_s: float
) -> File:
    now_s = time.time()
    name = (upload_.filename or "upload")[:_LONGEST_NAME]
    file_id = f"file-{secrets.token_hex(12)}"
    draft = File(file_id, tenant, name, purpose, -1, 0, now_s, now_s + _UPLOAD_S)
    await room.journal.add_file(draft)
    room.poke()
    chunks, size_bytes = 0, 0
    while data := await upload_.read(BLOB_CHUNK_BYTES):
        await room.journal.put_blob(file_id, chunks, data)
        chunks += 1
        size_bytes += len(data)
    if not size_bytes:
        await room.journal.add_file(replace(draft, expires_s=now_s))
        raise InvalidRequestError("the file is empty", param="file")
    whole = replace(draft, size_bytes=size_bytes, chunks=chunks, expires_s=now_s + kept_s)
    await room.journal.add_file(whole)
    return whole


@router.get("/v1/files")
async def list_files(request: Request) -> Response:
    """Uploaded files, newest first."""
    room, query = room_of(request), request.query_params
    limit = limit_of(query.get("limit"), most=MOST_LISTED, default=MOST_LISTED)
    purpose, order = query.get("purpose"), query.get("order", "desc")
    if order not in ("asc", "desc"):
        raise InvalidRequestError("order must be asc or desc", param="order")
    if purpose == "batch_output":
        raise InvalidRequestError(
            "outputs are not listed; their batches name them", param="purpose"
        )
    found = await room.journal.list_files(
        tenant_of(request), limit=limit + 1, after=query.get("after", "")
    )
    files = [f for f in found[:limit] if purpose is None or f.purpose == purpose]
    objects = [file_object(file) for file in (files if order == "desc" else files[::-1])]
    return as_json(page_of(objects, more=len(found) > limit))


def page_of(objects: list[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": objects,
        "first_id": objects[0]["id"] if objects else None,
        "last_id": objects[-1]["id"] if objects else None,
        "has_more": more,
    }


@router.get("/v1/files/{file_id}")
async def one_file(request: Request, file_id: str) -> Response:
    room, tenant = room_of(request), tenant_of(request)
    output = await _output(room, file_id, tenant)
    if output is None:
        return as_json(file_object(await room.journal.file(file_id, tenant)))
    job, status = output
    size_bytes = 0
    async for line in _lines(room, job, status):
        size_bytes += len(line)
    finished_s = job.finished_s or job.created_s
    expires_s = job.expires_s or finished_s
    name = f"{file_id}.jsonl"
    return as_json(
        file_object(
            File(file_id, tenant, name, "batch_output", size_bytes, 0, finished_s, expires_s)
        )
    )


@router.get("/v1/files/{file_id}/content")
async def content(request: Request, file_id: str) -> Response:
    """The bytes of a file."""
    room, tenant = room_of(request), tenant_of(request)
    output = await _output(room, file_id, tenant)
    if output is not None:
        return StreamingResponse(_lines(room, *output), media_type="application/jsonl")
    file = await room.journal.file(file_id, tenant)
    return StreamingResponse(
        _bytes(room, file),
        media_type="application/octet-stream",
        headers={"content-length": str(file.size_bytes)},
    )


@router.delete("/v1/files/{file_id}")
async def delete_file(request: Request, file_id: str) -> Response:
    """Forget a file. Batches that use it have their own copy."""
    room, tenant = room_of(request), tenant_of(request)
    if await _output(room, file_id, tenant) is not None:
        raise InvalidRequestError(
            "the output of a batch goes with its batch and cannot be deleted alone",
            param="file_id",
        )
    await room.journal.delete_file(file_id, tenant)
    return as_json({"id": file_id, "object": "file", "deleted": True})


async def _output(room: BatchRoom, file_id: str, tenant: str) -> tuple[Job, ItemStatus] | None:
    """The ended batch whose output this is; None for other files."""
    kind, _, job_id = file_id.removeprefix("file-").partition("-")
    status = OUTPUTS.get(kind)
    if status is None or not file_id.startswith("file-"):
        return None
    job = await room.journal.get(job_id, tenant)
    if job.kind != LINES or job.state == "running":
        raise NotFoundError(f"the batch {job_id[:80]!a} has not ended yet; its output comes then")
    return job, status


async def _lines(room: BatchRoom, job: Job, status: ItemStatus) -> AsyncIterator[bytes]:
    cursor = 0
    while page := await room.journal.results(job.id, job.tenant, after=cursor, limit=_PAGE):
        for entry in page:
            if entry.status == status:
                yield output_line(job.id, entry.number, entry.item_id, entry.result)
        cursor = page[-1].seq
        await asyncio.sleep(0)


async def _bytes(room: BatchRoom, file: File) -> AsyncIterator[bytes]:
    for number in range(file.chunks):
        yield await room.journal.read_chunk(file.id, number)


def file_object(file: File) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_s),
        "expires_at": int(file.expires_s),
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
    }
