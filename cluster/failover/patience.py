"""How long a request looks for somebody to go on with, and whom it leaves alone. Pure: the clock's
value comes with every call.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from cluster.contracts import WorkerView
from penstock.errors import (
    BlockIntegrityError,
    ClusterAuthError,
    OverloadedError,
    PenstockError,
    UnavailableError,
)

MOST_FAILURES = 64
"""In a row, without a token or a chunk between them."""
SHUN_S = 2.0
"""How long nobody is sent to a worker that failed; one that was started again has another address.
"""
_FIRST_DELAY_S = 0.05
_MOST_DELAY_S = 1.0


def can_outlive(error: PenstockError) -> bool:
    """Would another worker, or the same one a little later, not fail so?"""
    if isinstance(error, ClusterAuthError):
        return False
    return isinstance(error, UnavailableError | BlockIntegrityError)


@dataclass
class Patience:
    """One request's. Progress renews it."""

    window_s: float
    """From the first failure after some progress to giving up."""
    failures: int = 0
    _since: float | None = None
    _in_a_row: int = 0

    def progressed(self) -> None:
        self._since, self._in_a_row = None, 0

    def failed(self, error: PenstockError, now: float) -> float:
        """Seconds to wait before the next try. Raises `error` if there must be none."""
        # A worker without room refuses the first try of a request, but not what already runs.
        if not can_outlive(error) and not (self.failures and isinstance(error, OverloadedError)):
            raise error
        since = self._since = now if self._since is None else self._since
        self.failures += 1
        self._in_a_row += 1
        delay = _FIRST_DELAY_S * 2.0 ** (self._in_a_row - 1)
        if self._in_a_row > MOST_FAILURES or now + delay - since > self.window_s:
            raise error
        return min(delay, _MOST_DELAY_S)


@dataclass
class Suspects:
    """Addresses that failed of late, by all of one front's requests."""

    _until: dict[str, float] = field(default_factory=dict)

    def add(self, address: str, now: float) -> None:
        self._until = {a: end for a, end in self._until.items() if end > now}
        self._until[address] = now + SHUN_S

    def among(self, workers: Iterable[WorkerView], now: float) -> frozenset[str]:
        """Their worker ids."""
        return frozenset(w.worker_id for w in workers if self._until.get(w.address, now) > now)
