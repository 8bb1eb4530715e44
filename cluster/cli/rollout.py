"""`penstock rollout`: fresh workers in place of those that serve, without a failed request."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Annotated

import typer

from penstock.errors import PenstockError, UnavailableError, UsageError

_POLL_S = 0.2


def register(app: typer.Typer) -> None:
    app.command(
        "rollout", help="Replace every worker of a cluster on this machine, one after the other."
    )(rollout)


def rollout(
    url: Annotated[str, typer.Option(help="The cluster.")] = "http://127.0.0.1:8000",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until it gives up.")] = 600.0,
) -> int:
    before = _workers(url)
    if not before:
        raise UnavailableError(f"no worker is registered at {url}; see {url}/ready")
    launcher = _launcher_of(before)
    began = time.monotonic()
    os.kill(launcher, signal.SIGHUP)
    while True:
        time.sleep(_POLL_S)
        now = _workers(url)
        if len(now) >= len(before) and not before & now:
            break
        if time.monotonic() > began + timeout:
            raise PenstockError(
                f"{len(before & now)} of {len(before)} workers are still the old ones after "
                f"{timeout:.0f} s; the log of `penstock serve` says why"
            )
    typer.echo(f"replaced {len(before)} workers in {time.monotonic() - began:.1f} s")
    return 0


def _workers(url: str) -> set[int]:
    """Process ids of all workers that the front knows."""
    import httpx

    try:
        answer = httpx.get(f"{url.rstrip('/')}/metrics", timeout=10.0).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UnavailableError(f"no cluster answers at {url}: {error}; check --url") from error
    return {
        int(float(line.split()[-1]))
        for line in answer.text.splitlines()
        if line.startswith("penstock_worker_pid{")
    }


def _launcher_of(workers: set[int]) -> int:
    """The `penstock serve` that started them. Raises UsageError if nothing on this machine did."""
    parents = {_parent(pid) for pid in workers}
    if len(parents) == 1:
        (parent,) = parents
        if parent is not None and b"serve" in _command(parent):
            return parent
    raise UsageError(
        "these workers were not started by `penstock serve --launcher local` on this machine; Ray "
        "Serve and Kubernetes replace theirs themselves (docs/rollout.md)"
    )


def _parent(pid: int) -> int | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name stands in brackets and may hold anything.
    return int(stat.rpartition(")")[2].split()[1])


def _command(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
