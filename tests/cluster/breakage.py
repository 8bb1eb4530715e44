"""Tools for breaking a cluster on purpose and for seeing what it left behind (Linux: reads /proc).

Everything here looks from outside: HTTP, the directory and the store's Stat, /proc, signals.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from cluster.launchers.common import free_port
from model.engine import Segment
from model.fake import FakeEngine
from model.sampler import sample
from penstock.request import Sampling
from tests.cluster.harness import Cluster

_STORE_GAUGES = ("leases", "lease_owners", "open_puts", "open_gets", "reserved_bytes")
_WORKER_GAUGES = ("running", "queued", "used_bytes", "queued_tokens")
_WORKER_METRICS = ("running", "queued", "reserved_bytes", "pages", "pending_tokens")


def fake_answer(prompt: list[int], tokens: int) -> tuple[int, ...]:
    """What the fake answers (greedy, without an end token), computed here alone."""
    engine = FakeEngine()
    sequence = engine.open(len(prompt) + tokens)
    engine.forward([Segment(sequence, prompt)])
    answer: list[int] = []
    for _ in range(tokens):
        row = engine.logits([sequence]).row(0)
        answer.append(sample(row, Sampling(temperature=0.0, seed=0), position=sequence.position))
        engine.forward([Segment(sequence, [answer[-1]])])
    return tuple(answer)


def prompt_of(length: int, seed: int) -> list[int]:
    """Token ids that share no prefix with those of another seed."""
    return [(seed * 37 + i * (seed + 3)) % 251 for i in range(length)]


def wait_for(what: str, condition: Callable[[], bool], *, within_s: float) -> float:
    """Seconds until `condition` held. Fails with `what` if it took too long."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < within_s, f"not within {within_s} s: {what}"
        time.sleep(0.05)
    return time.monotonic() - started


def held(cluster: Cluster, *, store: bool = True) -> dict[str, float]:
    """Every gauge of store, workers and front that is not zero."""
    found: dict[str, float] = {}
    if store:
        stat = cluster.stat()
        found |= {f"store.{name}": getattr(stat, name) for name in _STORE_GAUGES}
        for worker in cluster.workers():
            for name in _WORKER_GAUGES:
                found[f"{worker.worker_id}.{name}"] = getattr(worker, name)
            for name in _WORKER_METRICS:
                found[f"{worker.worker_id}.metrics.{name}"] = worker.metrics.get(name, 0.0)
    found["front.running"] = front_metric(cluster.client, "penstock_requests_running")
    return {name: value for name, value in found.items() if value}


def front_metric(client: httpx.Client, name: str) -> float:
    text = client.get("/metrics").text
    match = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert match, f"no metric {name}"
    return float(match[1])


def assert_idle(cluster: Cluster, *, within_s: float = 5.0) -> float:
    """Nothing is held any more, in store, workers and front. Seconds until it was so."""
    started = time.monotonic()
    while left := held(cluster):
        took = time.monotonic() - started
        assert took < within_s, f"still held after {took:.1f} s: {left}"
        time.sleep(0.05)
    return time.monotonic() - started


@dataclass
class Sse:
    """What a client has read of one streamed completion."""

    status: int
    token_ids: list[int] = field(default_factory=list)
    error: dict[str, Any] | None = None
    finish_reason: str | None = None
    done: bool = False
    broken: str = ""
    seconds: float = 0.0


