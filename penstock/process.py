"""A worker as a process of its own: its spec, its leash, and one line `ready ADDRESS`.

`python -m prefill` and `python -m decode` are this program with another worker.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from pydantic import ValidationError

from penstock.errors import PenstockError
from penstock.telemetry.logs import configure_logging
from penstock.worker import WorkerSpec

_DRAIN_TIMEOUT_S = 60.0
_CHECK_PERIOD_S = 1.0
_STDIN = 0


class Worker(Protocol):
    """What this program asks of a worker."""

    async def start(self) -> str: ...

    def check(self) -> None:
        """Raises a `PenstockError` once the worker can serve no more and must be replaced."""

    async def drain(self, timeout_s: float) -> bool: ...

    async def stop(self) -> None: ...


Open = Callable[[WorkerSpec], Coroutine[Any, Any, Worker]]


def main(program: str, load: Callable[[], Open], arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 stopped, 1 cannot start, 2 wrong command line.

    `load` imports the worker's room: a wrong command line is answered before gRPC and the model.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {program}", description=f"one {program} worker"
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--spec-json", metavar="JSON", help="the worker's spec")
    given.add_argument("--spec-stdin", action="store_true", help="the spec is stdin's first line")
    options = parser.parse_args(arguments)
    try:
        text = options.spec_json if options.spec_json is not None else _first_line()
        spec = WorkerSpec.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "spec"
        print(f"error: {place}: {first['msg']}", file=sys.stderr)
        return 2
    configure_logging(level=spec.telemetry.log_level, process=spec.worker_id)
    try:
        return _run(spec, load())
    except PenstockError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        return 1


def _run(spec: WorkerSpec, open_worker: Open) -> int:
    try:
        import uvloop
    except ImportError:
        return asyncio.run(_serve(spec, open_worker))
    return uvloop.run(_serve(spec, open_worker))


async def _serve(spec: WorkerSpec, open_worker: Open) -> int:
    loop = asyncio.get_running_loop()
    asked, orphaned = asyncio.Event(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    if _is_leash():
        threading.Thread(target=_watch_leash, args=(loop, orphaned), daemon=True).start()
    worker = await open_worker(spec)
    try:
        print(f"ready {await worker.start()}", flush=True)
        while not await _first(asked, orphaned, timeout_s=_CHECK_PERIOD_S):
            worker.check()
        if not orphaned.is_set():
            draining = asyncio.create_task(worker.drain(_DRAIN_TIMEOUT_S))
            leash = asyncio.create_task(orphaned.wait())
            await asyncio.wait({draining, leash}, return_when=asyncio.FIRST_COMPLETED)
            draining.cancel()
            leash.cancel()
    finally:
        await worker.stop()
    return 0


async def _first(*events: asyncio.Event, timeout_s: float) -> bool:
    """Whether one of them was set within the time."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    return any(event.is_set() for event in events)


def _first_line() -> str:
    # Unbuffered: what follows belongs to the leash.
    line = bytearray()
    while (byte := os.read(_STDIN, 1)) and byte != b"\n":
        line += byte
    return line.decode(errors="replace")


def _is_leash() -> bool:
    """Only a pipe or socket is held by somebody; a container's /dev/null ends at once."""
    mode = os.fstat(_STDIN).st_mode
    return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _watch_leash(loop: asyncio.AbstractEventLoop, orphaned: asyncio.Event) -> None:
    while os.read(_STDIN, 4096):
        continue
    loop.call_soon_threadsafe(orphaned.set)
