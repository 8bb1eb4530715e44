"""A circuit breaker: a dead dependency costs its users nothing but a look at the clock. Pure."""

from __future__ import annotations

from collections.abc import Callable


class Breaker:
    """Closed: calls pass. After `threshold` failures in a row: open for `cooldown_s`. Then one
    trial call passes at a time; its success closes the breaker, its failure opens it again.
    """

    def __init__(
        self, *, clock: Callable[[], float], threshold: int = 3, cooldown_s: float = 1.0
    ) -> None:
        self._clock = clock
        self._threshold = threshold
        self._cooldown_s = cooldown_s
        self._failures = 0
        self._retry_at = 0.0

    @property
    def closed(self) -> bool:
        return self._failures < self._threshold

    def allow(self) -> bool:
        """May a call be tried now? A True while open is the one trial of this cooldown."""
        if self.closed:
            return True
        now = self._clock()
        if now < self._retry_at:
            return False
        self._retry_at = now + self._cooldown_s
        return True

    def succeeded(self) -> None:
        self._failures = 0

    def failed(self) -> None:
        self._failures += 1
        self._retry_at = self._clock() + self._cooldown_s
