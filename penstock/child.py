"""Child processes of a launcher or a worker: started with a pipe as stdin, told what to do in its
first line.

The pipe is the leash: a child exits when its stdin reaches the end. So a launcher that crashes,
even by SIGKILL, leaves no process behind, and no signal or pid file has to be trusted.
"""

from __future__ import annotations

import collections
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from penstock.errors import PenstockError, UnavailableError

_log = logging.getLogger(__name__)
_TAIL_LINES = 40


class ChildProcess:
    """One child. `start` waits for its line `ready ADDRESS`; `stop` is idempotent."""

    def __init__(self, name: str, module: str, args: Sequence[str] = (), *, first_line: str = ""):
        self.name = name
        self.address = ""
        # -P: who starts a server inside a downloaded folder must not import what lies there.
        self._command = [sys.executable, "-P", "-m", module, *args]
        self._first_line = first_line
        self._process: subprocess.Popen[str] | None = None
        self._tail: collections.deque[str] = collections.deque(maxlen=_TAIL_LINES)
        self._ready = threading.Event()
        self._readers: list[threading.Thread] = []

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def running(self) -> bool:
        # Another thread may be in `stop`.
        process = self._process
        return process is not None and process.poll() is None

    @property
    def is_ready(self) -> bool:
        """Has it been ready since it was started last?"""
        return self._ready.is_set()

    def spawn(self) -> None:
        """Start without waiting; `await_ready` waits."""
        self._ready.clear()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            # Ctrl-C in a terminal must reach the launcher alone, which stops the parts in order.
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._readers = [
            threading.Thread(target=self._read_stdout, args=(self._process,), daemon=True),
            threading.Thread(target=self._read_stderr, args=(self._process,), daemon=True),
        ]
        for reader in self._readers:
            reader.start()
        if self._first_line:
            try:
                self._process.stdin.write(self._first_line + "\n")
                self._process.stdin.flush()
            except BrokenPipeError:
                _log.debug("%s went away before it was told what to do", self.name)

    def await_ready(self, timeout_s: float) -> str:
        """Its address. Raises `UnavailableError` with the child's own last words if it fails."""
        deadline = time.monotonic() + timeout_s
        while not self._ready.wait(0.05):
            if not self.running:
                for reader in self._readers:
                    reader.join(1.0)
                if self._ready.is_set():
                    break
                raise PenstockError(self.last_words or f"{self.name} ended during its start")
            if time.monotonic() > deadline:
                raise UnavailableError(f"{self.name} was not ready after {timeout_s:.0f} s")
        return self.address

    def poll(self) -> int | None:
        process = self._process
        return process.poll() if process else None

    def kill(self) -> None:
        """SIGKILL, for fault injection."""
        if self._process is not None:
            self._process.kill()

    def terminate(self) -> None:
        """Ask it to end: SIGTERM and the end of its stdin."""
        if self._process is None:
            return
        if self.running:
            self._process.send_signal(signal.SIGTERM)

    def stop(self, grace_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL after `grace_s`."""
        if self._process is None:
            return
        self.terminate()
        try:
            self._process.wait(grace_s)
        except subprocess.TimeoutExpired:
            _log.warning("%s did not end within %.0f s and is killed", self.name, grace_s)
            self._process.kill()
            self._process.wait()
        for reader in self._readers:
            reader.join(1.0)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            if stream is not None:
                try:
                    stream.close()
                except BrokenPipeError:
                    continue
        self._process = None

    @property
    def last_words(self) -> str:
        """The last line that it wrote to stderr, or nothing."""
        lines = [line for line in self._tail if line.strip()]
        return lines[-1].removeprefix("error: ").removeprefix("kvstore: ") if lines else ""

    def _read_stdout(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            if not self._ready.is_set() and line.startswith("ready "):
                self.address = line.split(maxsplit=1)[1].strip()
                self._ready.set()
            else:
                _log.info("%s: %s", self.name, line.rstrip())

    def _read_stderr(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr
        for line in process.stderr:
            if line.startswith("{"):
                # A line of the child's own log: it has a level and says whose it is already.
                sys.stderr.write(line)
                continue
            self._tail.append(line.rstrip())
            _log.info("%s: %s", self.name, line.rstrip())
