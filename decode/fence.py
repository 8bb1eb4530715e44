"""One writer a stream: of one request's attempts only the latest runs on a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from penstock.errors import LeaseLostError


@dataclass(eq=False)
class _Running:
    attempt: int
    task: asyncio.Task[object]
    is_over: bool = False


class Fence:
    """Belongs to one event loop."""

    def __init__(self) -> None:
        self._running: dict[str, _Running] = {}

    @contextmanager
    def only(self, request_id: str, attempt: int) -> Iterator[None]:
        """Ends an earlier attempt of the request that runs here. Raises LeaseLostError in one that
        a later attempt ended, or that comes after it.
        """
        before = self._running.get(request_id)
        if before is not None:
            if before.attempt >= attempt:
                raise _lost(request_id, before.attempt)
            before.is_over = True
            before.task.cancel()
        task = asyncio.current_task()
        assert task is not None, "an attempt runs in a task"
        mine = self._running[request_id] = _Running(attempt, task)
        try:
            yield
        except asyncio.CancelledError:
            if mine.is_over:
                raise _lost(request_id, attempt + 1) from None
            raise
        finally:
            if self._running.get(request_id) is mine:
                del self._running[request_id]


def _lost(request_id: str, attempt: int) -> LeaseLostError:
    return LeaseLostError(f"attempt {attempt} of request {request_id} has taken this stream over")
