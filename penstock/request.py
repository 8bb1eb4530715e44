"""The nouns of one request. Frozen; everything countable is derived."""

from __future__ import annotations

from dataclasses import dataclass, field

from penstock.errors import InvalidRequestError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Keyed by (seed, choice, position), so that a moved stream draws the
    same tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    choice: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature <= 2.0:
            raise InvalidRequestError(
                f"temperature must be between 0 and 2, not {self.temperature}", param="temperature"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise InvalidRequestError(
                f"top_p must be above 0 and at most 1, not {self.top_p}", param="top_p"
            )
        if self.top_k < 0:
            raise InvalidRequestError(f"top_k must be at least 0, not {self.top_k}", param="top_k")
        if not 0 <= self.seed < 2**64:
            raise InvalidRequestError("seed must be an unsigned 64-bit integer", param="seed")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


@dataclass(frozen=True)
class StopRule:
    """When an output ends, besides the model's own end token."""

    max_tokens: int
    min_tokens: int = 0
    ignore_eos: bool = False
    strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise InvalidRequestError(
                f"max_tokens must be at least 1, not {self.max_tokens}", param="max_tokens"
            )
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise InvalidRequestError(
                f"min_tokens must be between 0 and max_tokens ({self.max_tokens}), "
                f"not {self.min_tokens}",
                param="min_tokens",
            )
        if len(self.strings) > 16 or any(not s or len(s) > 256 for s in self.strings):
            raise InvalidRequestError(
                "stop takes at most 16 strings of 1 to 256 characters", param="stop"
            )


@dataclass(frozen=True)
class Request:
    """One prompt on its way through the cluster."""

    request_id: str
    token_ids: tuple[int, ...]
    namespace: bytes
    sampling: Sampling
    stop: StopRule
    boundaries: tuple[int, ...] = ()
    """Token positions at which a message of the conversation ends, ascending."""
    evidence: bool = False
    logits_digest: bool = False
    """Return a digest of the logits that each token was drawn from."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise InvalidRequestError("the prompt is empty", param="messages")
        if len(self.namespace) != 32:
            raise ValueError("namespace must be 32 bytes")

    @property
    def total_tokens(self) -> int:
        """Context that the request may grow to."""
        return len(self.token_ids) + self.stop.max_tokens


@dataclass(frozen=True)
class Usage:
    """Counted once, where prefill restores: tokens that prefill did not compute for this
    request.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class EvidenceSpan:
    """A span of prompt tokens that attention selected, with its attention mass."""

    start: int
    end: int
    mass: float


@dataclass(frozen=True)
class Progress:
    """Event: prompt tokens ready (restored ones included)."""

    tokens_done: int
    tokens_total: int
    cached_tokens: int


@dataclass(frozen=True)
class TokenChunk:
    """Event: some tokens of the answer. `index` counts tokens from 0 and never repeats or skips."""

    index: int
    token_ids: tuple[int, ...]
    text: str
    evidence: tuple[EvidenceSpan, ...] = ()
    logits_digests: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Finish:
    """Event: the last one of a request."""

    reason: str
    usage: Usage
    text: str = ""
    timings: dict[str, float] = field(default_factory=dict)


Event = Progress | TokenChunk | Finish
