"""Credits: cache memory and slots that a request holds before any prefill starts for it.

First come, first served: a large request at the head is not overtaken, so nothing starves.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from penstock.blocks import BLOCK_TOKENS
from penstock.errors import ContextLengthError, OverloadedError


@dataclass(frozen=True)
class Need:
    """What a request must hold."""

    tokens: int
    """Context that it may grow to."""
    size_bytes: int

    @property
    def pages(self) -> int:
        return -(-self.tokens // BLOCK_TOKENS)


@dataclass(eq=False)
class _Waiter:
    need: Need
    granted: asyncio.Future[None]


@dataclass
class Admission:
    """Belongs to one event loop. Every count is zero again when all requests have ended."""

    capacity_bytes: int
    max_running: int
    max_queued: int
    reserved_bytes: int = 0
    running: int = 0
    pages: int = 0
    tokens: int = 0
    _waiting: deque[_Waiter] = field(default_factory=deque)

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def retry_after_s(self) -> float:
        """The line moves by requests ending: the longer it is, the later to come back."""
        return min(1.0 + self.queued / self.max_running, 30.0)

    @asynccontextmanager
    async def reserved(self, need: Need, *, timeout_s: float) -> AsyncIterator[None]:
        """Memory and a slot while the block runs.

        Raises ContextLengthError at once for a request that no empty worker could hold,
        OverloadedError if the line is full or `timeout_s` was not enough.
        """
        if need.size_bytes > self.capacity_bytes:
            raise ContextLengthError(
                f"prompt and max_tokens need {need.size_bytes} bytes of cache but a decode worker "
                f"has {self.capacity_bytes}; lower max_tokens or raise decode.kv_memory_bytes",
                param="max_tokens",
            )
        if self._waiting or not self._fits(need):
            await self._wait(need, timeout_s)
        else:
            self._take(need)
        try:
            yield
        finally:
            self._give_back(need)

    async def _wait(self, need: Need, timeout_s: float) -> None:
        if self.queued >= self.max_queued:
            raise OverloadedError(
                f"{self.queued} requests are waiting for this decode worker already",
                retry_after_s=self.retry_after_s,
            )
        waiter = _Waiter(need, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.granted
        except (asyncio.CancelledError, TimeoutError) as error:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
                self._admit()
            elif not waiter.granted.cancelled():
                # Granted in the very moment in which the caller gave up.
                self._give_back(need)
            if isinstance(error, TimeoutError):
                raise OverloadedError(
                    f"no cache memory became free within {timeout_s:.1f} s",
                    retry_after_s=self.retry_after_s,
                ) from error
            raise

    def _fits(self, need: Need) -> bool:
        room = self.reserved_bytes + need.size_bytes <= self.capacity_bytes
        return room and self.running < self.max_running

    def _take(self, need: Need) -> None:
        self.reserved_bytes += need.size_bytes
        self.running += 1
        self.pages += need.pages
        self.tokens += need.tokens

    def _give_back(self, need: Need) -> None:
        self.reserved_bytes -= need.size_bytes
        self.running -= 1
        self.pages -= need.pages
        self.tokens -= need.tokens
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0].need):
            waiter = self._waiting.popleft()
            # A waiter that was cancelled leaves the line only when its task runs again.
            if not waiter.granted.cancelled():
                self._take(waiter.need)
                waiter.granted.set_result(None)
