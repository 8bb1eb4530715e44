"""Shares with their interval: every figure of an evaluation is hits of n. No torch."""

from __future__ import annotations

import math


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's interval of a share, 95 % unless `z` says otherwise; (0, 1) of nothing."""
    if not n:
        return (0.0, 1.0)
    p = hits / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return (round(max(0.0, middle - half), 4), round(min(1.0, middle + half), 4))
