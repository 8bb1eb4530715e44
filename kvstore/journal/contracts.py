"""The seam of jobs: nouns, and `Journal`, what batch services ask of it.

A job has groups (a document each), a group has items (its questions). Groups are claimed by lease,
items are committed once, results are read by a cursor that counts commits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

JobState = Literal["draft", "running", "completed", "cancelled"]
ItemStatus = Literal["succeeded", "failed"]
BLOB_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Tokens:
    """What an item cost, counted as `usage` counts it."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0


@dataclass(frozen=True)
class Job:
    """One job. Times in seconds since the epoch, by the clock of whoever wrote them."""

    id: str
    tenant: str
    kind: str
    model: str
    spec: dict[str, Any]
    """What the service that runs it needs to know; the journal does not look inside."""
    created_s: float
    key: str = ""
    """Idempotency key of the tenant; empty: none."""
    digest: str = ""
    """Of all that was submitted."""
    state: JobState = "draft"
    started_s: float | None = None
    finished_s: float | None = None
    expires_s: float | None = None
    """When the journal forgets it: drafts and finished jobs."""
    groups: int = 0
    items: int = 0
    succeeded: int = 0
    failed: int = 0
    seq: int = 0
    """Cursor of the last change: commits, and changes of state."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    tokens_read: int = 0
    """Document tokens read, or found in the cache: each group's furthest position, summed."""
    pace_s: float = 0.0
    """Seconds between two commits lately; 0: not known."""
    committed_s: float | None = None

    @property
    def answered(self) -> int:
        return self.succeeded + self.failed

    @property
    def left(self) -> int:
        return self.items - self.answered

    @property
    def eta_s(self) -> float | None:
        """Guess from the pace of late; None while nothing is known."""
        if self.state != "running" or not self.pace_s:
            return 0.0 if self.state == "completed" else None
        return self.left * self.pace_s


@dataclass(frozen=True)
class NewItem:
    id: str
    payload: dict[str, Any]


@dataclass(frozen=True)
class NewGroup:
    """`payload` says where the document is; `blob` and `chunks` if it lies in the journal."""

    payload: dict[str, Any]
    items: tuple[NewItem, ...]
    blob: str = ""
    chunks: int = 0


@dataclass(frozen=True)
class Item:
    number: int
    id: str
    payload: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A group leased to one worker. `token` fences: a later claim of the group has a higher one."""

    job: Job
    group: int
    token: int
    payload: dict[str, Any]
    blob: str
    chunks: int
    items: tuple[Item, ...]
    """Those without a result, in order."""
    claims: int
    """How often the group has been claimed, this time included, returned claims not."""


@dataclass(frozen=True)
class Committed:
    """One result, as watchers and `Results` see it. `seq` is its cursor."""

    seq: int
    number: int
    item_id: str
    group: int
    status: ItemStatus
    result: dict[str, Any]
    tokens: Tokens
    at_s: float


@dataclass(frozen=True)
class File:
    """An uploaded file; its bytes are the blob of the same id."""

    id: str
    tenant: str
    name: str
    purpose: str
    size_bytes: int
    """-1: still on its way."""
    chunks: int
    created_s: float
    expires_s: float
    facts: dict[str, Any] = field(default_factory=dict)


class Journal(Protocol):
    """Safe for many tasks of one event loop, and for many processes on one backend.

    Every method raises JournalUnavailableError if the backend cannot be used; then it may be called
    again: all of them are idempotent in that sense, with the differences that they name. Methods
    that take a tenant raise NotFoundError for what belongs to another one. What a method has
    returned is durable (the fake: while the process lives).
    """

    async def begin(self, job: Job) -> None:
        """Open a draft, invisible to `get` and `claim`. It expires unless it is sealed."""

    async def append(self, job_id: str, groups: Sequence[NewGroup]) -> None:
        """Add to a draft, all or nothing. Not to be repeated after JournalUnavailableError."""

    async def put_blob(self, blob: str, number: int, data: bytes) -> None:
        """Chunk `number` of a blob, at most BLOB_CHUNK_BYTES. Blobs of a job are called
        `<job id>/<anything>` and go with it; a file's blob is called like the file.
        """

    async def seal(self, job_id: str, digest: str) -> tuple[Job, bool]:
        """Make the draft a running job; True. If the tenant has a job of the same idempotency key
        already, the draft is dropped and that job comes back with False; raises ConflictError if it
        was another one (`digest`).
        """

    async def discard(self, job_id: str) -> None:
        """Drop a draft; anything else is left alone."""

    async def get(self, job_id: str, tenant: str) -> Job: ...

    async def list_jobs(self, tenant: str, *, limit: int, after: str = "") -> list[Job]:
        """Newest first, after the job of that id."""

    async def claim(self, owner: str, *, models: Sequence[str], lease_s: float) -> Claim | None:
        """The next group of a running job that nobody holds, jobs in turn, groups in order."""

    async def renew(self, claim: Claim, *, lease_s: float, tokens: int = 0) -> None:
        """Keep it; `tokens` of the document have been read. Raises LeaseLostError if another one
        has claimed the group since, or the job does not run any more.
        """

    async def commit(
        self, claim: Claim, item: int, status: ItemStatus, result: dict[str, Any], tokens: Tokens
    ) -> int:
        """The item's one result; its cursor. Raises LeaseLostError like `renew`, and for an item
        that has a result by another claim. Repeated by the same claim it changes nothing.
        """

    async def give_back(self, claim: Claim, *, delay_s: float, counted: bool = True) -> None:
        """Let others have the group after `delay_s`, also once the job was cancelled; nothing if
        another one has claimed it since. Not counted: as if it had not been claimed.
        """

    async def cancel(self, job_id: str, tenant: str) -> Job:
        """No further item is started or committed. What is committed stays."""

    async def resume(self, job_id: str, tenant: str, *, retry_failed: bool) -> Job:
        """A cancelled job runs on. `retry_failed`: failed items lose their result and run again."""

    async def results(
        self, job_id: str, tenant: str, *, after: int = 0, limit: int = 256
    ) -> list[Committed]:
        """In the order of commits, those with a cursor above `after`."""

    async def read_blob(self, blob: str, chunks: int) -> bytes:
        """Raises NotFoundError if a chunk is gone."""

    async def read_chunk(self, blob: str, number: int) -> bytes:
        """One chunk. Raises NotFoundError."""

    async def add_file(self, file: File) -> None:
        """First with size_bytes -1 (it is not to be seen yet, and goes at `expires_s`), then whole,
        once its blob is there.
        """

    async def file(self, file_id: str, tenant: str) -> File: ...

    async def list_files(self, tenant: str, *, limit: int, after: str = "") -> list[File]:
        """Newest first."""

    async def delete_file(self, file_id: str, tenant: str) -> None: ...

    async def sweep(self) -> int:
        """Forget what has expired, a bounded piece at a time; rows removed (0: nothing left)."""

    async def close(self) -> None: ...
