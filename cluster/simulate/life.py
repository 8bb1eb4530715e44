"""What becomes of one simulated request, and what it is on its way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.simulate.trace import SimRequest


@dataclass(slots=True, eq=False)
class Life:
    """Times are seconds of the virtual clock; -1 for what has not happened."""

    request: SimRequest
    on_end: Callable[[Life], None]
    reserve_tokens: int = 0
    """Context that the request may grow to, as its client asked."""
    prefill: str = ""
    decode: str = ""
    granted_s: float = -1.0
    prefill_began_s: float = -1.0
    first_token_s: float = -1.0
    end_s: float = -1.0
    cached_tokens: int = 0
    computed_tokens: int = 0
    emitted_tokens: int = 0
    refused: str = ""
    """Why it was refused; '' if it was served."""
    forks: tuple[int, ...] = ()
    """Where its prompt leaves earlier ones without a state there."""

    @property
    def owner(self) -> str:
        """Of its leases in the store."""
        return str(self.request.number)

    @property
    def served(self) -> bool:
        return self.end_s >= 0 and not self.refused

    @property
    def ttft_s(self) -> float:
        return self.first_token_s - self.request.arrival_s

    @property
    def e2e_s(self) -> float:
        return self.end_s - self.request.arrival_s

    @property
    def token_gap_s(self) -> float:
        """Mean time between two tokens of its answer; 0 for an answer of one."""
        gaps = self.emitted_tokens - 1
        return (self.end_s - self.first_token_s) / gaps if gaps > 0 else 0.0

    def refuse(self, reason: str, now: float) -> None:
        """Ends it. Raises ValueError if it has ended already."""
        self._end(now)
        self.refused = reason
        self.on_end(self)

    def finish(self, now: float) -> None:
        """Ends it. Raises ValueError if it has ended already or a token is missing."""
        if self.emitted_tokens != self.request.output_tokens:
            raise ValueError(
                f"request {self.owner} ended with {self.emitted_tokens} of "
                f"{self.request.output_tokens} tokens"
            )
        self._end(now)
        self.on_end(self)

    def _end(self, now: float) -> None:
        if self.end_s >= 0:
            raise ValueError(f"request {self.owner} ends twice")
        self.end_s = now
