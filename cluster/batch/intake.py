"""A submission on its way in: bounded, digested, put into the journal piece by piece as a draft."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from cluster.auth.contracts import Caller
from cluster.batch.config import BatchSection
from cluster.batch.sources import Sources
from cluster.batch.spec import DOCUMENTS, DocumentSpec
from cluster.batch.view import item_id
from kvstore.journal.contracts import BLOB_CHUNK_BYTES, Job, Journal, NewGroup, NewItem
from penstock.errors import DeadlineError, InvalidRequestError, ModelNotFoundError
from protos.penstock.batch.v1 import batch_pb2

LONGEST_ID = 256
LONGEST_QUESTION_BYTES = 1 << 20
# Rows of one transaction: each waits for the disk, so they go together.
_GROUPS_PER_APPEND = 256
_ITEMS_PER_APPEND = 4096


class Intake:
    """One submission. `take` once; after an error nothing of it stays for long."""

    def __init__(
        self,
        journal: Journal,
        config: BatchSection,
        sources: Sources,
        caller: Caller,
        model: str,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`model`: the name of the served one."""
        self._journal = journal
        self._config = config
        self._sources = sources
        self._caller = caller
        self._model = model
        self._clock = clock
        self._digest = hashlib.sha256()
        self._job_id = f"job-{secrets.token_hex(12)}"
        self._job: Job | None = None
        self._waiting: list[NewGroup] = []
        self._waiting_items = 0
        self._questions = 0
        self._size_bytes = 0
        self._documents = 0
        self._open: batch_pb2.Document | None = None
        self._text = _Blob(journal, config.max_document_bytes)

    async def take(self, requests: AsyncIterator[batch_pb2.SubmitRequest]) -> tuple[Job, bool]:
        """The job, and whether it is new. Raises InvalidRequestError and ConflictError."""
        try:
            iterator = aiter(requests)
            while (request := await self._next(iterator)) is not None:
                await self._part(request)
            return await self._seal()
        except BaseException:
            if self._job is not None:
                await asyncio.shield(self._journal.discard(self._job_id))
            raise

    async def _next(self, iterator: AsyncIterator[Any]) -> batch_pb2.SubmitRequest | None:
        try:
            async with asyncio.timeout(self._config.upload_idle_s):
                return await anext(iterator, None)
        except TimeoutError as error:
            raise DeadlineError(
                f"the submission sent nothing for {self._config.upload_idle_s:.0f} s; send it again"
            ) from error

    async def _part(self, request: batch_pb2.SubmitRequest) -> None:
        match request.WhichOneof("part"):
            case "job":
                await self._begin(request.job)
            case "document":
                await self._close_document()
                await self._open_document(request.document)
            case "data":
                await self._data(request.data)
            case _:
                raise InvalidRequestError("a message of the submission is empty")

    async def _begin(self, wire: batch_pb2.JobSpec) -> None:
        if self._job is not None:
            raise InvalidRequestError("the submission names its job twice")
        if wire.model and wire.model != self._model:
            raise ModelNotFoundError(
                f"the model {wire.model[:100]!a} is not served here; this server has "
                f"'{self._model}'",
                param="job.model",
            )
        spec = DocumentSpec.of(wire, self._caller)
        self._job = Job(
            id=self._job_id,
            tenant=self._caller.tenant,
            kind=DOCUMENTS,
            model=self._model,
            spec=spec.stored(),
            created_s=self._clock(),
            key=wire.idempotency_key,
        )
        unkeyed = batch_pb2.JobSpec()
        unkeyed.CopyFrom(wire)
        unkeyed.model = self._model
        self._add(b"job", unkeyed.SerializeToString(deterministic=True))
        await self._journal.begin(self._job)

    async def _open_document(self, document: batch_pb2.Document) -> None:
        if self._job is None:
            raise InvalidRequestError("a submission begins with its job")
        if not document.questions:
            raise InvalidRequestError(
                f"document {self._documents} has no question", param="document.questions"
            )
        self._questions += len(document.questions)
        if self._questions > self._config.max_questions:
            raise InvalidRequestError(
                f"a job may have {self._config.max_questions} questions; split it",
                code="job_too_large",
            )
        if document.uri:
            document.uri = self._sources.check(document.uri)
        self._check_ids(document)
        self._grow(document.ByteSize())
        self._add(b"document", document.SerializeToString(deterministic=True))
        self._open = document
        self._text.start(f"{self._job_id}/{self._documents}")

    def _check_ids(self, document: batch_pb2.Document) -> None:
        for name in (document.id, *(q.id for q in document.questions)):
            if len(name) > LONGEST_ID or "\n" in name:
                raise InvalidRequestError(
                    f"ids have at most {LONGEST_ID} characters and no line break",
                    param="document.id",
                )
        for number, question in enumerate(document.questions):
            if not question.text.strip():
                raise InvalidRequestError(
                    f"question {number} of document {self._documents} is empty",
                    param="document.questions",
                )
            if len(question.text.encode()) > LONGEST_QUESTION_BYTES:
                raise InvalidRequestError(
                    f"a question is longer than {LONGEST_QUESTION_BYTES} bytes; put long text "
                    "into the document",
                    param="document.questions",
                )

    async def _data(self, data: bytes) -> None:
        if self._open is None:
            raise InvalidRequestError("bytes without a document in front of them")
        if self._open.uri:
            raise InvalidRequestError("a document with a uri has no bytes of its own")
        self._grow(len(data))
        self._add(b"data", data)
        await self._text.add(data)

    def _grow(self, size_bytes: int) -> None:
        self._size_bytes += size_bytes
        if self._size_bytes > self._config.max_job_bytes:
            raise InvalidRequestError(
                f"a job may have {self._config.max_job_bytes} bytes; split it",
                code="job_too_large",
            )

    def _add(self, kind: bytes, data: bytes) -> None:
        # How an upload is cut into messages must not matter: bytes have no length in front.
        head = b"" if kind == b"data" else kind + len(data).to_bytes(8, "big")
        self._digest.update(head + data)

    async def _close_document(self) -> None:
        document, self._open = self._open, None
        if document is None:
            return
        blob, chunks = await self._text.finish()
        self._digest.update(b"end")
        if not document.uri and not chunks:
            raise InvalidRequestError(
                f"document {self._documents} is empty: send its bytes, or name its uri",
                param="document",
            )
        document_id = document.id or str(self._documents)
        items = tuple(
            NewItem(item_id(document_id, question.id or str(number)), {"text": question.text})
            for number, question in enumerate(document.questions)
        )
        payload = {"uri": document.uri} if document.uri else {}
        self._waiting.append(NewGroup(payload, items, blob=blob if chunks else "", chunks=chunks))
        self._waiting_items += len(items)
        self._documents += 1
        if len(self._waiting) >= _GROUPS_PER_APPEND or self._waiting_items >= _ITEMS_PER_APPEND:
            await self._flush()

    async def _flush(self) -> None:
        groups, self._waiting, self._waiting_items = self._waiting, [], 0
        if groups:
            await self._journal.append(self._job_id, groups)

    async def _seal(self) -> tuple[Job, bool]:
        if self._job is None:
            raise InvalidRequestError("the submission is empty: send the job first")
        await self._close_document()
        await self._flush()
        return await self._journal.seal(self._job_id, self._digest.hexdigest())


