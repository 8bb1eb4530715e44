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
    """One request's memory and slot, from the grant on."""

    key: int
    need: Need
    _admission: Admission
    _on_use: Callable[[], None]

    def use(self) -> None:
        """Work for it has begun: the grant does not expire any more. May be called again."""
        self._on_use()
        self._admission.used(self.key)


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
    ) -> AsyncIterator[Credit]:
        """Memory and a slot while the block runs.

        Raises ContextLengthError at once for a request that no empty worker could hold, and
        OverloadedError: at once if the line is full or predicted to take longer than `timeout_s`,
        else if that was not enough, or if the grant was not used in time.
        """
        if need.size_bytes > self.capacity_bytes:
            raise ContextLengthError(
                f"prompt and max_tokens need {need.size_bytes} bytes of cache but a decode worker "
                f"has {self.capacity_bytes}; lower max_tokens or raise decode.kv_memory_bytes",
                param="max_tokens",
            )
        key = next(self._keys)
        try:
            patience_s = _TRUST * timeout_s
            await self._wait(Ask(key, need, priority, tenant, patience_s), timeout_s)
            try:
                async with asyncio.timeout(self.grant_ttl_s) as unused:
                    yield Credit(key, need, self, lambda: unused.reschedule(None))
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
            self._credits.give_back(key, self.clock())
            self._hear()

    def used(self, key: int) -> None:
        self._credits.use(key, self.clock())
        self._hear()

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
        for key in self._credits.take_news().granted:
            granted = self._granting.get(key)
            # One that was cancelled in this moment gives back what it got when its task runs.
            if granted is not None and not granted.done():
                granted.set_result(None)
