"""`GET /cluster`: the cluster at a glance, as JSON, for the page and for scripts.

What it costs is bounded: the workers come from the router's mirror and the store is asked once, at
most twice a second in all, however many are watching; nothing here waits longer than
`_TIMEOUT_S`. It names no address, no process id and nothing that a request contained.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Request, Response

from cluster.api.intake import state_of
from cluster.api.state import ApiState
from cluster.contracts import WorkerView
from penstock.errors import PenstockError

router = APIRouter()
_TIMEOUT_S = 3.0
_FRESH_S = 0.5
_MOST_WORKERS = 256
_TIERS = (("memory", ""), ("disk", "disk_"), ("object", "object_"))
_STORE_COUNTS = (
    "objects",
    "leases",
    "evictions",
    "integrity_failures",
    "hits",
    "misses",
    "bytes_in",
    "bytes_out",
)
_COUNTS = {
    "prefill": {
        "prefill_computed_tokens_total": "computed_tokens",
        "prefill_cached_tokens_total": "cached_tokens",
    },
    "decode": {
        "decode_generated_tokens_total": "generated_tokens",
        "decode_attached_tokens_total": "fetched_tokens",
    },
}
_REQUESTS = {"requests_total": "requests", "requests_failed_total": "failed_requests"}


class Overview:
    """The latest picture. Whoever comes while it is being taken waits for that one."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._taken_s = float("-inf")
        self._body = b""

    async def body(self, state: ApiState) -> bytes:
        async with self._lock:
            if time.monotonic() - self._taken_s >= _FRESH_S:
                self._body = orjson.dumps(await _picture(state))
                self._taken_s = time.monotonic()
            return self._body


@router.get("/cluster")
async def cluster(request: Request) -> Response:
    """Pools, queues, store tiers and hit rate, at most half a second old. 200 also while parts of
    the cluster cannot be reached: `problems` names them.
    """
    state = state_of(request)
    overview: Overview = request.app.state.overview
    return Response(
        await overview.body(state),
        media_type="application/json",
        headers={"cache-control": "no-store"},
    )


async def _picture(state: ApiState) -> dict[str, Any]:
    problems: list[str] = []
    workers: list[WorkerView] = []
    store: dict[str, float] = {}
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            workers = await state.service.workers()
            store = await state.service.store_stat()
    except PenstockError as error:
        problems.append(error.message)
    except TimeoutError:
        problems.append(f"the cluster did not answer within {_TIMEOUT_S:.0f} s")
    if not store and not problems:
        problems.append("the store node cannot be reached")
    for role in _COUNTS:
        if not any(w.role == role and not w.draining for w in workers) and not problems:
            problems.append(f"no {role} worker has registered")
    shown = sorted(workers, key=lambda w: (w.role, w.worker_id))[:_MOST_WORKERS]
    pools = {role: _pool(role, workers) for role in _COUNTS}
    prefill = pools["prefill"]
    cached, computed = prefill["cached_tokens"], prefill["computed_tokens"]
    return {
        "object": "cluster",
        "at": round(time.time(), 3),
        "model": await _model(state, workers),
        "problems": problems,
        "front": {"streams": state.streams, "max_streams": state.config.max_streams},
        "pools": pools,
        "workers": [_worker(w) for w in shown],
        "workers_left_out": len(workers) - len(shown),
        "store": _store(store),
        "prefix_cache": {
            "cached_tokens": cached,
            "computed_tokens": computed,
            "hit_rate": round(cached / (cached + computed), 6) if cached + computed else None,
        },
    }


async def _model(state: ApiState, workers: Sequence[WorkerView]) -> dict[str, Any] | None:
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            model = await state.service.model()
    except (PenstockError, TimeoutError):
        return None
    return {
        "id": model.name,
        "max_model_len": model.max_model_len,
        "system_fingerprint": model.fingerprint,
        "kv_bytes_per_token": max((w.bytes_per_token for w in workers), default=None),
    }


def _counts(worker: WorkerView) -> dict[str, int]:
    names = _COUNTS.get(worker.role, {}) | _REQUESTS
    return {name: int(worker.metrics.get(key, 0)) for key, name in names.items()}


def _worker(worker: WorkerView) -> dict[str, Any]:
    return {
        "id": worker.worker_id,
        "role": worker.role,
        "draining": worker.draining,
        "running": worker.running,
        "queued": worker.queued,
        "queued_tokens": worker.queued_tokens,
        "used_bytes": worker.used_bytes,
        "capacity_bytes": worker.capacity_bytes,
        **_counts(worker),
    }


def _pool(role: str, every: Sequence[WorkerView]) -> dict[str, int]:
    """Sums over the pool's live workers; counters begin anew when a worker does."""
    workers = [w for w in every if w.role == role]
    pool = {
        "workers": len(workers),
        "draining": sum(w.draining for w in workers),
        "running": sum(w.running for w in workers),
        "queued": sum(w.queued for w in workers),
        "queued_tokens": sum(w.queued_tokens for w in workers),
        "used_bytes": sum(w.used_bytes for w in workers),
        "capacity_bytes": sum(w.capacity_bytes for w in workers),
        **dict.fromkeys((_COUNTS[role] | _REQUESTS).values(), 0),
    }
    for worker in workers:
        for name, value in _counts(worker).items():
            pool[name] += value
    return pool


def _store(stat: Mapping[str, float]) -> dict[str, Any] | None:
    """None: it cannot be reached. Tiers are those that the node reports."""
    if not stat:
        return None
    tiers = [
        {
            "name": name,
            "used_bytes": int(stat.get(f"{prefix}used_bytes", 0)),
            "reserved_bytes": int(stat.get(f"{prefix}reserved_bytes", 0)),
            "capacity_bytes": int(stat[f"{prefix}capacity_bytes"]),
        }
        for name, prefix in _TIERS
        if f"{prefix}capacity_bytes" in stat
    ]
    return {
        "tiers": tiers,
        "index_healthy": bool(stat.get("index_healthy", True)),
        **{name: int(stat[name]) for name in _STORE_COUNTS if name in stat},
    }
