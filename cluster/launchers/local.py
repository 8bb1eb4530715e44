"""The `local` launcher: every part a subprocess. Fast to start, easy to break on purpose, needs no
Ray.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from cluster.config import ClusterConfig
from cluster.contracts import Endpoint
from cluster.launchers.common import (
    front_spec,
    http_url,
    require_free_ports,
    start_store,
    wait_until_ready,
    with_token,
    worker_spec,
)
from cluster.launchers.rollout import Rollout
from cluster.launchers.supervisor import Supervisor
from penstock.child import ChildProcess
from penstock.errors import PenstockError, UnavailableError

_log = logging.getLogger(__name__)
_LOOK_S = 0.05


class LocalLauncher:
    """Store node, workers and front as children. One that dies is started again."""

    def __init__(
        self, config: ClusterConfig, *, again: Callable[[], ClusterConfig] | None = None
    ) -> None:
        """`again` reads the configuration anew for a rollout; None: as it was."""
        self._config = with_token(config)
        self._again = again
        self.store: ChildProcess | None = None
        self.workers: dict[str, ChildProcess] = {}
        self.fronts: list[ChildProcess] = []
        self._stopping = threading.Event()
        self._starting = threading.Lock()
        self._asked = threading.Event()
        self._rollout: Rollout | None = None

    @property
    def front(self) -> ChildProcess | None:
        """The first of the fronts."""
        return self.fronts[0] if self.fronts else None

    def start(self) -> Endpoint:
        config = self._config
        require_free_ports(config)
        self.store, store_address = start_store(config)
        self._store_address = store_address
        for role, pool in (("prefill", config.prefill), ("decode", config.decode)):
            for number in range(pool.replicas):
                name = f"{role}-{number}"
                self.workers[name] = self._worker(config, role, name)
        spec_line = front_spec(config, store_address=store_address).model_dump_json()
        for number in range(config.front.replicas):
            name = f"front-{number}" if config.front.replicas > 1 else "front"
            self.fronts.append(ChildProcess(name, "cluster.front", first_line=spec_line))
        for child in self._restartable():
            child.spawn()
        for child in self._restartable():
            child.await_ready(config.launcher.start_timeout_s)
        url = http_url(config)
        wait_until_ready(url, timeout_s=config.launcher.start_timeout_s, alive=self._check)
        return Endpoint(url, store_address, config.tls)

    def _worker(self, config: ClusterConfig, role: str, name: str) -> ChildProcess:
        spec = worker_spec(config, role=role, worker_id=name, store_address=self._store_address)
        return ChildProcess(name, role, ["--spec-stdin"], first_line=spec.model_dump_json())

    def rollout(self) -> None:
        """Ask for fresh workers in place of all; `wait` sees to it. May be called by a signal."""
        self._asked.set()

    def _children(self) -> list[ChildProcess]:
        return [child for child in (self.store, *self._restartable()) if child is not None]

    def _restartable(self) -> list[ChildProcess]:
        return [*self.workers.values(), *self.fronts]

    def _check(self) -> None:
        for child in self._children():
            if not child.running:
                raise UnavailableError(f"{child.name} has ended with status {child.poll()}")

    def wait(self) -> None:
        supervisor = Supervisor(self._children())
        while not self._stopping.wait(_LOOK_S):
            with self._starting:
                if not self._stopping.is_set():
                    supervisor.tick(time.monotonic())
            if self._asked.is_set() and not (self._rollout and self._rollout.is_alive()):
                self._asked.clear()
                self._rollout = self._begin_rollout(supervisor)

    def _begin_rollout(self, supervisor: Supervisor) -> Rollout | None:
        try:
            fresh = self._config if self._again is None else self._again()
        except PenstockError as error:
            _log.error("no rollout, the workers stay: %s", error.message)
            return None
        # The store and its token stay as they are: so do addresses.
        fresh = fresh.model_copy(update={"tls": self._config.tls})
        rollout = Rollout(
            workers=self.workers,
            make=lambda role, name: self._worker(fresh, role, name),
            supervisor=supervisor,
            lock=self._starting,
            stopping=self._stopping,
            start_timeout_s=fresh.launcher.start_timeout_s,
            drain_timeout_s=fresh.launcher.drain_timeout_s,
        )
        rollout.start()
        return rollout

    def stop(self) -> None:
        """Front first, so that no request meets a half-stopped cluster; the store last."""
        self._stopping.set()
        if self._rollout is not None:
            self._rollout.end()
        # What the supervisor is just starting must be known here to be stopped.
        with self._starting:
            self._stop()

    def _stop(self) -> None:
        for front in self.fronts:
            front.terminate()
        for front in self.fronts:
            front.stop()
        for child in self.workers.values():
            child.terminate()
        for child in self.workers.values():
            child.stop()
        if self.store is not None:
            self.store.stop()
        self.store = None
        self.fronts.clear()
        self.workers.clear()