class Stream(threading.Thread):
    """A streamed completion read in the background; `result` is filled while it runs."""

    def __init__(self, cluster: Cluster | httpx.Client, prompt: list[int], **fields: Any) -> None:
        super().__init__(daemon=True)
        self._url = str((cluster if isinstance(cluster, httpx.Client) else cluster.client).base_url)
        self._body = body_of(prompt, stream=True, **fields)
        self.result = Sse(0)
        self.start()

    def run(self) -> None:
        started = time.monotonic()
        result = self.result
        try:
            with (
                httpx.Client(base_url=self._url, timeout=60.0) as client,
                client.stream("POST", "/v1/completions", json=self._body) as answer,
            ):
                if answer.status_code != 200:
                    answer.read()
                    result.error = answer.json()["error"]
                    result.status = answer.status_code
                    return
                result.status = 200
                for line in answer.iter_lines():
                    if line.startswith("data: "):
                        self._take(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            result.broken = repr(error)
        finally:
            result.seconds = time.monotonic() - started

    def _take(self, data: str) -> None:
        if data == "[DONE]":
            self.result.done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.result.error = event["error"]
            return
        for choice in event["choices"]:
            self.result.token_ids += choice.get("token_ids") or []
            self.result.finish_reason = choice.get("finish_reason") or self.result.finish_reason

    def end(self, *, within_s: float) -> Sse:
        """What came, once it has ended. Fails if it hangs."""
        self.join(within_s)
        assert not self.is_alive(), f"the stream hung for {within_s} s: {self.result}"
        return self.result


def body_of(prompt: list[int], **fields: Any) -> dict[str, Any]:
    base = {"model": "fake", "prompt": prompt, "temperature": 0, "ignore_eos": True}
    return base | {"logits_digest": True} | fields


@contextlib.contextmanager
def raw_request(url: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request on a socket of its own; leaving the block hangs up without reading."""
    where = httpx.URL(url)
    content = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {where.host}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((where.host, where.port or 80), timeout=10) as connection:
        connection.sendall(head.encode() + content)
        yield connection


# Processes


def every_process() -> dict[int, tuple[int, int]]:
    """id -> (parent, start time); zombies are not counted."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                found[int(entry.name)] = (int(fields[1]), int(fields[19]))
    return found


def descendants(root: int) -> dict[int, str]:
    """id -> command line of all processes below `root`."""
    every = every_process()
    found: dict[int, str] = {}
    pending = [root]
    while pending:
        parent = pending.pop()
        for pid, (its_parent, _) in every.items():
            if its_parent == parent and pid not in found:
                found[pid] = command_line(pid)
                pending.append(pid)
    return found


def command_line(pid: int) -> str:
    with contextlib.suppress(OSError):
        raw = Path(f"/proc/{pid}/cmdline").read_bytes()
        return raw.replace(b"\0", b" ").decode(errors="replace").strip()[:160]
    return ""


def marked(mark: str) -> dict[int, str]:
    """Live processes that carry `mark` in their environment, whoever their parent is now."""
    found = {}
    for pid in every_process():
        with contextlib.suppress(OSError):
            if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found[pid] = command_line(pid)
    return found


def ports_of(pids: set[int]) -> set[int]:
    """TCP ports on which these processes listen."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for fd in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(str(fd.readlink()))
    return {port for port, inode in _listening() if f"socket:[{inode}]" in inodes}


def listening_ports() -> set[int]:
    return {port for port, _ in _listening()}


def _listening() -> Iterator[tuple[int, str]]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    yield int(fields[1].rpartition(":")[2], 16), fields[9]


def shared_memory() -> frozenset[str]:
    return frozenset(p.name for p in Path("/dev/shm").iterdir())


def loads(pid: int, library: str) -> bool:
    try:
        return library in Path(f"/proc/{pid}/maps").read_text(errors="replace")
    except OSError:
        return False


@dataclass
class Served:
    """`penstock serve` as a user starts it, in a session and a temp directory of its own."""

    process: subprocess.Popen[str]
    url: str
    mark: str
    temporary: Path
    shared_memory: frozenset[str]
    output: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)
    ports: set[int] = field(default_factory=set)

    @property
    def pids(self) -> dict[int, str]:
        """Every process of it that lives now."""
        return descendants(self.process.pid) | marked(self.mark)

    def note(self) -> dict[int, str]:
        """Remember processes and ports as they are now, to look for them afterwards."""
        pids = self.pids
        self.seen |= set(pids)
        self.ports |= ports_of(set(pids))
        return pids

    def wait_ready(self, timeout_s: float = 120.0) -> None:
        wait_for(
            f"ready line; {self.errors[-5:]}",
            lambda: any(line.startswith("ready ") for line in self.output) or self.ended,
            within_s=timeout_s,
        )
        assert not self.ended, f"it ended with {self.process.poll()}: {self.errors}"

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def signal(self, number: int, *, group: bool = False) -> None:
        """To the process alone, or to its whole foreground group as a terminal's Ctrl-C is."""
        (os.killpg if group else os.kill)(self.process.pid, number)

    def exit_code(self, *, within_s: float) -> int:
        return self.process.wait(within_s)

    def left(self) -> dict[str, Any]:
        """What of it is still on the machine. Empty when it has gone without a trace."""
        found: dict[str, Any] = {
            "processes": self.pids,
            "ports": sorted(self.ports & listening_ports()),
            "shared memory": sorted(shared_memory() - self.shared_memory),
            "temporary files": sorted(p.name for p in self.temporary.iterdir()),
        }
        return {name: value for name, value in found.items() if value}

    def assert_gone(self, *, within_s: float) -> None:
        started = time.monotonic()
        while left := self.left():
            took = time.monotonic() - started
            assert took < within_s, f"left behind after {took:.1f} s: {left}"
            time.sleep(0.1)
        took = time.monotonic() - started
        print(
            f"{len(self.seen)} processes and {len(self.ports)} ports were there; "
            f"nothing is left after {took:.1f} s; exit code {self.process.poll()}"
        )


@contextlib.contextmanager
def serving(
    *flags: str, ready: bool = True, port: int | None = None, model: str = "fake", **env: str
) -> Iterator[Served]:
    """`penstock serve MODEL FLAGS` in a subprocess; killed with all of its at the end."""
    port = free_port() if port is None else port
    mark = f"BREAKAGE_MARK={uuid.uuid4().hex}"
    # Short, for Ray's unix sockets lie below it.
    temporary = Path(tempfile.mkdtemp(prefix="pt", dir="/tmp"))
    name, _, value = mark.partition("=")
    process = subprocess.Popen(
        [sys.executable, "-m", "cluster.cli", "serve", model, "--port", str(port), *flags],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, name: value, "TMPDIR": str(temporary), **env},
    )
    served = Served(process, f"http://127.0.0.1:{port}", mark, temporary, shared_memory())
    for pipe, lines in ((process.stdout, served.output), (process.stderr, served.errors)):
        threading.Thread(target=_read, args=(pipe, lines), daemon=True).start()
    try:
        if ready:
            served.wait_ready()
        yield served
    finally:
        for pid in served.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if process.poll() is None:
            process.kill()
        process.wait(10)
        shutil.rmtree(temporary, ignore_errors=True)


def _read(pipe: Any, lines: list[str]) -> None:
    lines.extend(line.rstrip() for line in pipe)
