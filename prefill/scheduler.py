"""Who may work now: cache memory and slots for prompts, first come, first served.

The model's own line is `ModelThread`; here a prompt waits until there is memory for it at all.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from penstock.errors import ContextLengthError, OverloadedError

_MAX_RETRY_AFTER_S = 60.0


@dataclass(eq=False)
class _Waiter:
    size_bytes: int
    granted: asyncio.Future[None]


@dataclass
class PromptScheduler:
    """Belongs to one event loop. Every count is zero again when all requests have ended."""

    capacity_bytes: int
    max_running: int
    max_queued: int
    queue_timeout_s: float
    used_bytes: int = 0
    running: int = 0
    pending_tokens: int = 0
    """Tokens that admitted and waiting prompts still have to compute, at most."""
    _waiting: deque[_Waiter] = field(default_factory=deque)
    _tokens_per_s: float = 0.0

    @property
    def queued(self) -> int:
        return len(self._waiting)

    @property
    def retry_after_s(self) -> float:
        """When a refused request should try again: half of the time that the line takes."""
        if not self._tokens_per_s:
            return 1.0
        return min(max(1.0, self.pending_tokens / self._tokens_per_s / 2), _MAX_RETRY_AFTER_S)

    def measured(self, tokens: int, seconds: float) -> None:
        """A chunk of `tokens` took so long."""
        if seconds > 0:
            rate = tokens / seconds
            self._tokens_per_s = 0.8 * self._tokens_per_s + 0.2 * rate or rate

    @asynccontextmanager
    async def admitted(self, size_bytes: int) -> AsyncIterator[None]:
        """A slot and `size_bytes` of cache memory while the block runs.

        Raises ContextLengthError for a prompt that no empty worker could hold, OverloadedError if
        the line is full or the wait was in vain.
        """
        if size_bytes > self.capacity_bytes:
            raise ContextLengthError(
                f"the prompt needs {size_bytes} bytes of cache but a prefill worker has "
                f"{self.capacity_bytes}; shorten it or raise prefill.kv_memory_bytes"
            )
        if self._waiting or not self._fits(size_bytes):
            await self._wait(size_bytes)
        else:
            self._take(size_bytes)
        try:
            yield
        finally:
            self.used_bytes -= size_bytes
            self.running -= 1
            self._admit()

    async def _wait(self, size_bytes: int) -> None:
        if len(self._waiting) >= self.max_queued:
            raise OverloadedError(
                f"{len(self._waiting)} prompts are waiting for this prefill worker already",
                retry_after_s=self.retry_after_s,
            )
        waiter = _Waiter(size_bytes, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        try:
            async with asyncio.timeout(self.queue_timeout_s):
                await waiter.granted
        except (asyncio.CancelledError, TimeoutError) as error:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            else:
                # Granted in the very moment in which the caller gave up.
                self.used_bytes -= size_bytes
                self.running -= 1
            self._admit()
            if isinstance(error, TimeoutError):
                raise OverloadedError(
                    f"the prompt waited {self.queue_timeout_s:.0f} s for cache memory in vain",
                    retry_after_s=self.retry_after_s,
                ) from error
            raise

    def _fits(self, size_bytes: int) -> bool:
        room = self.used_bytes + size_bytes <= self.capacity_bytes
        return room and self.running < self.max_running

    def _take(self, size_bytes: int) -> None:
        self.used_bytes += size_bytes
        self.running += 1

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0].size_bytes):
            waiter = self._waiting.popleft()
            self._take(waiter.size_bytes)
            waiter.granted.set_result(None)
