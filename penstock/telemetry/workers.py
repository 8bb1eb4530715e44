"""The metrics that prefill and decode workers have in common, read where they are kept anyway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from penstock.telemetry import catalog as M
from penstock.telemetry.meters import Meters

if TYPE_CHECKING:
    from protos.penstock.kv.v1 import kv_pb2


def worker_meters(role: Literal["prefill", "decode"], worker_id: str) -> Meters:
    """Every series says whose it is: the front shows those of all workers together."""
    return Meters(role, {"role": role, "worker": worker_id})


def read_entry(meters: Meters, describe: Callable[[], kv_pb2.Worker], calls: Counter[str]) -> None:
    """From the worker's entry in the directory, and its host's counts of calls."""
    meters.read(M.WORKER_PID, lambda: describe().pid)
    meters.read(M.WORKER_RUNNING, lambda: describe().running)
    meters.read(M.WORKER_QUEUED, lambda: describe().queued)
    meters.read(M.WORKER_QUEUED_TOKENS, lambda: describe().queued_tokens)
    meters.read(M.WORKER_CAPACITY, lambda: describe().capacity_bytes)
    meters.read(M.WORKER_USED, lambda: describe().used_bytes)
    meters.read(M.WORKER_RESERVED, lambda: describe().used_bytes)
    meters.read(M.KV_USAGE, lambda: _usage(describe()))
    meters.read(M.WORKER_DRAINING, lambda: describe().draining)
    meters.read(M.WORKER_BYTES_PER_TOKEN, lambda: describe().bytes_per_token)
    meters.read(M.WORKER_REQUESTS, lambda: calls["requests_total"])
    meters.read(M.WORKER_FAILED, lambda: calls["requests_failed_total"])
    meters.read(M.WORKER_CANCELLED, lambda: calls["requests_cancelled_total"])


def _usage(entry: kv_pb2.Worker) -> float:
    return entry.used_bytes / entry.capacity_bytes if entry.capacity_bytes else 0.0
