"""The seam of authentication: `Authenticator` turns a header into a `Caller`.

Every public door (HTTP, the gRPC batch service) asks the same one. A gRPC servicer passes the
value of its `authorization` metadata; the errors map to gRPC status by their `grpc_code`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Protocol, get_args

from penstock.errors import PermissionDeniedError

ApiScope = Literal["generate", "batch", "read"]
"""generate: answers; batch: files and batch jobs; read: models, tokenizing."""
SCOPES: frozenset[str] = frozenset(get_args(ApiScope))


@dataclass(frozen=True)
class Limits:
    """What one key may use of one front process; None: no limit."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Tokens that cost work: prompt tokens that no cache had, and tokens of the answer."""
    tokens_per_day: int | None = None
    concurrent_requests: int | None = None
    max_prompt_tokens: int | None = None
    """Longest single prompt, cached or not."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}; leave it out for none")

    @property
    def unlimited(self) -> bool:
        return all(value is None for value in vars(self).values())


@dataclass(frozen=True)
class Caller:
    """Who asks. `tenant` separates cached blocks, files and jobs; `key_id` is no secret."""

    tenant: str
    key_id: str = ""
    name: str = ""
    scopes: frozenset[str] = SCOPES
    limits: Limits = field(default_factory=Limits)

    def require(self, scope: ApiScope) -> None:
        """Raises PermissionDeniedError unless this key may use that part of the API."""
        if scope not in self.scopes:
            raise PermissionDeniedError(
                f"this API key has no scope '{scope}' (it has {', '.join(sorted(self.scopes))}); "
                "ask for a key with it"
            )


class Authenticator(Protocol):
    """Safe to call from any thread, never blocks on disk or network, keeps no reference to keys."""

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller of `Authorization: Bearer KEY`. Raises AuthenticationError."""

    def close(self) -> None:
        """May be called again."""
