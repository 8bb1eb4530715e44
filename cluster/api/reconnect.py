"""Streams that a client can go on reading after its front died.

A streamed answer whose client sent an `X-Request-Id` has an `id:` with every event: POSITION.PART,
the tokens of the answer up to there, and which event of that position it is. The client sends the
same request again, with the same `X-Request-Id` and the `Last-Event-ID` that it has, to any front,
and gets the events after that one, each once. Only the same tenant can, and only with the same
body. Everything that is not kept (`kvstore.journal.streams`) is drawn again, the same.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from dataclasses import dataclass

from kvstore.journal.streams import StreamFacts, StreamJournal, Writer
from penstock.errors import InvalidRequestError, LeaseLostError
from penstock.request import Progress, Resume, TokenChunk

Place = tuple[int, int]
_ID = re.compile(r"(\d{1,10})\.(\d{1,6})", re.ASCII)
_ATTEMPTS_A_FRONT = 1_000
"""Tries that a front may need before the next one's would look like them."""


def parse_event_id(text: str) -> Place:
    """Raises InvalidRequestError."""
    match = _ID.fullmatch(text)
    if match is None:
        raise InvalidRequestError(
            "Last-Event-ID is none of this server's; send the `id` of the last event that came",
            param="Last-Event-ID",
        )
    return int(match[1]), int(match[2])


class EventIds:
    """Gives events their ids and leaves out those that the client has."""

    def __init__(self, after: Place | None = None) -> None:
        self._after = after or (-1, 0)

    def number(self, position: int, data: bytes) -> bytes:
        """`data`: all events of a position."""
        return b"".join(
            b"id: %d.%d\n%b\n\n" % (position, part, event)
            for part, event in enumerate(data.split(b"\n\n")[:-1])
            if (position, part) > self._after
        )


@dataclass
class Kept:
    """One stream that is kept: its place in the journal and its events' ids."""

    answer_id: str
    created: int
    seed: int
    resume: Resume
    ids: EventIds
    _writer: Writer
    _noted: int

    def note(self, event: Progress | TokenChunk) -> None:
        """Raises LeaseLostError if another front goes on with this stream."""
        if self._writer.is_lost:
            raise LeaseLostError("another connection goes on with this stream")
        if isinstance(event, Progress):
            self._writer.read(event.cached_tokens)
            return
        fresh = event.token_ids[max(0, self._noted - event.index) :]
        self._noted += len(fresh)
        self._writer.add(fresh)

    def end(self) -> None:
        self._writer.end()


async def keep(
    journal: StreamJournal,
    *,
    tenant: str,
    name: str,
    body: bytes,
    last_event_id: str | None,
    answer_id: str,
    replays: bool,
) -> Kept:
    """A stream at its beginning or, with a `last_event_id`, where its client stands.

    `replays`: what was sent can be told again from the tokens alone; else all of it is drawn again.
    Raises NotFoundError, ConflictError, InvalidRequestError, JournalUnavailableError.
    """
    digest = hashlib.sha256(body).hexdigest()
    if last_event_id is None:
        facts = StreamFacts(answer_id, int(time.time()), secrets.randbits(63), digest)
        writer = await journal.open(tenant, name, facts)
        resume = Resume(attempt=(writer.fence - 1) * _ATTEMPTS_A_FRONT)
        return Kept(facts.answer_id, facts.created, facts.seed, resume, EventIds(), writer, 0)
    after = parse_event_id(last_event_id)
    held, writer = await journal.take_over(tenant, name, digest)
    # The event in which the connection broke is made again: it may have had several parts.
    sure = held.tokens[: max(0, after[0] - 1)] if replays else ()
    resume = Resume(
        attempt=(writer.fence - 1) * _ATTEMPTS_A_FRONT,
        emitted=sure,
        tell_emitted=True,
        cached_tokens=held.cached_tokens,
    )
    facts = held.facts
    ids = EventIds(after)
    return Kept(facts.answer_id, facts.created, facts.seed, resume, ids, writer, len(held.tokens))
