"""Kills and cuts parts of a running cluster, one after the other, and keeps the log."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.cluster.harness import Cluster
from tests.kvstore.redis_server import RedisServer

PAUSE_S = (2.0, 5.0)


def can_cut() -> bool:
    """May this process reset the kernel's TCP connections (root, Linux with INET_DIAG_DESTROY)?"""
    if shutil.which("ss") is None or os.geteuid() != 0:
        return False
    done = subprocess.run(["ss", "-K", "-tn", "sport", "=", ":1"], capture_output=True, check=False)
    return done.returncode == 0


def cut(port: int) -> int:
    """Reset every established connection to this port of loopback. How many it were."""
    found = subprocess.run(
        ["ss", "-K", "-tnH", "state", "established", "sport", "=", f":{port}"],
        capture_output=True,
        text=True,
        check=False,
    )
    return len(found.stdout.splitlines())


@dataclass
class Killer:
    """A thread that strikes every few seconds until it is stopped."""

    cluster: Cluster
    seed: int
    redis: RedisServer | None = None
    log: list[str] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Killer:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        assert self._thread is not None
        self._thread.join(30)

    def _run(self) -> None:
        chosen, began = random.Random(self.seed), time.monotonic()
        kinds, order = self._kinds(), list[str]()
        while not self._stop.wait(chosen.uniform(*PAUSE_S)):
            # Every kind before one comes again.
            order = order or chosen.sample(sorted(kinds), len(kinds))
            name = order.pop()
            what = kinds[name](chosen)
            self.log.append(f"{time.monotonic() - began:5.1f} s  {name:10} {what}")

    def _kinds(self) -> dict[str, Callable[[random.Random], str]]:
        launcher: Any = self.cluster.launcher

        def worker(role: str) -> Callable[[random.Random], str]:
            def strike(chosen: random.Random) -> str:
                names = [name for name in launcher.workers if name.startswith(role)]
                name = chosen.choice(names)
                return self._kill(launcher.workers[name])

            return strike

        kinds = {
            "prefill": worker("prefill"),
            "decode": worker("decode"),
            "store": lambda _: self._kill(launcher.store),
        }
        if self.redis is not None:
            kinds["redis"] = self._redis
        if can_cut():
            kinds["connection"] = self._connection
        return kinds

    def _kill(self, child: Any) -> str:
        pid = child.pid
        if pid is None or not child.running:
            return f"{child.name} is down already"
        os.kill(pid, signal.SIGKILL)
        return f"kill -9 {child.name} ({pid})"

    def _redis(self, _: random.Random) -> str:
        assert self.redis is not None
        self.redis.kill()
        self._stop.wait(0.5)
        self.redis.start()
        return "kill -9, started again empty after 0.5 s"

    def _connection(self, chosen: random.Random) -> str:
        launcher: Any = self.cluster.launcher
        workers = [child for child in launcher.workers.values() if child.running]
        addresses = {child.name: child.address for child in workers}
        addresses["kvstore"] = self.cluster.store_address
        name = chosen.choice(sorted(addresses))
        port = int(addresses[name].rpartition(":")[2] or 0)
        return f"{cut(port)} connections to {name} reset" if port else f"{name} is down already"
