"""Structured logs: one JSON object a line, with the request and the trace that it belongs to.

Lines tell figures, names and ids, never text of a prompt or an answer: nothing that a client wrote
is passed to a logger but the id that it chose (`X-Request-Id`, checked at the front).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import sys
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from typing import Any, TextIO

from penstock.telemetry import trace

REQUEST_KEY = "penstock-request-id"
"""Metadata of calls between processes: whose request this work is for."""
_scope: ContextVar[dict[str, Any] | None] = ContextVar("penstock_log_scope", default=None)


@contextlib.contextmanager
def request_scope(request_id: str) -> Iterator[None]:
    """Log lines of this task and of its children carry `request_id`."""
    token = _scope.set({"request_id": request_id})
    try:
        yield
    finally:
        _scope.reset(token)


def remember(**facts: Any) -> None:
    """Fields of every later line of the request that runs now."""
    scope = _scope.get()
    if scope is not None:
        scope.update(facts)


def outgoing() -> tuple[tuple[str, str], ...]:
    """Metadata for a call to another process, so that its lines carry the same id."""
    scope = _scope.get()
    return () if scope is None else ((REQUEST_KEY, scope["request_id"]),)


def received(
    metadata: Iterable[tuple[str | bytes, str | bytes]],
) -> contextlib.AbstractContextManager[None]:
    """The scope that a call from another process belongs to, if it names one."""
    for key, value in metadata:
        if key == REQUEST_KEY:
            return request_scope(value if isinstance(value, str) else value.decode("latin-1"))
    return contextlib.nullcontext()


class JsonFormatter(logging.Formatter):
    """One JSON object per line; `extra={"facts": {...}}` adds fields."""

    def __init__(self, process: str = "") -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{record.created:.3f}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if self._process:
            line["process"] = self._process
        line |= _scope.get() or {}
        if (span := trace.current()) is not None:
            line["trace_id"] = span.trace_id
        facts = getattr(record, "facts", None)
        if isinstance(facts, dict):
            line |= facts
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, asyncio.CancelledError):
            # Work that was told to end, as at a shutdown, has no place in the code to look at.
            line["cancelled"] = str(error) or True
        elif record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(
    *, level: str = "info", stream: TextIO | None = None, process: str = ""
) -> None:
    """JSON lines on stderr instead of the handlers so far. Programs call it, libraries never.

    `process`: the name of this part of the cluster, a field of every line.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter(process))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # What libraries tell at these levels is not about requests.
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))


_TALKATIVE = ("httpx", "httpcore", "urllib3", "ray", "asyncio", "opentelemetry")
