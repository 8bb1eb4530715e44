"""Jobs of `/v1/batches`: a file of requests, one a line, each answered as the HTTP API answers it.

Lines that begin with the same long text (the document) form one group: the first one has the text
read, the others follow and find it in the cache.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import orjson

from cluster.auth.contracts import Caller
from cluster.batch.documents import Held, side_by_side
from cluster.batch.spec import caller_of
from kvstore.journal.contracts import BLOB_CHUNK_BYTES, Item, Journal, NewGroup, NewItem, Tokens
from penstock.errors import (
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    UnavailableError,
)

LINES = "openai"
"""`Job.kind` of jobs that came through `/v1/batches`."""
ENDPOINTS = ("/v1/chat/completions", "/v1/completions")
_LONGEST_CUSTOM_ID = 512
_KEY_CHARS = 4096
_MOST_IN_GROUP = 64


@dataclass(frozen=True)
class Answered:
    """What the HTTP API said to one line."""

    status: int
    body: dict[str, Any]
    request_id: str
    retry_after_s: float | None


Inside = Callable[[str, bytes, Caller], Awaitable[Answered]]
"""Path, body, who asks: a request that never leaves the process."""


@dataclass(frozen=True)
class Line:
    """Where a request lies in the file, and what it begins with."""

    custom_id: str
    at: int
    size_bytes: int
    key: str


class LineReader:
    """Reads a file piece by piece into lines. Raises InvalidRequestError with the line's number."""

    def __init__(self, *, endpoint: str, most_lines: int, most_line_bytes: int) -> None:
        self._endpoint = endpoint
        self._most_lines = most_lines
        self._most_line_bytes = most_line_bytes
        self._rest = b""
        self._at = 0
        self._number = 0
        self._ids: set[str] = set()
        self.lines: list[Line] = []

    def feed(self, data: bytes) -> None:
        *whole, self._rest = (self._rest + data).split(b"\n")
        for raw in whole:
            self._line(raw)
            self._at += len(raw) + 1
        if len(self._rest) > self._most_line_bytes:
            self._wrong(f"is longer than {self._most_line_bytes} bytes")

    def close(self) -> list[Line]:
        """All lines."""
        self._line(self._rest)
        if not self.lines:
            raise InvalidRequestError("the input file holds no request", param="input_file_id")
        return self.lines

    def _line(self, raw: bytes) -> None:
        self._number += 1
        if not raw.strip():
            return
        if len(self.lines) >= self._most_lines:
            self._wrong(f"is one more than the {self._most_lines} requests that a batch may have")
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            self._wrong(f"is not valid JSON: {str(error)[:100]}")
        custom_id = row.get("custom_id") if isinstance(row, dict) else None
        if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _LONGEST_CUSTOM_ID:
            self._wrong(f"needs a custom_id of 1 to {_LONGEST_CUSTOM_ID} characters")
        if custom_id in self._ids:
            self._wrong(f"has the custom_id {custom_id[:80]!a} of an earlier line")
        if row.get("method") != "POST":
            self._wrong('must have the method "POST"')
        if row.get("url") != self._endpoint:
            self._wrong(f"must have the url {self._endpoint}, the batch's endpoint")
        body = row.get("body")
        if not isinstance(body, dict):
            self._wrong("must have a body, an object")
        if body.get("stream"):
            self._wrong("asks for a stream; a batch answers whole")
        self._ids.add(custom_id)
        self.lines.append(Line(custom_id, self._at, len(raw), _key(body)))

    def _wrong(self, what: str) -> NoReturn:
        raise InvalidRequestError(
            f"line {self._number} of the input file {what}", param="input_file_id"
        )


def _key(body: dict[str, Any]) -> str:
    """The same for bodies whose texts begin alike for long; empty for short ones."""
    text = ""
    for part in _texts(body):
        text += part
        if len(text) >= _KEY_CHARS:
            digest = hashlib.sha256(text[:_KEY_CHARS].encode(errors="replace"))
            return digest.hexdigest()
    return ""


def _texts(body: dict[str, Any]) -> Iterator[str]:
    prompt, messages = body.get("prompt"), body.get("messages")
    if isinstance(prompt, str):
        yield prompt
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str):
            yield content
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield part["text"]


def groups_of(lines: list[Line]) -> Iterator[NewGroup]:
    """Lines of one key together, in the order in which their keys first appear. A group is what one
    front works on, so it is bounded.
    """
    by_key: dict[str, list[Line]] = {}
    for number, line in enumerate(lines):
        by_key.setdefault(line.key or f"alone {number}", []).append(line)
    for together in by_key.values():
        for start in range(0, len(together), _MOST_IN_GROUP):
            yield NewGroup(
                {},
                tuple(
                    NewItem(line.custom_id, {"at": line.at, "size": line.size_bytes})
                    for line in together[start : start + _MOST_IN_GROUP]
                ),
            )


def input_blob(job_id: str) -> str:
    """The job's own copy of its input: the file may be deleted while the job runs."""
    return f"{job_id}/input"


@dataclass
class LineWork:
    """Runs claims of such jobs. `places` bounds the requests in work over all of them."""

    journal: Journal
    inside: Inside
    places: asyncio.Semaphore

    async def run(self, held: Held) -> None:
        """Every item has a result afterwards. Raises what may be tried again."""
        first, *others = held.claim.items
        await self._one(held, first)
        await side_by_side([self._one(held, item) for item in others])

    async def _one(self, held: Held, item: Item) -> None:
        job = held.claim.job
        async with self.places:
            body = orjson.dumps((await self._read(job.id, item))["body"])
            caller = caller_of(job.tenant, job.spec["caller"])
            answered = await self.inside(job.spec["endpoint"], body, caller)
        if answered.status == 429:
            raise OverloadedError(_message(answered), retry_after_s=answered.retry_after_s)
        if answered.status >= 500:
            raise UnavailableError(_message(answered), retry_after_s=answered.retry_after_s)
        response = {
            "status_code": answered.status,
            "request_id": answered.request_id,
            "body": answered.body,
        }
        good = answered.status == 200
        await held.commit(
            item,
            "succeeded" if good else "failed",
            {"response": response},
            _tokens(answered.body.get("usage")),
        )

    async def _read(self, job_id: str, item: Item) -> dict[str, Any]:
        at, size = item.payload["at"], item.payload["size"]
        first = at // BLOB_CHUNK_BYTES
        pieces = [
            await self.journal.read_chunk(input_blob(job_id), number)
            for number in range(first, (at + size - 1) // BLOB_CHUNK_BYTES + 1)
        ]
        start = at - first * BLOB_CHUNK_BYTES
        try:
            row: dict[str, Any] = orjson.loads(b"".join(pieces)[start : start + size])
        except orjson.JSONDecodeError as error:
            raise NotFoundError("the input of this batch is damaged; create it again") from error
        return row


def _message(answered: Answered) -> str:
    error = answered.body.get("error")
    told = error.get("message") if isinstance(error, dict) else None
    return str(told or f"the API answered {answered.status}")


def _tokens(usage: Any) -> Tokens:
    if not isinstance(usage, dict):
        return Tokens()
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens", 0) if isinstance(details, dict) else 0
    return Tokens(usage.get("prompt_tokens", 0), cached, usage.get("completion_tokens", 0))


def output_line(job_id: str, number: int, custom_id: str, result: dict[str, Any]) -> bytes:
    """One line of an output or error file."""
    error = result.get("error")
    row = {
        "id": f"{job_id}-{number}",
        "custom_id": custom_id,
        "response": result.get("response"),
        "error": error,
    }
    return orjson.dumps(row) + b"\n"
