"""What batch jobs need of the front they run in."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from cluster.auth.contracts import Authenticator
from cluster.auth.limiter import Admission, Limiter
from cluster.batch.spec import caller_of
from cluster.config import FrontSection
from cluster.contracts import Service
from penstock.chat import ChatEncoder
from penstock.telemetry import Telemetry

T = TypeVar("T")


class Encode(Protocol):
    """Runs work on a text in a thread (`ApiState.encode`)."""

    def __call__(self, work: Callable[[], T], size_bytes: int, /) -> Awaitable[T]: ...


@dataclass(frozen=True)
class Surroundings:
    """Everything is the front's and stays its to close."""

    service: Service
    """Metered: it charges the admission of the moment."""
    chat: Callable[[], ChatEncoder]
    """Raises UnavailableError for a model without a tokenizer."""
    encode: Encode
    limiter: Limiter
    authenticator: Authenticator
    front: FrontSection
    telemetry: Telemetry

    def admit(self, tenant: str, facts: dict[str, Any]) -> Admission:
        """Counts a job's request for its key. Raises RateLimitError."""
        return self.limiter.enter(caller_of(tenant, facts))
