"""Fresh workers in place of those that run, without a failed request.

Group by group, one worker of each role: start the new ones, wait until the front has seen them,
then let the old ones drain. A drained worker's streams end where they are, or go on at another one
if they take longer than the drain may (docs/failover.md). If a new worker does not come up, the old
ones stay and nothing more happens.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from cluster.launchers.supervisor import Supervisor
from penstock.child import ChildProcess
from penstock.errors import PenstockError

_log = logging.getLogger(__name__)
_SEEN_S = 2.0
"""A worker registers before it is ready; a front reads the directory at least that often."""


class Rollout(threading.Thread):
    """One rollout. `workers` is the launcher's own table, changed under `lock`."""

    def __init__(
        self,
        *,
        workers: dict[str, ChildProcess],
        make: Callable[[str, str], ChildProcess],
        supervisor: Supervisor,
        lock: threading.Lock,
        stopping: threading.Event,
        start_timeout_s: float,
        drain_timeout_s: float,
    ) -> None:
        super().__init__(name="rollout", daemon=True)
        self._workers = workers
        self._make = make
        self._supervisor = supervisor
        self._lock = lock
        self._stopping = stopping
        self._start_timeout_s = start_timeout_s
        self._drain_timeout_s = drain_timeout_s
        self._passing: list[ChildProcess] = []
        """Those that start or drain: in nobody else's table."""

    def run(self) -> None:
        began = time.monotonic()
        count = len(self._workers)
        try:
            for group in _groups(self._workers):
                self._replace(group)
                if self._stopping.is_set():
                    return
        except PenstockError as error:
            _log.error("the rollout ends here, the other workers stay: %s", error.message)
            return
        _log.info("rolled out %d workers in %.1f s", count, time.monotonic() - began)

    def end(self) -> None:
        """The launcher stops: leave nothing behind."""
        for child in tuple(self._passing):
            child.kill()
        self.join(10.0)
        for child in tuple(self._passing):
            child.stop(0.0)

    def _replace(self, names: Sequence[str]) -> None:
        fresh = [self._make(_role(name), _next(name)) for name in names]
        self._passing += fresh
        try:
            for child in fresh:
                if not self._stopping.is_set():
                    child.spawn()
            for child in fresh:
                child.await_ready(self._start_timeout_s)
        except PenstockError:
            for child in fresh:
                child.stop()
            raise
        with self._lock:
            for child in fresh:
                self._workers[child.name] = child
                self._supervisor.watch(child)
                self._passing.remove(child)
        if self._stopping.wait(_SEEN_S):
            return
        with self._lock:
            old = [self._workers.pop(name) for name in names]
            self._passing += old
            for child in old:
                self._supervisor.forget(child)
        for child in old:
            child.terminate()
        deadline = time.monotonic() + self._drain_timeout_s
        for child in old:
            child.stop(max(0.0, deadline - time.monotonic()))
            self._passing.remove(child)


def _groups(names: Iterable[str]) -> list[list[str]]:
    """One of each role together: a new model's prefill needs a decode of its own fingerprint."""
    by_role: dict[str, list[str]] = {}
    for name in names:
        by_role.setdefault(_role(name), []).append(name)
    rows = itertools.zip_longest(*by_role.values())
    return [[name for name in row if name is not None] for row in rows]


def _role(name: str) -> str:
    return name.partition("-")[0]


def _next(name: str) -> str:
    """`decode-0`, `decode-0.1`, `decode-0.2`: the directory knows both at once."""
    base, _, generation = name.partition(".")
    return f"{base}.{int(generation or 0) + 1}"
