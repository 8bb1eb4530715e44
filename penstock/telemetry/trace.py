"""Spans of one request across processes. Without an endpoint nothing is loaded, made or sent.

Only an *entry* (an HTTP request at the front, a call that carries a trace at a worker or store)
needs a `Tracer`. What runs below it says `span(...)`: a child of whatever runs now, or nothing at
all. Attributes are figures and names, never text of a prompt or an answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Protocol

Attribute = str | int | float | bool
Headers = Iterable[tuple[str | bytes, str | bytes]]


class Span(Protocol):
    """Work that has begun."""

    @property
    def trace_id(self) -> str:
        """32 hex digits."""

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        """W3C Trace Context for what this work calls."""

    def note(self, **attributes: Attribute) -> None: ...

    def rename(self, name: str) -> None: ...

    def child(self, name: str, **attributes: Attribute) -> AbstractContextManager[Span]:
        """A span inside this one, which is the current one while the block runs."""

    def record(self, name: str, seconds: float, **attributes: Attribute) -> None:
        """A span inside this one that ends now and began `seconds` ago."""


class Tracer(Protocol):
    """Begins spans where a request enters a process."""

    def entry(
        self, name: str, headers: Headers, *, may_begin: bool = False, **attributes: Attribute
    ) -> AbstractContextManager[Span | None]:
        """The current span while the block runs, in the trace that `headers` carry.

        Without one it begins a trace if `may_begin`, else it is None.
        """

    async def close(self) -> None:
        """Send what is left, within a short bound. May be called again."""


_current: ContextVar[Span | None] = ContextVar("penstock_span", default=None)
_NOTHING: AbstractContextManager[None] = contextlib.nullcontext()


class _NoTracer:
    def entry(
        self, name: str, headers: Headers, *, may_begin: bool = False, **attributes: Attribute
    ) -> AbstractContextManager[Span | None]:
        return _NOTHING

    async def close(self) -> None:
        return


NO_TRACER: Tracer = _NoTracer()


def current() -> Span | None:
    return _current.get()


@contextlib.contextmanager
def as_current(span: Span) -> Iterator[Span]:
    """`span` is what `current` gives, in this task and those it starts, while the block runs.

    A block of a generator may end in another task than it began in; there it was never current.
    """
    token = _current.set(span)
    try:
        yield span
    finally:
        with contextlib.suppress(ValueError):
            _current.reset(token)


def span(name: str, **attributes: Attribute) -> AbstractContextManager[Span | None]:
    """A child of what runs now. Around a `yield` it is also what runs for whoever asked."""
    parent = _current.get()
    return _NOTHING if parent is None else parent.child(name, **attributes)


def record(name: str, seconds: float, **attributes: Attribute) -> None:
    """A child of what runs now that has just ended."""
    parent = _current.get()
    if parent is not None:
        parent.record(name, seconds, **attributes)


def note(**attributes: Attribute) -> None:
    """Attributes of what runs now."""
    running = _current.get()
    if running is not None:
        running.note(**attributes)


def outgoing() -> tuple[tuple[str, str], ...]:
    """Metadata for a call to another process; empty if nothing is traced."""
    running = _current.get()
    return () if running is None else running.headers
