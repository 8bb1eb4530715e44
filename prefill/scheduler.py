"""Who may read now: the effects of `prefill.shares` and `prefill.places` on one event loop.

A prompt is entered (the bounds of the queue are checked, so a refusal is immediate), waits for a
place (memory and a slot), and is given tokens step by step (`prefill.steps`). It may be sent to
rest at a chunk border: then it gives its place back and waits for one again.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from penstock.errors import ContextLengthError, OverloadedError
from penstock.request import Priority
from prefill.places import Claim, Room, plan_places
from prefill.shares import AGEING_S, Flow, Grant, Line, Shares, plan_step, tokens_ahead

_MAX_RETRY_AFTER_S = 60.0


@dataclass(frozen=True)
class Wish:
    """What a prompt asks of a worker."""

    tokens: int
    size_bytes: int
    tenant: bytes = b""
    priority: Priority = Priority.NORMAL
    most_wait_s: float | None = None
    """It is refused at once if the line in front of it is predicted to take longer."""


@dataclass(eq=False)
class Ticket:
    """One prompt between its entry and its end. Made by `PromptScheduler.entered`."""

    key: int
    wish: Wish
    remaining: int
    """Tokens yet to be read, at most."""
    since_s: float
    priority: Priority
    got_on: bool = False
    resting: bool = False
    on_granted: Callable[[], None] = lambda: None
    """Called when it has been given a place."""
    on_rest: Callable[[], None] = lambda: None

    @property
    def flow(self) -> Flow:
        return self.wish.tenant, self.priority

    @property
    def line(self) -> Line:
        return Line(self.key, self.wish.tenant, self.priority, max(1, self.remaining), self.since_s)

    @property
    def claim(self) -> Claim:
        return Claim(self.line, self.wish.size_bytes, self.got_on, self.resting)

    def hurry(self, priority: Priority) -> None:
        """Somebody of this class waits for it: from now on it is of that class itself."""
        self.priority = min(self.priority, priority)


@dataclass
class PromptScheduler:
    """Belongs to one event loop. Every count is zero again when all requests have ended."""

    capacity_bytes: int
    max_running: int
    max_queued: int
    queue_timeout_s: float
    chunk_tokens: int
    """The budget of a step."""
    ageing_s: float = AGEING_S
    clock: Callable[[], float] = time.monotonic
    rests: int = 0
    """How often a prompt was sent to rest."""
    _tickets: dict[int, Ticket] = field(default_factory=dict)
    _waiting: dict[int, Ticket] = field(default_factory=dict)
    _holding: dict[int, Ticket] = field(default_factory=dict)
    _shares: Shares = field(default_factory=Shares)
    _tokens_per_s: float = 0.0
    _keys: Iterator[int] = field(default_factory=itertools.count)

    @property
    def used_bytes(self) -> int:
        return sum(ticket.wish.size_bytes for ticket in self._holding.values())

    @property
    def running(self) -> int:
        return len(self._holding)

    @property
    def queued(self) -> int:
        """Everybody who holds no place, also those who wait for another prompt's blocks."""
        return len(self._tickets) - len(self._holding)

    @property
    def pending_tokens(self) -> int:
        """Tokens that admitted and waiting prompts still have to compute, at most."""
        return sum(ticket.remaining for ticket in self._tickets.values())

    @property
    def tokens_per_s(self) -> float:
        """As measured of late; 0 before the first step."""
        return self._tokens_per_s

    def predicted_wait_s(self, wish: Wish) -> float:
        """Until the last token of such a prompt would be read, less what reading it takes."""
        if not self._tokens_per_s:
            return 0.0
        ahead = tokens_ahead(
            (ticket.line for ticket in self._tickets.values()),
            tenant=wish.tenant,
            priority=wish.priority,
            tokens=wish.tokens,
            budget=self.chunk_tokens,
        )
        return ahead / self._tokens_per_s

    @property
    def retry_after_s(self) -> float:
        """When a refused request should try again: half of the time that the line takes."""
        if not self._tokens_per_s:
            return 1.0
        return min(max(1.0, self.pending_tokens / self._tokens_per_s / 2), _MAX_RETRY_AFTER_S)

    @contextmanager
    def entered(self, wish: Wish) -> Iterator[Ticket]:
        """A place in the line while the block runs.

        Raises at once: ContextLengthError for a prompt that no empty worker could hold,
        OverloadedError (reason `queue_full` or `predicted_wait`).
        """
        if wish.size_bytes > self.capacity_bytes:
            raise ContextLengthError(
                f"the prompt needs {wish.size_bytes} bytes of cache but a prefill worker has "
                f"{self.capacity_bytes}; shorten it or raise prefill.kv_memory_bytes"
            )
        self._refuse(wish)
        ticket = Ticket(next(self._keys), wish, wish.tokens, self.clock(), wish.priority)
        self._tickets[ticket.key] = ticket
        try:
            yield ticket
        finally:
            del self._tickets[ticket.key]

    @asynccontextmanager
    async def place(self, ticket: Ticket) -> AsyncIterator[None]:
        """Memory and a slot while the block runs. Raises OverloadedError if the wait was in vain
        (reason `queue_timeout`).
        """
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def grant() -> None:
            if not granted.done():
                granted.set_result(None)

        self.claim(ticket, grant)
        try:
            try:
                async with asyncio.timeout(self.queue_timeout_s):
                    await granted
            except TimeoutError as error:
                raise OverloadedError(
                    f"the prompt waited {self.queue_timeout_s:.0f} s for cache memory in vain",
                    retry_after_s=self.retry_after_s,
                    reason="queue_timeout",
                ) from error
            yield
        finally:
            self.give_back(ticket)

    def claim(self, ticket: Ticket, on_granted: Callable[[], None]) -> None:
        """Ask for memory and a slot; `on_granted` is called when they are there, now or later.
        Whoever has claimed gives back, granted or not.
        """
        ticket.on_granted = on_granted
        ticket.got_on = ticket.resting = False
        self._waiting[ticket.key] = ticket
        self._replan()

    def give_back(self, ticket: Ticket) -> None:
        ticket.on_granted = ticket.on_rest = lambda: None
        self._waiting.pop(ticket.key, None)
        self._holding.pop(ticket.key, None)
        self._replan()

    def plan(self, ready: Sequence[Ticket]) -> tuple[Grant, ...]:
        """The next step for those that could be read on."""
        served = self._shares.view({ticket.wish.tenant for ticket in self._tickets.values()})
        return plan_step(
            [ticket.line for ticket in ready],
            served,
            budget=self.chunk_tokens,
            now_s=self.clock(),
            ageing_s=self.ageing_s,
        )

    def served(self, ticket: Ticket, tokens: int, ready: Iterable[Ticket]) -> None:
        """A step has read so many of its tokens. `ready`: who could have been read as well; who
        waits for something else than the engine gathers no claims on it.
        """
        now_s = self.clock()
        ticket.remaining -= tokens
        ticket.since_s, ticket.got_on = now_s, True
        backlogged = {each.flow for each in ready if each.remaining}
        self._shares.charge(ticket.flow, tokens, backlogged=backlogged, now_s=now_s)

    def measured(self, tokens: int, seconds: float) -> None:
        """A step of `tokens` took so long. Everybody's claims are looked at anew."""
        if seconds > 0:
            rate = tokens / seconds
            self._tokens_per_s = 0.8 * self._tokens_per_s + 0.2 * rate or rate
        self._replan()

    def _refuse(self, wish: Wish) -> None:
        if self.queued >= self.max_queued and (self._waiting or self.running >= self.max_running):
            raise OverloadedError(
                f"{self.queued} prompts are waiting for this prefill worker already",
                retry_after_s=self.retry_after_s,
                reason="queue_full",
            )
        wait_s = self.predicted_wait_s(wish)
        if wish.most_wait_s is not None and wait_s > wish.most_wait_s:
            raise OverloadedError(
                f"the prompt would wait about {wait_s:.1f} s at this prefill worker, more than "
                f"{wish.most_wait_s:.1f} s",
                retry_after_s=min(max(1.0, wait_s - wish.most_wait_s), _MAX_RETRY_AFTER_S),
                reason="predicted_wait",
            )

    def _replan(self) -> None:
        moves = plan_places(
            [ticket.claim for ticket in self._waiting.values()],
            [ticket.claim for ticket in self._holding.values()],
            Room(self.capacity_bytes, self.max_running, self.chunk_tokens),
            now_s=self.clock(),
            ageing_s=self.ageing_s,
        )
        for key in moves.enter:
            ticket = self._waiting.pop(key)
            self._holding[key] = ticket
            ticket.on_granted()
        for key in moves.rest:
            ticket = self._holding[key]
            ticket.resting = True
            self.rests += 1
            ticket.on_rest()
