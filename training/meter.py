"""Sums of outcomes between two lines of the curve."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training.losses import Outcome

_COUNTS = ("right", "answerable", "refused_right", "unanswerable")
_MEANS = ("gold_mass", "unknown_mass", "recall", "citation")


def _nothing() -> dict[str, float]:
    return dict.fromkeys(("loss", *_COUNTS, *_MEANS), 0.0)


class Meter:
    """Adds outcomes as plain numbers, so that a checkpoint can hold it."""

    def __init__(self) -> None:
        self._n, self._sums = 0, _nothing()

    def add(self, outcome: Outcome) -> None:
        """One more step."""
        self._n += 1
        self._sums["loss"] += float(outcome.loss.detach())
        for name in (*_COUNTS, *_MEANS):
            self._sums[name] += getattr(outcome, name)

    def line(self) -> dict[str, float]:
        """Means and shares, ready for JSON; the sums begin again."""
        n, sums = max(1, self._n), self._sums
        out = {
            "loss": sums["loss"] / n,
            "em": sums["right"] / max(1, sums["answerable"]),
            "unknown": sums["refused_right"] / max(1, sums["unanswerable"]),
            "gold_mass": sums["gold_mass"] / n,
            "unknown_mass": sums["unknown_mass"] / n,
            "recall16": sums["recall"] / n,
            "citation": sums["citation"] / n,
        }
        self._n, self._sums = 0, _nothing()
        return {key: round(value, 4) for key, value in out.items()}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"n": self._n, "sums": dict(self._sums)}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Meter:
        """The meter that `state` was taken of."""
        meter = cls()
        meter._n, meter._sums = state["n"], dict(state["sums"])
        return meter
