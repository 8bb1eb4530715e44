"""The nouns of routing and its seam, `Policy`. Pure: no clock, no I/O, no asyncio.

A decision is a function of four values: the `Board` (live workers, what each is known to cost, and
the work charged to it), the request's `Shape`, what of its prompt is `Resident`, and the workers to
avoid. The front and the simulator run the same code.

Work is charged to a worker at the decision, not when its next heartbeat says so; otherwise a burst
of requests all see the same idle worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from cluster.contracts import WorkerView

if TYPE_CHECKING:
    from cluster.routing.board import Board

PREFILL, DECODE = "prefill", "decode"
NOBODY: frozenset[str] = frozenset()


class RoutingPolicy(StrEnum):
    """How a request's workers are chosen."""

    COST = "cost"
    ROUND_ROBIN = "round-robin"
    LEAST_LOAD = "least-load"
    BLOCK_OVERLAP = "block-overlap"


@dataclass(frozen=True, slots=True)
class Shape:
    """All that routing may know of a request; nothing of its text."""

    prompt_tokens: int
    max_tokens: int = 0
    priority: str = "normal"
    tenant: str = ""

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.max_tokens < 0:
            raise ValueError(
                f"a request of {self.prompt_tokens} prompt and {self.max_tokens} new tokens is none"
            )

    @property
    def total_tokens(self) -> int:
        """Context that the request may grow to."""
        return self.prompt_tokens + self.max_tokens


@dataclass(frozen=True, slots=True)
class Coefficients:
    """What one worker costs, in seconds. The defaults are priors, of the order of a small CPU
    model; `cluster.routing.fit` replaces them by what the streams show.

    Token number i of a prompt takes `token_s + i * pair_s`: linear layers cost the same everywhere,
    attention and its indexer grow with the position. A step of decode with n sequences takes
    `step_s + n * sequence_s`.
    """

    token_s: float = 1e-3
    pair_s: float = 0.0
    fetch_bytes_per_s: float = 500e6
    """Of the store, as this worker sees it; also what it publishes with."""
    step_s: float = 10e-3
    sequence_s: float = 1e-3
    stay_s: float = 10.0
    """How long an answer keeps its place."""

    def __post_init__(self) -> None:
        if min(self.token_s, self.pair_s, self.step_s, self.sequence_s, self.stay_s) < 0:
            raise ValueError("a worker's costs must not be negative")
        if not self.fetch_bytes_per_s > 0:
            raise ValueError("a worker fetches more than 0 bytes/s")

    def compute_s(self, start: int, end: int) -> float:
        """Reading tokens [start, end) of a prompt."""
        return (end - start) * self.token_s + pairs(start, end) * self.pair_s


def pairs(start: int, end: int) -> float:
    """Pairs of a token in [start, end) and one before it: what attention costs."""
    return (end - start) * (end + start) / 2


@dataclass(frozen=True, slots=True)
class Load:
    """Work given to one worker. Sums and differences are loads."""

    tokens: int = 0
    """Prompt tokens still to compute."""
    pairs: float = 0.0
    prompts: int = 0
    sequences: int = 0
    size_bytes: int = 0

    def __add__(self, other: Load) -> Load:
        return Load(
            self.tokens + other.tokens,
            self.pairs + other.pairs,
            self.prompts + other.prompts,
            self.sequences + other.sequences,
            self.size_bytes + other.size_bytes,
        )

    def __neg__(self) -> Load:
        return Load(-self.tokens, -self.pairs, -self.prompts, -self.sequences, -self.size_bytes)

    def __sub__(self, other: Load) -> Load:
        return self + -other


NO_LOAD = Load()


@dataclass(frozen=True, slots=True)
class Resident:
    """What is there of one prompt. `resumable_tokens`: a state stands at that position and every
    block before it is held; blocks without a state are of no use to a prefill worker.
    """

    resumable_tokens: int = 0
    fetch_bytes: int = 0
    """Of those blocks and the state."""
    overlap_tokens: int = 0
    """Blocks from the start on that are held, state or not: what others route by."""
    near: Mapping[str, int] = field(default_factory=dict)
    """Worker id -> leading tokens that it is reading right now for another request: a duplicate
    there waits for them instead of computing them.
    """
    seen: Mapping[str, int] = field(default_factory=dict)
    """Worker id -> leading tokens that were routed there before."""
    fingerprint: bytes | None = None
    """Under which it is: for workers of another one nothing is. None: for all."""

    def with_near(self, near: Mapping[str, int]) -> Resident:
        return replace(self, near=near)

    def for_(self, fingerprint: bytes) -> Resident:
        return self if self.fingerprint in (None, fingerprint) else NOTHING


NOTHING = Resident()


class PromptIds(Protocol):
    """A prompt's identity under one fingerprint; `penstock.identity.Chain` is one."""

    @property
    def blocks(self) -> tuple[bytes, ...]: ...

    @property
    def tokens(self) -> tuple[int, ...]: ...

    def state_id(self, position: int) -> bytes: ...


@dataclass(frozen=True)
class Route:
    """A prefill and a decode worker of one fingerprint."""

    prefill: WorkerView
    decode: WorkerView


@dataclass(frozen=True)
class Cost:
    """One row of a decision's table. `parts` add up to `total`; the least of a role that is not
    barred was chosen. `facts`: what the parts were made from. `barred`: why the worker was not in
    question.
    """

    worker_id: str
    role: str
    total: float
    parts: Mapping[str, float]
    facts: Mapping[str, float]
    barred: str = ""


class Decision(Protocol):
    """A route and why. `table` may be read at any later time: it shows what held then."""

    @property
    def policy(self) -> RoutingPolicy: ...

    @property
    def route(self) -> Route: ...

    @property
    def shape(self) -> Shape: ...

    @property
    def resident(self) -> Resident: ...

    @property
    def unit(self) -> str:
        """Of the costs: `s`, `tokens`, `blocks` or `turns`."""

    def table(self) -> Sequence[Cost]:
        """Every worker of the directory, by role, then by id."""


class Policy(Protocol):
    """Chooses. Draining workers and those in `avoid` get nothing; both workers have one
    fingerprint; ties go to the lowest worker id, so the order of the directory does not matter.

    Raises `WorkerUnavailableError` that names the missing role.
    """

    def choose(
        self, board: Board, shape: Shape, resident: Resident, *, avoid: frozenset[str] = NOBODY
    ) -> Decision: ...
