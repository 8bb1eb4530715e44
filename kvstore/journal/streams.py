"""Streams that outlive their front: who writes one, and the tokens that it has sent so far.

s/<tenant>/<stream>           head: fence, identity of the request, what its usage needs
t/<tenant>/<stream>/<number>  tokens, a piece a flush: uint32 little-endian
z/<when>/<tenant>/<stream>    when it is forgotten

A stream belongs to whoever opened it last: each opening raises its fence, and tokens of an older
one are refused. Tokens may lag behind what the client has, for the next writer draws the same ones.
"""

from __future__ import annotations

import asyncio
import logging
import time
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from kvstore.journal.keys import short
from kvstore.journal.tables import Backend, Transaction
from penstock.errors import ConflictError, NotFoundError, PenstockError

T = TypeVar("T")
COALESCE_S = 0.02
RUNNING_TTL_S = 7_200.0
"""Of a stream that nobody has ended: longer than a request may take."""
_SWEPT_AT_ONCE = 8
_RETRY_S = 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StreamFacts:
    """What the next writer must know besides the request itself, which the client sends again."""

    answer_id: str
    created: int
    seed: int
    digest: str
    """Of the request's body: another one is no reconnect."""


@dataclass(frozen=True)
class Held:
    """A stream as it was when it was taken over."""

    facts: StreamFacts
    tokens: tuple[int, ...]
    cached_tokens: int | None


@dataclass(eq=False)
class Writer:
    """One front's hold on one stream. Never blocks: what is noted is written a moment later."""

    journal: StreamJournal
    key: bytes
    fence: int
    is_lost: bool = False
    """Another front has taken the stream over."""
    pending: list[int] = field(default_factory=list)
    pieces: int = 0
    is_full: bool = False
    """The budget was spent when its next tokens came: it is kept no further, without a gap."""
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, tokens: Sequence[int]) -> None:
        if not self.is_full:
            self.pending += tokens
            self.journal.wake(self)

    def read(self, cached_tokens: int) -> None:
        """So many of its prompt's tokens were restored."""
        if "cached" not in self.facts:
            self.facts["cached"] = cached_tokens
            self.journal.wake(self)

    def end(self) -> None:
        """Its client has all of it: it is kept for a while, for one that lost the end."""
        self.facts["over"] = True
        self.journal.wake(self)


_News = tuple[Writer, list[int], dict[str, Any]]


