"""What a metric is: its name, kind, labels, buckets and meaning. Declared once, in `catalog`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Process = Literal["front", "prefill", "decode", "store"]
Kind = Literal["counter", "gauge", "histogram"]

PREFIX = "penstock_"
OTHER = "other"
"""The label value of whatever is not one of a label's values."""
WORKERS: tuple[Process, ...] = ("prefill", "decode")
EVERY: tuple[Process, ...] = ("front", "prefill", "decode", "store")

_NAME = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class Label:
    """A label and its bound: a closed set of values, or at most `most` values as they come.

    Whatever goes beyond the bound is counted under `other`, so no client can make series grow.
    """

    name: str
    values: tuple[str, ...] = ()
    most: int = 0
    listed_in: str = ""
    """The file that has the values, where documents need not repeat them."""

    def __post_init__(self) -> None:
        if bool(self.values) == bool(self.most):
            raise ValueError(f"label {self.name} needs either its values or how many at most")

    @property
    def bound(self) -> int:
        """Most values, `other` included."""
        return (len(self.values) or self.most) + 1


@dataclass(frozen=True, eq=False)
class Metric:
    """One metric of one or several kinds of process. Compared and hashed by identity."""

    name: str
    """Without the prefix; a counter's ends in `_total`."""
    kind: Kind
    where: tuple[Process, ...]
    meaning: str
    labels: tuple[Label, ...] = ()
    buckets: tuple[float, ...] = ()
    also: tuple[str, ...] = ()
    """Other names (without the prefix) under which the same series is shown: vLLM's or older ones.
    """
    vllm: str = ""
    """The metric of vLLM that has this meaning, without its prefix."""
    still: str = ""
    """Why an undisturbed run of a small cluster leaves it where it is; empty if it moves."""

    def __post_init__(self) -> None:
        for name in (self.name, *self.also, *(label.name for label in self.labels)):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a metric or label")
        if (self.kind == "counter") != self.name.endswith("_total"):
            raise ValueError(f"{self.name}: a counter's name ends in _total, no other's does")
        if (self.kind == "histogram") != bool(self.buckets):
            raise ValueError(f"{self.name}: a histogram has buckets, nothing else has")
        if list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"{self.name}: buckets must ascend")
        if not self.meaning or not self.where:
            raise ValueError(f"{self.name}: says neither what it means nor where it is")

    @property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)

    @property
    def shown(self) -> str:
        """The full name."""
        return PREFIX + self.name
