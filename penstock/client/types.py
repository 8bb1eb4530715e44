"""What goes in and comes out. Frozen; everything countable is derived."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from os import PathLike
from pathlib import Path
from typing import Literal

from protos.penstock.batch.v1 import batch_pb2

JobState = Literal["running", "completed", "cancelled", "unknown"]


@dataclass(frozen=True)
class Question:
    text: str
    id: str = ""
    """Comes back with the result; empty: its number in the document."""


@dataclass(frozen=True)
class Document:
    """A text with its questions: given here, read from a file here, or found by the server."""

    questions: Sequence[Question | str]
    text: str | None = None
    path: Path | None = None
    uri: str | None = None
    id: str = ""
    """Comes back with its results; empty: its number in the job."""

    def __post_init__(self) -> None:
        if sum(part is not None for part in (self.text, self.path, self.uri)) != 1:
            raise ValueError("a document has a text, a path or a uri: one of them")

    @classmethod
    def from_text(cls, text: str, questions: Sequence[Question | str], *, id: str = "") -> Document:
        return cls(questions, text=text, id=id)

    @classmethod
    def from_file(
        cls, path: str | PathLike[str], questions: Sequence[Question | str], *, id: str = ""
    ) -> Document:
        """A file of this machine, to be uploaded; called like its path unless `id` is given."""
        return cls(questions, path=Path(path), id=id or str(path))

    @classmethod
    def from_uri(cls, uri: str, questions: Sequence[Question | str], *, id: str = "") -> Document:
        """A place that the server reads: file:///, https://, s3://, as its operator allows."""
        return cls(questions, uri=uri, id=id or uri)

    def header(self) -> batch_pb2.Document:
        """Its message; the bytes, if any, follow it."""
        asked = [q if isinstance(q, Question) else Question(q) for q in self.questions]
        return batch_pb2.Document(
            id=self.id,
            uri=self.uri or "",
            questions=[batch_pb2.Question(id=q.id, text=q.text) for q in asked],
        )


@dataclass(frozen=True)
class JobOptions:
    """How all questions of a job are asked. Empty, zero or None: the server's default."""

    model: str = ""
    template: str = ""
    """Holds {document} and {question}."""
    instructions: str = ""
    max_tokens: int = 0
    temperature: float | None = None
    """None: 0, so that a repeated job gives the same answers."""
    top_p: float | None = None
    seed: int = 0
    stop: Sequence[str] = ()
    cache_salt: str = ""
    reasoning_effort: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)

    def message(self, idempotency_key: str) -> batch_pb2.JobSpec:
        spec = batch_pb2.JobSpec(
            idempotency_key=idempotency_key,
            model=self.model,
            template=self.template,
            instructions=self.instructions,
            max_tokens=self.max_tokens,
            seed=self.seed,
            stop=list(self.stop),
            cache_salt=self.cache_salt,
            reasoning_effort=self.reasoning_effort,
            metadata=dict(self.metadata),
        )
        if self.temperature is not None:
            spec.temperature = self.temperature
        if self.top_p is not None:
            spec.top_p = self.top_p
        return spec


@dataclass(frozen=True)
class Usage:
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    @classmethod
    def of(cls, wire: batch_pb2.Usage) -> Usage:
        return cls(wire.prompt_tokens, wire.cached_tokens, wire.completion_tokens)


@dataclass(frozen=True)
class Job:
    """A job as it was when the server said so."""

    id: str
    state: JobState
    model: str
    metadata: Mapping[str, str]
    created_at: datetime
    finished_at: datetime | None
    expires_at: datetime | None
    cursor: int
    documents: int
    questions: int
    succeeded: int
    failed: int
    tokens_read: int
    """Document tokens read or found in the cache, each document once."""
    usage: Usage
    eta_s: float | None
    cost: float | None
    idempotency_key: str

    @property
    def answered(self) -> int:
        return self.succeeded + self.failed

    @property
    def done(self) -> bool:
        """It has ended: completed, or cancelled."""
        return self.state in ("completed", "cancelled")

    @property
    def cached_share(self) -> float:
        """Of all prompt tokens so far, 0 to 1."""
        prompt = self.usage.prompt_tokens
        return self.usage.cached_tokens / prompt if prompt else 0.0

    @classmethod
    def of(cls, wire: batch_pb2.Job) -> Job:
        return cls(
            id=wire.id,
            state=_STATES.get(wire.state, "unknown"),
            model=wire.model,
            metadata=dict(wire.metadata),
            created_at=_moment(wire.created_ms),
            finished_at=_moment(wire.finished_ms) if wire.finished_ms else None,
            expires_at=_moment(wire.expires_ms) if wire.expires_ms else None,
            cursor=wire.cursor,
            documents=wire.documents,
            questions=wire.questions,
            succeeded=wire.succeeded,
            failed=wire.failed,
            tokens_read=wire.tokens_read,
            usage=Usage.of(wire.usage),
            eta_s=wire.eta_s if wire.HasField("eta_s") else None,
            cost=wire.cost if wire.HasField("cost") else None,
            idempotency_key=wire.idempotency_key,
        )


_STATES: dict[int, JobState] = {
    batch_pb2.JOB_STATE_RUNNING: "running",
    batch_pb2.JOB_STATE_COMPLETED: "completed",
    batch_pb2.JOB_STATE_CANCELLED: "cancelled",
}


@dataclass(frozen=True)
class ResultError:
    code: str
    message: str


@dataclass(frozen=True)
class Result:
    """One question's one result: an answer, or why there is none."""

    cursor: int
    """Remember the highest one to go on from there."""
    number: int
    """Of the question in the job, in the order of submission."""
    document_id: str
    question_id: str
    text: str | None
    finish_reason: str
    reasoning: str
    error: ResultError | None
    usage: Usage

    @classmethod
    def of(cls, wire: batch_pb2.Result) -> Result:
        answered = wire.WhichOneof("outcome") == "answer"
        failure = wire.failure
        return cls(
            cursor=wire.cursor,
            number=wire.number,
            document_id=wire.document_id,
            question_id=wire.question_id,
            text=wire.answer.text if answered else None,
            finish_reason=wire.answer.finish_reason,
            reasoning=wire.answer.reasoning,
            error=None if answered else ResultError(failure.code, failure.message),
            usage=Usage.of(wire.usage),
        )

    def facts(self) -> dict[str, object]:
        """As one line of JSONL: keys in a fixed order, only what there is."""
        found: dict[str, object] = {
            "cursor": self.cursor,
            "number": self.number,
            "document": self.document_id,
            "question": self.question_id,
        }
        if self.error is not None:
            found["error"] = {"code": self.error.code, "message": self.error.message}
        else:
            found |= {"text": self.text, "finish_reason": self.finish_reason}
            if self.reasoning:
                found["reasoning"] = self.reasoning
        usage = self.usage
        found["usage"] = {
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.cached_tokens,
            "completion_tokens": usage.completion_tokens,
        }
        return found


def _moment(milliseconds: int) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1e3, UTC)
