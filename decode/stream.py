"""One sequence in the batch: what the step needs of it, and where its tokens go."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass, field, replace

from decode.grammar import Constraint
from decode.output import Output
from decode.speculation import Acceptance
from model.engine import Evidence
from model.engine import Sequence as EngineSequence
from penstock.errors import PenstockError
from penstock.request import Sampling, TokenLogprobs


@dataclass(frozen=True)
class Wishes:
    """What the client wants with each token besides the token."""

    evidence: bool = False
    logits_digest: bool = False
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Drawn:
    """A token drawn, with what belongs to its prediction."""

    token: int
    text: str = ""
    evidence: tuple[Evidence, ...] = ()
    digest: bytes = b""
    logprobs: TokenLogprobs | None = None
    reason: str | None = None
    """Set with the last token of an answer, once it has been accepted."""


@dataclass(eq=False)
class Stream:
    """Written by the batch on the event loop, read by one request's task.

    At most max_tokens wait here: the request's own bound is the queue's.
    """

    sequence: EngineSequence
    sampling: Sampling
    output: Output
    wishes: Wishes
    on_state: Callable[[int, bytes], None]
    """Gets (position, payload) of the state at each multiple of 128 that is passed."""
    pending: int | None = None
    """The token drawn last; it is absorbed in the next step."""
    drafts: Acceptance = field(default_factory=Acceptance)
    """How well this stream's drafts went so far."""
    reason: str | None = None
    tokens: list[int] = field(default_factory=list)
    limit: int = 1 << 62
    """Tokens that its sequence has room for."""
    paused: bool = False
    """It takes no part in steps."""
    on_drawn: Callable[[], None] = lambda: None
    constraint: Constraint | None = None
    """What the answer is bound to; belongs to the engine's thread."""
    emitted: InitVar[Sequence[int]] = ()
    """Tokens of the answer that another worker drew."""
    _counts: Counter[int] = field(default_factory=Counter)
    _ready: list[Drawn] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)
    _error: PenstockError | None = None

    def __post_init__(self, emitted: Sequence[int]) -> None:
        if emitted:
            self.pending = emitted[-1]
            self._counts.update(emitted)

    @property
    def can_step(self) -> bool:
        """Whether the next step may take it in."""
        has_room = self.pending is None or self.sequence.position < self.limit
        return has_room and not self.paused

    @property
    def is_over(self) -> bool:
        return self.reason is not None or self._error is not None

    def adjustments(self, ahead: Iterable[int]) -> dict[int, float]:
        """What is added to which logits for the next token, after the answer so far and `ahead`:
        a function of the request and of the tokens alone, so that a moved stream draws the same.
        """
        sampling = self.sampling
        added = dict(sampling.logit_bias)
        if sampling.penalises:
            counts = self._counts.copy()
            counts.update(ahead)
            for token, count in counts.items():
                penalty = sampling.presence_penalty + sampling.frequency_penalty * count
                added[token] = added.get(token, 0.0) - penalty
        return added

    def accept(self, drawn: Drawn) -> None:
        """The batch has drawn the next token."""
        piece = self.output.accept(drawn.token)
        self.tokens.append(drawn.token)
        self.pending = drawn.token
        self.reason = piece.reason
        if self.sampling.penalises:
            self._counts[drawn.token] += 1
        self.on_drawn()
        self._ready.append(replace(drawn, text=piece.text, reason=piece.reason))
        self._news.set()

    def fail(self, error: PenstockError) -> None:
        self._error = error
        self._news.set()

    async def take(self) -> list[Drawn]:
        """All tokens that are ready, at least one; [] after the last. Raises the stream's error."""
        while not self._ready:
            if self._error is not None:
                raise self._error
            if self.reason is not None:
                return []
            self._news.clear()
            await self._news.wait()
        ready, self._ready = self._ready, []
        return ready
