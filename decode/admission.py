"""Credits on an event loop: `decode.credits` decides, here requests wait for what it decides."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from decode.credits import Ask, Credits, Need
from penstock.errors import ContextLengthError, OverloadedError
from penstock.request import Priority

_TRUST = 0.75
"""A line is joined if it is predicted to take this part of the longest wait: predictions err, and
waiting in vain is worse than a refusal at once.
"""
__all__ = ["Admission", "Credit", "Need"]

_SENTENCES = {
    "queue_full": "{queued} requests are waiting for this decode worker already",
    "predicted_wait": "the request would wait about {wait_s:.1f} s for this decode worker, more "
    "than {patience_s:.1f} s",
}


@dataclass(eq=False)
class Credit:
    """One request's memory and slot, from the grant on (`decode.credits` has its life)."""

    key: int
    need: Need
    _admission: Admission
    _on_use: Callable[[], None]
    must_rest: bool = False
    on_rest: Callable[[], None] = lambda: None
    """Called when it is to rest."""

    def use(self) -> None:
        """Work for it has begun: the grant does not expire any more. May be called again."""
        self._on_use()
        self._admission.tell(lambda credits, now_s: credits.use(self.key, now_s))

    def ready(self) -> None:
        """It could rest from now on."""
        self._on_use()
        self._admission.tell(lambda credits, now_s: credits.ready(self.key, now_s))

    def got_on(self) -> None:
        self._admission.tell(lambda credits, now_s: credits.got_on(self.key, now_s))

    def stays(self) -> None:
        """It cannot rest now."""
        self.must_rest = False
        self._admission.tell(lambda credits, now_s: credits.stays(self.key, now_s))

    async def grow(self, need: Need) -> bool:
        """Until it holds `need`; False if it is to rest instead."""
        if await self._admission.grown(self.key, need):
            self.need = need
            return True
        return False

    async def rested(self, need: Need) -> None:
        """Its memory has gone back. Until it is granted again, with `need`."""
        self.must_rest, self.need = False, need
        await self._admission.back(self.key, need)


@dataclass
class Admission:
    """Belongs to one event loop. Every count is zero again when all requests have ended."""

    capacity_bytes: int
    max_running: int
    max_queued: int
    grant_ttl_s: float | None = None
    """A credit that nobody uses for so long returns; None: never."""
    clock: Callable[[], float] = time.monotonic
    _credits: Credits = field(init=False)
    _granting: dict[int, asyncio.Future[None]] = field(default_factory=dict)
    _growing: dict[int, asyncio.Future[bool]] = field(default_factory=dict)
    _given: dict[int, Credit] = field(default_factory=dict)
    _keys: Iterator[int] = field(default_factory=itertools.count)

    def __post_init__(self) -> None:
        ttl_s = float("inf") if self.grant_ttl_s is None else self.grant_ttl_s
        self._credits = Credits(self.capacity_bytes, self.max_running, self.max_queued, ttl_s)

    @property
    def reserved_bytes(self) -> int:
        return self._credits.reserved_bytes

    @property
    def running(self) -> int:
        return self._credits.running

    @property
    def queued(self) -> int:
        return self._credits.queued

    @property
    def pages(self) -> int:
        return self._credits.pages

    @property
    def tokens(self) -> int:
        return self._credits.tokens

    @property
    def predicted_wait_s(self) -> float:
        """For whoever came now, of the worst class."""
        return self._credits.predicted_wait_s()

    @property
    def retry_after_s(self) -> float:
        """The line moves by requests ending: the longer it is, the later to come back."""
        guess = 1.0 + self.queued / self.max_running
        return min(max(guess, self.predicted_wait_s / 2), 30.0)

    @asynccontextmanager
    async def reserved(
        self,
        need: Need,
        *,
        timeout_s: float,
        priority: Priority = Priority.NORMAL,
        tenant: bytes = b"",
        most_bytes: int = 0,
    ) -> AsyncIterator[Credit]:
        """Memory and a slot while the block runs. It may grow to `most_bytes`.

        Raises ContextLengthError at once for a request that no empty worker could hold, and
        OverloadedError: at once if the line is full or predicted to take longer than `timeout_s`,
        else if that was not enough, or if the grant was not used in time.
        """
        most_bytes = max(most_bytes, need.size_bytes)
        if most_bytes > self.capacity_bytes:
            raise ContextLengthError(
                f"prompt and max_tokens need {most_bytes} bytes of cache but a decode worker "
                f"has {self.capacity_bytes}; lower max_tokens or raise decode.kv_memory_bytes",
                param="max_tokens",
            )
        key = next(self._keys)
        try:
            patience_s = _TRUST * timeout_s
            await self._wait(Ask(key, need, priority, tenant, patience_s), timeout_s)
            try:
                async with asyncio.timeout(self.grant_ttl_s) as unused:
                    credit = Credit(key, need, self, lambda: unused.reschedule(None))
                    self._given[key] = credit
                    yield credit
            except TimeoutError as error:
                if not unused.expired():
                    raise
                self._credits.expire(self.clock())
                raise OverloadedError(
                    f"no prefill worker began this prompt within {self.grant_ttl_s or 0:.0f} s: "
                    "its place went to the next request",
                    retry_after_s=self.retry_after_s,
                    reason="grant_expired",
                ) from error
        finally:
            self._granting.pop(key, None)
            self._growing.pop(key, None)
            self._given.pop(key, None)
            self._credits.give_back(key, self.clock())
            self._hear()

    def tell(self, news: Callable[[Credits, float], None]) -> None:
        news(self._credits, self.clock())
        self._hear()

    async def grown(self, key: int, need: Need) -> bool:
        growing = self._growing[key] = asyncio.get_running_loop().create_future()
        self.tell(lambda credits, now_s: credits.grow(key, need, now_s))
        has_grown: bool = await growing
        return has_grown

    async def back(self, key: int, need: Need) -> None:
        granted = self._granting[key] = asyncio.get_running_loop().create_future()
        self.tell(lambda credits, now_s: credits.rested(key, need, now_s))
        await granted

    async def _wait(self, ask: Ask, timeout_s: float) -> None:
        granted = self._granting[ask.key] = asyncio.get_running_loop().create_future()
        refusal = self._credits.ask(ask, self.clock())
        if refusal is not None:
            raise OverloadedError(
                _SENTENCES[refusal.reason].format(
                    queued=self.queued, wait_s=refusal.wait_s, patience_s=timeout_s
                ),
                retry_after_s=refusal.retry_after_s,
                reason=refusal.reason,
            )
        self._hear()
        try:
            async with asyncio.timeout(timeout_s):
                await granted
        except TimeoutError as error:
            raise OverloadedError(
                f"no cache memory became free within {timeout_s:.1f} s",
                retry_after_s=self.retry_after_s,
                reason="queue_timeout",
            ) from error

    def _hear(self) -> None:
        news = self._credits.take_news()
        for key in (*news.grown, *news.rest):
            growing = self._growing.pop(key, None)
            if growing is not None and not growing.done():
                growing.set_result(key in news.grown)
        for key in news.rest:
            if credit := self._given.get(key):
                credit.must_rest = True
                credit.on_rest()
        for key in news.granted:
            granted = self._granting.get(key)
            # One that was cancelled in this moment gives back what it got when its task runs.
            if granted is not None and not granted.done():
                granted.set_result(None)
