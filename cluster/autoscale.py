"""How many workers a pool should have: a pure function of its signals and its own memory.

    prefill   seconds that the uncached tokens in line take, per worker, against a target
    decode    time between tokens against its target; the share of cache memory or slots in use

Up at once and in one go, as far as one step allows; down only after the wish has held for a while,
one step at a time, each followed by a pause. Nothing happens on signals that are old or that do not
cover every worker: a worker that starts says nothing, and one that hangs says what held before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from pydantic import Field, model_validator

from penstock.settings import Section


class AutoscalingSection(Section):
    """Bounds and targets of one pool (docs/autoscaling.md)."""

    enabled: bool = False
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int = Field(default=4, ge=1)
    queue_s: float = Field(default=2.0, gt=0)
    """Prefill: seconds of tokens in line for each worker that are fine."""
    token_gap_ms: float = Field(default=100.0, gt=0)
    """Decode: time between tokens that is fine."""
    use: float = Field(default=0.8, gt=0, le=1)
    """Decode: share of cache memory or of slots in use that is fine, whichever is larger."""
    slack: float = Field(default=0.3, gt=0, lt=1)
    """Hysteresis: down only if the smaller pool would stay so far below every target."""
    up_pause_s: float = Field(default=5.0, ge=0)
    """After a step up: a new worker needs time before it shows."""
    down_hold_s: float = Field(default=60.0, ge=0)
    """So long a smaller pool must have been enough."""
    down_pause_s: float = Field(default=30.0, ge=0)
    """Between two steps down."""
    most_up: int = Field(default=4, ge=1)
    """Workers that one step may add."""
    most_down: int = Field(default=1, ge=1)
    """Workers that one step may take away."""
    stale_s: float = Field(default=10.0, gt=0)
    """Signals that are older decide nothing."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(
                f"max_replicas ({self.max_replicas}) must not be below min_replicas "
                f"({self.min_replicas})"
            )
        return self


def most_replicas(replicas: int, section: AutoscalingSection) -> int:
    """What a pool that begins with `replicas` may grow to."""
    return section.max_replicas if section.enabled else replicas


@dataclass(frozen=True)
class Signals:
    """One pool as its workers told it. `loads`: load / target, 1.0 is what is fine, one for each
    kind of load; all of them shrink as workers are added.
    """

    workers: int
    """That told something."""
    age_s: float
    """Of the oldest thing told."""
    loads: Sequence[float]


@dataclass(frozen=True)
class Memory:
    """What the scaler remembers between two calls. Seconds of the caller's clock."""

    raised_s: float = -math.inf
    lowered_s: float = -math.inf
    low_since_s: float | None = None
    """Since when a smaller pool would have been enough."""


@dataclass(frozen=True)
class Target:
    """How many workers there should be, and why."""

    workers: int
    reason: str
    memory: Memory


def prefill_signals(
    section: AutoscalingSection,
    *,
    queued_tokens: Sequence[int],
    tokens_per_s: Sequence[float],
    age_s: float,
) -> Signals:
    """From each worker's uncached tokens in line and its speed (0 where it has not been measured).

    Work that waits anywhere counts for the whole pool: new prompts go where there is least.
    """
    known = [speed for speed in tokens_per_s if speed > 0]
    speed = sum(known) / len(known) if known else 0.0
    workers = len(queued_tokens)
    if not workers or not speed:
        return Signals(workers, age_s, (0.0,))
    seconds = sum(queued_tokens) / (speed * workers)
    return Signals(workers, age_s, (seconds / section.queue_s,))


def decode_signals(
    section: AutoscalingSection,
    *,
    token_gaps_s: Sequence[float],
    use: Sequence[float],
    age_s: float,
) -> Signals:
    """From each worker's time between tokens (0 where nothing runs) and the share of it that is
    asked for: memory or slots, waiting requests included, so above 1 where some wait.
    """
    workers = len(use)
    if not workers:
        return Signals(0, age_s, (0.0, 0.0))
    gaps = [gap for gap in token_gaps_s if gap > 0]
    # Whoever waits for a token waits for its own worker: the mean over those that run.
    gap_s = sum(gaps) / len(gaps) if gaps else 0.0
    return Signals(
        workers,
        age_s,
        (1e3 * gap_s / section.token_gap_ms, sum(use) / workers / section.use),
    )


def target(
    section: AutoscalingSection, *, current: int, signals: Signals, memory: Memory, now_s: float
) -> Target:
    """`current`: workers that there are or that have been asked for. Never outside the bounds."""
    least, most = section.min_replicas, section.max_replicas
    bounded = min(max(current, least), most)
    if bounded != current:
        return Target(bounded, "bounds", replace(memory, low_since_s=None))
    if signals.age_s > section.stale_s:
        return Target(current, "stale signals", replace(memory, low_since_s=None))
    if signals.workers < current:
        # They start, or they hang: what is told is not the whole pool.
        return Target(current, "waiting for workers", replace(memory, low_since_s=None))
    load = max(signals.loads, default=0.0)
    if load > 1.0:
        return _up(section, current, load, replace(memory, low_since_s=None), now_s)
    if current > least and load * current / (current - 1) <= 1.0 - section.slack:
        return _down(section, current, load, memory, now_s)
    return Target(current, "fine", replace(memory, low_since_s=None))


def _up(
    section: AutoscalingSection, current: int, load: float, memory: Memory, now_s: float
) -> Target:
    if current == section.max_replicas:
        return Target(current, "at most", memory)
    if now_s < memory.raised_s + section.up_pause_s:
        return Target(current, "pause after a step up", memory)
    # Bounded before it is rounded: a load may be as large as a float.
    wanted = min(current * load, float(section.max_replicas))
    workers = min(math.ceil(wanted), current + section.most_up, section.max_replicas)
    workers = max(workers, current + 1)
    return Target(workers, "load above target", replace(memory, raised_s=now_s))


def _down(
    section: AutoscalingSection, current: int, load: float, memory: Memory, now_s: float
) -> Target:
    since_s = now_s if memory.low_since_s is None else memory.low_since_s
    memory = replace(memory, low_since_s=since_s)
    if now_s < since_s + section.down_hold_s:
        return Target(current, "low, not for long", memory)
    if now_s < max(memory.lowered_s, memory.raised_s) + section.down_pause_s:
        return Target(current, "pause after a step", memory)
    enough = math.ceil(current * load / (1.0 - section.slack))
    workers = max(enough, current - section.most_down, section.min_replicas)
    workers = min(workers, current - 1)
    return Target(workers, "low for long", replace(memory, lowered_s=now_s))
