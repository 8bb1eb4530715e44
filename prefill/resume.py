"""Where to resume a prompt: the cheapest way by predicted seconds. Pure.

Three kinds of way lead to a prompt's end, and each is exact:

- from a *state* at c: fetch the blocks before c and the state, compute the rest;
- by *replay* at the end of the blocks: fetch them, read the last `replay_tokens` before their end
  again (`Engine.replay`), compute the rest;
- from *nothing*: compute all.

A state further down is a way of its own: it fetches less and computes more.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from penstock.blocks import BLOCK_TOKENS, STATE_ALIGN_TOKENS, CacheLayout

DOUBLE_COST_TOKENS = 262_144
"""Before anything is measured: the context at which a token costs twice what the first one did
(index scores; the store's policy assumes the same).
"""
LEAST_GAIN_S = 0.25
LEAST_GAIN_SHARE = 0.25
"""A way that computes more is taken only if it is predicted to win as much, in seconds and as a
share: a prediction is never worth a prefix by itself.
"""
_MEMORY = 0.8
_PRIOR_WEIGHT = 0.01
_MOST_SURPRISE = 8.0
_FORGET = 0.05


class Kind(StrEnum):
    STATE = "state"
    REPLAY = "replay"
    NOTHING = "nothing"


@dataclass(frozen=True)
class Way:
    """Fetch `fetch_bytes`, stand at `start`, and compute from there; tokens up to `position` come
    from the store.
    """

    kind: Kind
    position: int
    start: int
    fetch_bytes: int = 0

    @property
    def replayed(self) -> int:
        return self.position - self.start

    def computed(self, length: int) -> int:
        return length - self.start


NOTHING = Way(Kind.NOTHING, 0, 0)


def ways(
    length: int, states: Iterable[int], *, blocks: int, layout: CacheLayout, replay_tokens: int
) -> list[Way]:
    """All ways to read a prompt of `length` tokens; `NOTHING` is always one.

    `states`: positions whose state is there; `blocks`: how many blocks are there from its start on.
    """
    found = [NOTHING]
    for position in states:
        if 0 < position <= length and position // BLOCK_TOKENS <= blocks:
            size = position // BLOCK_TOKENS * layout.block_bytes + layout.state_bytes(position)
            found.append(Way(Kind.STATE, position, position, size))
    end = min(blocks, length // BLOCK_TOKENS) * BLOCK_TOKENS
    if replay_tokens and end > replay_tokens:
        start = (end - replay_tokens) // STATE_ALIGN_TOKENS * STATE_ALIGN_TOKENS
        if start:
            size = end // BLOCK_TOKENS * layout.block_bytes
            found.append(Way(Kind.REPLAY, end, start, size))
    return found


@dataclass
class Line:
    """y = first x0 + second x1, learnt from what was measured of late.

    Bounded: neither factor leaves prior / `range` .. prior x `range`, one measurement moves it as
    if it had been off by 8 at most, and old ones fade. Starts at, and leans to, the prior.
    """

    prior: tuple[float, float]
    range: float = 1e4
    count: int = 0
    _scale: list[float] = field(init=False)
    _sums: list[float] = field(default_factory=lambda: [0.0] * 5)

    def __post_init__(self) -> None:
        self._scale = [1.0, 1.0]

    @property
    def factors(self) -> tuple[float, float]:
        return self.prior[0] * self._scale[0], self.prior[1] * self._scale[1]

    def predict(self, x0: float, x1: float) -> float:
        first, second = self.factors
        return first * x0 + second * x1

    def learn(self, x0: float, x1: float, seconds: float) -> None:
        """Weighs by relative error: a short piece says as much as a long one."""
        expected = self.predict(x0, x1)
        if expected <= 0 or not seconds >= 0:
            return
        seconds = min(max(seconds, expected / _MOST_SURPRISE), expected * _MOST_SURPRISE)
        unit = (expected * seconds) ** 0.5
        if not unit > 0:
            return
        a, b, y = self.prior[0] * x0 / unit, self.prior[1] * x1 / unit, seconds / unit
        new = (a * a, a * b, b * b, a * y, b * y)
        self._sums = [_MEMORY * old + add for old, add in zip(self._sums, new, strict=True)]
        self.count += 1
        self._solve()
        # Errors count relative to what is believed: old ones must not outweigh new ones because
        # the belief was smaller then.
        change = min(max(self.predict(x0, x1) / expected, 1 / _MOST_SURPRISE), _MOST_SURPRISE)
        self._sums = [value / change**2 for value in self._sums]

    def forget(self) -> None:
        """A step back to the prior: what is no longer tried must not be given up for good."""
        self._scale = [scale ** (1 - _FORGET) for scale in self._scale]
        self._sums = [(1 - _FORGET) * old for old in self._sums]

    def _solve(self) -> None:
        """Least squares, held by a weak belief in the present ratio of the two factors."""
        aa, ab, bb, a, b = self._sums
        # Relative to each column's own size, or the belief would drown a factor far from its prior.
        la, lb = _PRIOR_WEIGHT * (aa + 1e-12), _PRIOR_WEIGHT * (bb + 1e-12)
        common = (a + b) / max(aa + 2 * ab + bb, 1e-12)
        aa, bb, a, b = aa + la, bb + lb, a + la * common, b + lb * common
        determinant = aa * bb - ab * ab
        if determinant <= 0:
            return
        solved = ((a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant)
        self._scale = [min(max(value, 1 / self.range), self.range) for value in solved]


@dataclass
class Costs:
    """What a worker has learnt of its store and its model. One for each worker."""

    fetch: Line = field(default_factory=lambda: Line((0.005, 1 / 500e6)))
    """Seconds of a restore by (1, bytes): look-up aside, all that fetching and attaching take."""
    compute: Line = field(default_factory=lambda: Line((1e-4, 1e-4 / DOUBLE_COST_TOKENS)))
    """Seconds of a chunk by (tokens, tokens x mean position)."""

    def fetched(self, size_bytes: int, seconds: float) -> None:
        self.fetch.learn(1.0, float(size_bytes), seconds)

    def computed(self, start: int, tokens: int, seconds: float) -> None:
        if tokens > 0:
            self.compute.learn(float(tokens), tokens * (start + tokens / 2), seconds)

    def seconds(self, way: Way, length: int) -> float:
        """Predicted, from now to the prompt's end."""
        tokens = way.computed(length)
        total = self.compute.predict(float(tokens), tokens * (way.start + tokens / 2))
        if way.fetch_bytes:
            total += self.fetch.predict(1.0, float(way.fetch_bytes))
        return total


@dataclass(frozen=True)
class Choice:
    """The way to go, and the one that computes least (which would be it at any other price)."""

    way: Way
    longest: Way
    seconds: float
    longest_seconds: float


def choose(found: Sequence[Way], costs: Costs, length: int) -> Choice:
    """The way that computes least, unless another one is predicted to be much faster."""
    longest = min(found, key=lambda way: (way.computed(length), way.fetch_bytes))
    predicted = {way: costs.seconds(way, length) for way in found}
    fastest = min(found, key=lambda way: (predicted[way], way.computed(length)))
    gain = predicted[longest] - predicted[fastest]
    worth = gain >= LEAST_GAIN_S and gain >= LEAST_GAIN_SHARE * predicted[longest]
    way = fastest if worth else longest
    return Choice(way, longest, predicted[way], predicted[longest])
