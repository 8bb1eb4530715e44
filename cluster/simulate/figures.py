"""What came out of a simulation: goodput, percentiles, hit rate, use of the pools. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from cluster.simulate.life import Life

PERCENTILES = (50, 90, 99)
_GAP_BINS = 200
"""Bins of a decade of token gaps: a percentile is right to 1.2 %."""


class Gaps:
    """Times between two tokens of one stream, counted in logarithmic bins."""

    def __init__(self) -> None:
        self.count = 0
        self._total_s = 0.0
        self._bins: dict[int, list[float]] = {}

    def add(self, seconds: float, count: int) -> None:
        """`count` gaps of `seconds` each."""
        if count <= 0:
            return
        self.count += count
        self._total_s += seconds * count
        at = round(_GAP_BINS * math.log10(max(seconds, 1e-9)))
        found = self._bins.setdefault(at, [0, 0.0])
        found[0] += count
        found[1] += seconds * count

    @property
    def mean_s(self) -> float:
        return self._total_s / self.count if self.count else math.nan

    def percentile(self, q: float) -> float:
        """nan without gaps."""
        wanted, seen = self.count * q / 100, 0.0
        for at in sorted(self._bins):
            count, total = self._bins[at]
            seen += count
            if seen >= wanted and count:
                return total / count
        return math.nan


def percentile(values: Sequence[float], q: float) -> float:
    """The `q`-th (0..100) of ascending `values`, linear between neighbours; nan without any."""
    if not values:
        return math.nan
    at = (len(values) - 1) * q / 100
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


@dataclass(frozen=True)
class Slo:
    """What counts as served well: both bounds, for each request. Seconds."""

    ttft_s: float = 5.0
    gap_s: float = 0.1
    """Of a request's mean time between tokens."""

    def holds(self, life: Life) -> bool:
        return life.served and life.ttft_s <= self.ttft_s and life.token_gap_s <= self.gap_s


@dataclass(frozen=True)
class PoolUse:
    """One pool over the whole simulation. Shares are of the time in which its workers existed."""

    workers_mean: float
    workers_most: int
    worker_s: float
    """Worker-seconds paid for."""
    busy: float


@dataclass(frozen=True)
class Result:
    """One simulation. Seconds, tokens, bytes; percentiles by name, as `p50`."""

    policy: str
    requests: int
    served: int
    refused: dict[str, int]
    within_slo: int
    duration_s: float
    """From the first arrival to the last end."""
    goodput: float
    """Requests within the SLO a second."""
    ttft_mean_s: float
    ttft_s: dict[str, float]
    gap_s: dict[str, float]
    e2e_s: dict[str, float]
    prompt_tokens: int
    """Of the served."""
    cached_tokens: int
    computed_tokens: int
    answer_tokens: int
    evictions: int
    store_bytes: int
    prefill: PoolUse
    decode: PoolUse
    events: int
    lives: tuple[Life, ...] = field(repr=False)
    series: tuple[tuple[float, int, int], ...] = ()
    """(second, prefill workers, decode workers) at each change."""

    @property
    def hit_rate(self) -> float:
        """Of all prompt tokens of served requests."""
        return self.cached_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    @property
    def within(self) -> float:
        """Share of all requests that were served within the SLO."""
        return self.within_slo / self.requests if self.requests else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain values; what is not there (nan) is null."""
        values = {
            name: value
            for name, value in vars(self).items()
            if name not in ("lives", "series", "prefill", "decode")
        }
        values |= {"hit_rate": self.hit_rate, "within_slo_share": self.within}
        values |= {"prefill": vars(self.prefill), "decode": vars(self.decode)}
        values["workers_over_time"] = [list(point) for point in self.series]
        return {name: _plain(value) for name, value in values.items()}


def spread(values: Iterable[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": percentile(ordered, q) for q in PERCENTILES}


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found) if found else math.nan


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    return value
