"""Jobs and results as clients see them."""

from __future__ import annotations

from typing import Any

from cluster.batch.config import BatchSection
from kvstore.journal.contracts import Committed, Job
from protos.penstock.batch.v1 import batch_pb2

_STATES = {
    "running": batch_pb2.JOB_STATE_RUNNING,
    "completed": batch_pb2.JOB_STATE_COMPLETED,
    "cancelled": batch_pb2.JOB_STATE_CANCELLED,
}


def job_message(job: Job, config: BatchSection) -> batch_pb2.Job:
    message = batch_pb2.Job(
        id=job.id,
        state=_STATES.get(job.state, batch_pb2.JOB_STATE_UNSPECIFIED),
        model=job.model,
        metadata=job.spec.get("metadata") or {},
        created_ms=_milliseconds(job.created_s),
        finished_ms=_milliseconds(job.finished_s),
        expires_ms=_milliseconds(job.expires_s),
        cursor=job.seq,
        documents=job.groups,
        questions=job.items,
        succeeded=job.succeeded,
        failed=job.failed,
        tokens_read=job.tokens_read,
        usage=batch_pb2.Usage(
            prompt_tokens=job.prompt_tokens,
            cached_tokens=job.cached_tokens,
            completion_tokens=job.completion_tokens,
        ),
        idempotency_key=job.key,
    )
    if job.eta_s is not None:
        message.eta_s = job.eta_s
    cost = config.cost(
        prompt=job.prompt_tokens, cached=job.cached_tokens, completion=job.completion_tokens
    )
    if cost is not None:
        message.cost = cost
    return message


def result_message(entry: Committed) -> batch_pb2.Result:
    result = entry.result
    # Ids travel inside the result's row: a reader needs no other row.
    document_id, _, question_id = entry.item_id.partition("\n")
    message = batch_pb2.Result(
        cursor=entry.seq,
        number=entry.number,
        document_id=document_id,
        question_id=question_id,
        usage=batch_pb2.Usage(
            prompt_tokens=entry.tokens.prompt,
            cached_tokens=entry.tokens.cached,
            completion_tokens=entry.tokens.completion,
        ),
    )
    error: dict[str, Any] | None = result.get("error")
    if error is not None:
        message.failure.CopyFrom(batch_pb2.Failure(code=error["code"], message=error["message"]))
        return message
    message.answer.CopyFrom(
        batch_pb2.Answer(
            text=result["text"],
            finish_reason=result["finish_reason"],
            reasoning=result.get("reasoning", ""),
        )
    )
    return message


def item_id(document_id: str, question_id: str) -> str:
    """What `result_message` takes apart again. Neither part holds a line break."""
    return f"{document_id}\n{question_id}"


def _milliseconds(seconds: float | None) -> int:
    return 0 if seconds is None else int(seconds * 1e3)
