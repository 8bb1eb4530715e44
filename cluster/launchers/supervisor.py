"""Starts children again that have ended: at once the first time, then with growing pauses.

A child that keeps ending before it is ready has a cause that no restart mends: that is an error. No
restart waits for another one, for several parts may die at once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from penstock.child import ChildProcess
from penstock.errors import UnavailableError

MOST_QUICK_DEATHS = 5
_FIRST_PAUSE_S = 0.1
_MOST_PAUSE_S = 5.0
_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Watched:
    child: ChildProcess
    quick_deaths: int = 0
    start_at: float | None = None


class Supervisor:
    """Belongs to one thread; the clock's value comes with every call."""

    def __init__(self, children: Sequence[ChildProcess]) -> None:
        self._watched = [_Watched(child) for child in children]

    def watch(self, child: ChildProcess) -> None:
        """One more, which has been started."""
        self._watched.append(_Watched(child))

    def forget(self, child: ChildProcess) -> None:
        """It is to end."""
        self._watched = [watched for watched in self._watched if watched.child is not child]

    def tick(self, now: float) -> None:
        """Look at each child once. Raises `UnavailableError` that names one that keeps ending."""
        for watched in self._watched:
            if not watched.child.running:
                self._see_to(watched, now)

    def _see_to(self, watched: _Watched, now: float) -> None:
        child = watched.child
        if watched.start_at is None:
            watched.quick_deaths = 0 if child.is_ready else watched.quick_deaths + 1
            if watched.quick_deaths > MOST_QUICK_DEATHS:
                words = child.last_words or f"it ended with status {child.poll()}"
                raise UnavailableError(f"{child.name} keeps ending: {words}")
            pause = min(_FIRST_PAUSE_S * 2.0**watched.quick_deaths, _MOST_PAUSE_S)
            _log.warning(
                "%s ended with status %s, starting it again in %.1f s",
                child.name,
                child.poll(),
                pause,
            )
            watched.start_at = now + pause
        elif now >= watched.start_at:
            child.stop()
            child.spawn()
            watched.start_at = None
