"""Virtual time: a heap of calls. Equal times run in the order in which they were asked for."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any


class Clock:
    """`now` only grows. Nothing here reads a real clock or a random number."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls = 0
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._asked = 0

    def at(self, when_s: float, call: Callable[..., None], *args: Any) -> None:
        """Raises ValueError for a time that is over."""
        if when_s < self.now:
            raise ValueError(f"{when_s} is over, it is {self.now}")
        self._asked += 1
        heapq.heappush(self._heap, (when_s, self._asked, call, args))

    def after(self, seconds: float, call: Callable[..., None], *args: Any) -> None:
        self.at(self.now + seconds, call, *args)

    def run(self) -> None:
        """Until nothing is left to do."""
        while self._heap:
            when_s, _, call, args = heapq.heappop(self._heap)
            self.now = when_s
            self.calls += 1
            call(*args)
