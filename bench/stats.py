"""Percentiles and summaries. Pure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence


def percentile(values: Sequence[float], q: float) -> float:
    """The `q`-th percentile (0..100), linear between neighbours. `nan` without values."""
    if not 0 <= q <= 100:
        raise ValueError(f"a percentile lies in 0..100, not {q}")
    if not values:
        return math.nan
    ordered = sorted(values)
    at = (len(ordered) - 1) * q / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def median(values: Sequence[float]) -> float:
    return percentile(values, 50)


def spread(values: Sequence[float], name: str, *, scale: float = 1.0) -> dict[str, float | None]:
    """`NAME_p50`, `_p90`, `_p99`, each times `scale`; None (JSON's null) without values."""
    return {f"{name}_p{q}": finite(percentile(values, q) * scale) for q in (50, 90, 99)}


def gaps(times: Sequence[float]) -> list[float]:
    """Differences of neighbours."""
    return [b - a for a, b in itertools.pairwise(times)]


def finite(value: float) -> float | None:
    """None for nan and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def ratio(part: float | None, whole: float | None) -> float | None:
    """None where there is nothing to divide."""
    return finite(part / whole) if part is not None and whole else None


def low_median_high(values: Iterable[float]) -> tuple[float, float, float]:
    """Smallest, middle, largest. Raises ValueError without values."""
    ordered = sorted(values)
    if not ordered:
        raise ValueError("no values")
    return ordered[0], median(ordered), ordered[-1]
