"""Stop strings in a stream of text. Pure.

The *first* stop string is the one that is complete first; of several that are complete at the same
character, the longest. So the result does not depend on how the text is split.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes text on, except what may still turn out to begin a stop string."""

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._longest = max((len(s) for s in strings), default=0)
        self._held = ""
        self.stopped = False

    def feed(self, text: str) -> str:
        """Text that is safe to show. After a stop string nothing is, nor is the string itself."""
        if self.stopped or not self._strings:
            return "" if self.stopped else text
        text = self._held + text
        ends = [
            (at + len(string), at) for string in self._strings if (at := text.find(string)) >= 0
        ]
        if ends:
            self.stopped = True
            self._held = ""
            return text[: min(ends)[1]]
        hold = self._beginning(text)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]

    def flush(self) -> str:
        """The held text: the stream has ended and it was no stop string."""
        held, self._held = self._held, ""
        return held

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            if any(string.startswith(text[len(text) - length :]) for string in self._strings):
                return length
        return 0