class StreamJournal:
    """Over any `Backend`, which it owns. Belongs to one event loop.

    Every flush writes all streams' news in one transaction, at most one each `COALESCE_S`.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        ttl_s: float,
        most_bytes: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`ttl_s`: how long an ended stream is kept. `most_bytes`: tokens written by this process
        in `ttl_s`; beyond it streams go on without being kept.
        """
        self._backend = backend
        self._ttl_s = ttl_s
        self._most_bytes = most_bytes
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, "stream-journal")
        self._dirty: dict[Writer, None] = {}
        self._flushing: asyncio.Task[None] | None = None
        self._written: list[tuple[float, int]] = []
        self.failures = 0

    async def open(self, tenant: str, name: str, facts: StreamFacts) -> Writer:
        """A new stream, or a new beginning of one. Raises JournalUnavailableError."""
        key = _key(tenant, name)
        fence, _ = await self._run(lambda tx: _open(tx, key, facts, self._clock()))
        return Writer(self, key, fence)

    async def take_over(self, tenant: str, name: str, digest: str) -> tuple[Held, Writer]:
        """Raises NotFoundError, ConflictError if the request is another one, and
        JournalUnavailableError.
        """
        key = _key(tenant, name)
        held, fence, pieces = await self._run(lambda tx: _take_over(tx, key, digest, self._clock()))
        return held, Writer(self, key, fence, pieces=pieces)

    def wake(self, writer: Writer) -> None:
        self._dirty[writer] = None
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush())

    async def flushed(self) -> None:
        """Until everything noted so far is written, or could not be."""
        while self._flushing is not None and not self._flushing.done():
            await asyncio.shield(self._flushing)

    async def close(self) -> None:
        if self._flushing is not None:
            # What is noted gets its chance, a backend that is away does not hold us up.
            await asyncio.wait({self._flushing}, timeout=_RETRY_S)
            self._flushing.cancel()
        self._thread.shutdown(wait=False)
        await asyncio.to_thread(self._thread.shutdown)
        self._backend.close()

    async def _flush(self) -> None:
        while self._dirty:
            await asyncio.sleep(COALESCE_S)
            writers, self._dirty = list(self._dirty), {}
            news = [self._news_of(writer) for writer in writers if not writer.is_lost]
            try:
                lost = await self._run(partial(self._write, news))
            except PenstockError as error:
                # Streams go on; what is not kept is drawn again if their front dies.
                self.failures += 1
                _log.warning("streams were not kept: %s", error.message)
                for writer, tokens, _ in news:
                    writer.pending[:0] = tokens
                self._dirty = dict.fromkeys([*self._dirty, *writers])
                await asyncio.sleep(_RETRY_S)
                continue
            for writer, tokens, _ in news:
                writer.is_lost = writer in lost
                writer.pieces += bool(tokens)

    def _news_of(self, writer: Writer) -> _News:
        tokens, writer.pending = writer.pending, []
        if not self._has_room(len(tokens)):
            tokens, writer.is_full = [], True
        return writer, tokens, dict(writer.facts)

    def _has_room(self, tokens: int) -> bool:
        now, size = self._clock(), 4 * tokens
        self._written = [(at, n) for at, n in self._written if at > now - self._ttl_s]
        if sum(n for _, n in self._written) + size > self._most_bytes:
            return False
        if size:
            self._written.append((now, size))
        return True

    def _write(self, news: Sequence[_News], tx: Transaction) -> list[Writer]:
        """Those that have lost their stream. May run twice, so it changes no writer."""
        lost = []
        for writer, tokens, facts in news:
            head = tx.load(b"s/" + writer.key)
            if head is None or head["fence"] != writer.fence:
                lost.append(writer)
                continue
            if tokens:
                tx.put(b"t/%b/%08d" % (writer.key, writer.pieces), array("I", tokens).tobytes())
            if any(head.get(name) != value for name, value in facts.items()):
                head |= facts
                if head.get("over"):
                    _expire_at(tx, writer.key, head, self._clock() + self._ttl_s)
                tx.save(b"s/" + writer.key, head)
        return lost

    async def _run(self, work: Callable[[Transaction], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, self._backend.transact, work
        )


def _key(tenant: str, name: str) -> bytes:
    return short(tenant) + b"/" + short(name)


def _open(tx: Transaction, key: bytes, facts: StreamFacts, now_s: float) -> tuple[int, None]:
    _sweep(tx, now_s)
    before = tx.load(b"s/" + key) or {"fence": 0}
    _drop_tokens(tx, key)
    head = {"fence": before["fence"] + 1, "expires": before.get("expires"), **vars(facts)}
    _expire_at(tx, key, head, now_s + RUNNING_TTL_S)
    tx.save(b"s/" + key, head)
    return head["fence"], None


def _take_over(tx: Transaction, key: bytes, digest: str, now_s: float) -> tuple[Held, int, int]:
    head = tx.load(b"s/" + key)
    if head is None or head["expires"] <= now_s:
        raise NotFoundError(
            "there is no stream of this X-Request-Id to go on with; it may have expired: send the "
            "request without Last-Event-ID"
        )
    if head["digest"] != digest:
        raise ConflictError("X-Request-Id names a stream of another request")
    tokens = array("I")
    for _, piece in _pieces(tx, key):
        tokens.frombytes(piece)
    _drop_tokens(tx, key)
    tx.put(b"t/%b/%08d" % (key, 0), tokens.tobytes())
    head["fence"] += 1
    _expire_at(tx, key, head, now_s + RUNNING_TTL_S)
    tx.save(b"s/" + key, head)
    facts = StreamFacts(head["answer_id"], head["created"], head["seed"], head["digest"])
    return Held(facts, tuple(tokens), head.get("cached")), head["fence"], 1


def _pieces(tx: Transaction, key: bytes) -> list[tuple[bytes, bytes]]:
    return tx.rows(b"t/" + key + b"/", limit=1 << 20)


def _drop_tokens(tx: Transaction, key: bytes) -> None:
    for row, _ in _pieces(tx, key):
        tx.delete(row)


def _expire_at(tx: Transaction, key: bytes, head: dict[str, Any], when_s: float) -> None:
    if head.get("expires") is not None:
        tx.delete(_expiry(key, head["expires"]))
    head["expires"] = when_s
    tx.put(_expiry(key, when_s), b"1")


def _expiry(key: bytes, when_s: float) -> bytes:
    return b"z/%016d/" % max(0, int(when_s * 1e3)) + key


def _sweep(tx: Transaction, now_s: float) -> None:
    """Forget a few that have expired; each new stream makes room for more than itself."""
    for row, _ in tx.rows(b"z/", limit=_SWEPT_AT_ONCE):
        when, key = row.split(b"/", 2)[1:]
        if int(when) > now_s * 1e3:
            return
        _drop_tokens(tx, key)
        tx.delete(b"s/" + key)
        tx.delete(row)
