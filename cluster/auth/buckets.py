"""A token bucket as a value: pure functions of (bucket, time), so that a test can try any history.

The level may go below zero. What a request costs is known only while it runs (cached tokens are
free), so it is admitted on a positive level and charged afterwards; a debt delays the next one.
In any time span of t seconds at most `capacity + rate_per_s * t` is admitted, plus what the
requests already running cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Bucket:
    """`level` at time `at_s`; it refills by `rate_per_s` up to `capacity`."""

    capacity: float
    rate_per_s: float
    level: float
    at_s: float

    @classmethod
    def full(cls, capacity: float, *, period_s: float, now_s: float) -> Bucket:
        """Allows `capacity` in a burst and the same again over each `period_s`."""
        return cls(capacity, capacity / period_s, capacity, now_s)

    def refilled(self, now_s: float) -> Bucket:
        """As of `now_s`. A clock that went backwards refills nothing."""
        passed_s = max(0.0, now_s - self.at_s)
        level = min(self.capacity, self.level + passed_s * self.rate_per_s)
        return replace(self, level=level, at_s=max(now_s, self.at_s))

    def taken(self, amount: float, now_s: float) -> Bucket:
        """`amount` less, below zero if need be; a negative amount gives back."""
        full = self.refilled(now_s)
        return replace(full, level=min(self.capacity, full.level - amount))

    def wait_s(self, now_s: float, amount: float = 1.0) -> float:
        """Time until `amount` is there; 0 if it is now."""
        missing = min(amount, self.capacity) - self.refilled(now_s).level
        return max(0.0, missing / self.rate_per_s)

    def resized(self, capacity: float, *, period_s: float, now_s: float) -> Bucket:
        """For a changed limit: what has been used up stays used up."""
        used = self.capacity - self.refilled(now_s).level
        return Bucket(capacity, capacity / period_s, capacity - used, now_s)
