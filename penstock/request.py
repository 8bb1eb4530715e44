"""The nouns of one request. Frozen; everything countable is derived."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum

from penstock.errors import InvalidRequestError

MOST_BIASED_TOKENS = 1024
MOST_TOP_LOGPROBS = 20

MOST_STOPS = 16
LONGEST_STOP = 256


class Priority(IntEnum):
    """Who goes first where work has to wait; less is earlier. Ageing keeps every class moving."""

    INTERACTIVE = 0
    NORMAL = 1
    BATCH = 2


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
    frequency_penalty: float = 0.0
    """Taken from a token's logit for each time that the answer has it."""
    presence_penalty: float = 0.0
    """Taken from a token's logit once the answer has it."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits."""

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
        for name in ("frequency_penalty", "presence_penalty"):
            value = getattr(self, name)
            if not -2.0 <= value <= 2.0:
                raise InvalidRequestError(
                    f"{name} must be between -2 and 2, not {value}", param=name
                )
        if len(self.logit_bias) > MOST_BIASED_TOKENS:
            raise InvalidRequestError(
                f"logit_bias takes at most {MOST_BIASED_TOKENS} tokens, not {len(self.logit_bias)}",
                param="logit_bias",
            )
        for token, bias in self.logit_bias:
            if token < 0 or not -100.0 <= bias <= 100.0:
                raise InvalidRequestError(
                    "logit_bias maps token ids to numbers between -100 and 100, not "
                    f"{token} to {bias}",
                    param="logit_bias",
                )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalises(self) -> bool:
        """A token's chance depends on what the answer has so far."""
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


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
        fits = all(0 < len(each) <= LONGEST_STOP for each in self.strings)
        if len(self.strings) > MOST_STOPS or not fits:
            raise InvalidRequestError(
                f"stop takes at most {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters",
                param="stop",
            )


@dataclass(frozen=True)
class Grammar:
    """What an answer is bound to, in llguidance's Lark dialect."""

    text: str
    starts_after: int | None = None
    """The token (the end of the reasoning) after which the grammar begins; None: at once."""


@dataclass(frozen=True)
class Resume:
    """Where a request stands that other workers began. The default is its beginning."""

    attempt: int = 0
    """Of this request, rising: the fence by which an earlier attempt is told from a later one."""
    emitted: tuple[int, ...] = ()
    """Tokens of its answer that were drawn and handed on."""
    tell_emitted: bool = False
    """Whoever goes on reading has not read those: send them once more."""
    cached_tokens: int | None = None
    """Of the prompt, as the first attempt's prefill told; None: not known."""

    def absorbed(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        """What a sequence must have absorbed to go on: the token drawn last is still pending."""
        return (*prompt, *self.emitted[:-1])


BEGINNING = Resume()


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
    top_logprobs: int | None = None
    """Return the log probability of each token, and of this many likeliest ones beside it."""
    grammar: Grammar | None = None
    """Draw only tokens that it allows."""
    resume: Resume = BEGINNING
    kept: bool = False
    """Its client may come back for it: each token is told in an event of its own."""
    tenant: bytes = b""
    """Whose share of the workers it uses: an opaque tag, never a name or a key."""
    priority: Priority = Priority.NORMAL

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise InvalidRequestError("the prompt is empty", param="messages")
        if len(self.namespace) != 32:
            raise ValueError("namespace must be 32 bytes")
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= MOST_TOP_LOGPROBS:
            raise InvalidRequestError(
                f"top_logprobs must be between 0 and {MOST_TOP_LOGPROBS}, not {self.top_logprobs}",
                param="top_logprobs",
            )

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
class TokenLogprobs:
    """Of one token drawn: natural logarithms of the model's own probabilities, before temperature,
    penalties, bias and grammar.
    """

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest tokens, best first; ties by id."""


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
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One a token, if they were asked for."""
    arrived_s: float | None = field(default=None, compare=False)
    """When the front read it, by `time.monotonic`; None where nobody measures."""


@dataclass(frozen=True)
class Finish:
    """Event: the last one of a request."""

    reason: str
    usage: Usage
    text: str = ""
    timings: dict[str, float] = field(default_factory=dict)


Event = Progress | TokenChunk | Finish