class _Blob:
    """A document's bytes on their way into chunks."""

    def __init__(self, journal: Journal, max_bytes: int) -> None:
        self._journal = journal
        self._max_bytes = max_bytes
        self._name = ""
        self._buffer = bytearray()
        self._chunks = 0
        self._size_bytes = 0

    def start(self, name: str) -> None:
        self._name, self._chunks, self._size_bytes = name, 0, 0
        self._buffer.clear()

    async def add(self, data: bytes) -> None:
        self._size_bytes += len(data)
        if self._size_bytes > self._max_bytes:
            raise InvalidRequestError(
                f"a document may have {self._max_bytes} bytes; split it",
                code="document_too_large",
            )
        self._buffer += data
        while len(self._buffer) >= BLOB_CHUNK_BYTES:
            await self._put(bytes(self._buffer[:BLOB_CHUNK_BYTES]))
            del self._buffer[:BLOB_CHUNK_BYTES]

    async def finish(self) -> tuple[str, int]:
        """Name and number of chunks."""
        if self._buffer:
            await self._put(bytes(self._buffer))
            self._buffer.clear()
        return self._name, self._chunks

    async def _put(self, chunk: bytes) -> None:
        await self._journal.put_blob(self._name, self._chunks, chunk)
        self._chunks += 1
