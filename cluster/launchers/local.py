"""The `local` launcher: every part a subprocess. Fast to start, easy to break on purpose, needs no
Ray.
"""

from __future__ import annotations

import logging
import threading

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
from penstock.child import ChildProcess
from penstock.errors import PenstockError, UnavailableError

_log = logging.getLogger(__name__)
_RESTART_PAUSE_S = 0.5
# A part that keeps dying this fast has a cause that a restart does not mend.
_MAX_QUICK_DEATHS = 5


class LocalLauncher:
    """Store node, workers and front as children. A worker or front that dies is started again."""

    def __init__(self, config: ClusterConfig) -> None:
        self._config = with_token(config)
        self.store: ChildProcess | None = None
        self.workers: dict[str, ChildProcess] = {}
        self.front: ChildProcess | None = None
        self._stopping = threading.Event()

    def start(self) -> Endpoint:
        config = self._config
        require_free_ports(config)
        self.store, store_address = start_store(config)
        for role, pool in (("prefill", config.prefill), ("decode", config.decode)):
            for number in range(pool.replicas):
                name = f"{role}-{number}"
                spec = worker_spec(config, role=role, worker_id=name, store_address=store_address)
                self.workers[name] = ChildProcess(
                    name, role, ["--spec-stdin"], first_line=spec.model_dump_json()
                )
        spec_line = front_spec(config, store_address=store_address).model_dump_json()
        self.front = ChildProcess("front", "cluster.front", first_line=spec_line)
        for child in self._restartable():
            child.spawn()
        for child in self._restartable():
            child.await_ready(config.launcher.start_timeout_s)
        url = http_url(config)
        wait_until_ready(url, timeout_s=config.launcher.start_timeout_s, alive=self._check)
        return Endpoint(url, store_address, config.tls)

    def _restartable(self) -> list[ChildProcess]:
        return [*self.workers.values(), *([self.front] if self.front else [])]

    def _check(self) -> None:
        for child in (self.store, *self._restartable()):
            if child is not None and not child.running:
                raise UnavailableError(f"{child.name} has ended with status {child.poll()}")

    def wait(self) -> None:
        deaths: dict[str, int] = {}
        while not self._stopping.wait(0.2):
            if self.store is not None and not self.store.running:
                raise UnavailableError(
                    f"the KV store node has ended with status {self.store.poll()}"
                )
            for child in self._restartable():
                if child.running:
                    continue
                deaths[child.name] = deaths.get(child.name, 0) + 1
                if deaths[child.name] > _MAX_QUICK_DEATHS:
                    raise UnavailableError(f"{child.name} keeps ending; see its log")
                _log.warning("%s ended with status %s, starting it again", child.name, child.poll())
                if self._stopping.wait(_RESTART_PAUSE_S):
                    return
                self._restart(child, deaths)

    def _restart(self, child: ChildProcess, deaths: dict[str, int]) -> None:
        child.stop()
        child.spawn()
        try:
            child.await_ready(self._config.launcher.start_timeout_s)
        except PenstockError as error:
            _log.warning("%s did not come back: %s", child.name, error)
            return
        deaths[child.name] = 0

    def stop(self) -> None:
        """Front first, so that no request meets a half-stopped cluster; the store last."""
        self._stopping.set()
        if self.front is not None:
            self.front.stop()
        for child in self.workers.values():
            child.terminate()
        for child in self.workers.values():
            child.stop()
        if self.store is not None:
            self.store.stop()
        self.front, self.store = None, None
        self.workers.clear()
