"""Names of owners by what they are part of: `R/answer/0` is below `R/answer` and `R`. Pure."""

from __future__ import annotations

_DEEPEST = 4
"""Further slashes are part of a name: they come from outside and must not cost memory."""


class Owners:
    """A set of names that finds those below one without a look at the others."""

    def __init__(self) -> None:
        self._below: dict[str, set[str]] = {}

    def __len__(self) -> int:
        return len(self._below)

    def add(self, name: str) -> None:
        for whole in _wholes(name):
            self._below.setdefault(whole, set()).add(name)

    def discard(self, name: str) -> None:
        for whole in _wholes(name):
            parts = self._below.get(whole)
            if parts is not None:
                parts.discard(name)
                if not parts:
                    del self._below[whole]

    def family(self, name: str) -> list[str]:
        """`name` itself, whether it was added or not, and every name below it."""
        return [name, *sorted(self._below.get(name, ()))]


def _wholes(name: str) -> list[str]:
    parts = name.split("/", _DEEPEST)
    return ["/".join(parts[:count]) for count in range(1, len(parts))]
