"""`cluster.autoscale` as the policy that Ray Serve asks how many replicas a pool should have.

Serve's controller holds one object for each pool and calls it many times a second; it must never
wait. So a thread reads the directory now and then, and the call decides on the last picture. A
picture that is old decides nothing (`stale_s`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from cluster.autoscale import (
    AutoscalingSection,
    Memory,
    Signals,
    decode_signals,
    prefill_signals,
    target,
)
from cluster.policy import PREFILL
from penstock.peers import Peers
from protos.penstock.kv.v1 import kv_pb2

_log = logging.getLogger(__name__)
_READ_EVERY_S = 1.0
_RPC_TIMEOUT_S = 2.0
# Serve has delays, factors and averages of its own; they are off (`serve_config`).
_NO_DELAY_S = 0.0


@dataclass(frozen=True)
class Picture:
    """The pool's live workers, those that drain left out, and when they were read."""

    workers: Sequence[kv_pb2.Worker]
    read_s: float


def signals_of(
    section: AutoscalingSection, role: str, picture: Picture, *, now_s: float
) -> Signals:
    """What a picture says. Pure."""
    age_s = now_s - picture.read_s
    workers = picture.workers
    if role == PREFILL:
        return prefill_signals(
            section,
            queued_tokens=[worker.queued_tokens for worker in workers],
            tokens_per_s=[worker.metrics.get("tokens_per_s", 0.0) for worker in workers],
            age_s=age_s,
        )
    return decode_signals(
        section,
        token_gaps_s=[
            worker.metrics.get("step_s", 0.0) if worker.running else 0.0 for worker in workers
        ],
        use=[_use(worker) for worker in workers],
        age_s=age_s,
    )


def _use(worker: kv_pb2.Worker) -> float:
    memory = worker.used_bytes / max(1, worker.capacity_bytes)
    slots = worker.metrics.get("slots", 0.0)
    asked = worker.running + worker.queued
    return max(memory, asked / slots if slots else 0.0)


class ServePolicy:
    """Serve makes it from `kwargs` (plain values: they travel as JSON) and calls it."""

    def __init__(
        self,
        section: dict[str, Any],
        role: str,
        store_address: str,
        peers: dict[str, Any] | None = None,
        read: Callable[[], Sequence[kv_pb2.Worker]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.section = AutoscalingSection.model_validate(section)
        self.role = role
        self._read = read or _Directory(role, store_address, _peers(peers))
        self._clock = clock
        self._picture = Picture((), float("-inf"))
        self._memory = Memory()
        self._said = ""
        if read is None:
            threading.Thread(target=self._watch, name=f"scale-{role}", daemon=True).start()

    def look(self) -> None:
        """Read the directory now. A directory that does not answer leaves the old picture."""
        try:
            self._picture = Picture(self._read(), self._clock())
        except Exception as error:  # A thread that ends would freeze the pool without a word.
            _log.warning("the %s pool keeps its size: no signals (%s)", self.role, error)

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """`context`: Serve's AutoscalingContext."""
        now_s = self._clock()
        current = int(context.target_num_replicas)
        found = target(
            self.section,
            current=current,
            signals=signals_of(self.section, self.role, self._picture, now_s=now_s),
            memory=self._memory,
            now_s=now_s,
        )
        self._memory = found.memory
        if found.workers != current and found.reason != self._said:
            _log.info("%s: %d to %d workers, %s", self.role, current, found.workers, found.reason)
        self._said = found.reason
        return found.workers, {}

    def _watch(self) -> None:
        while True:
            self.look()
            time.sleep(_READ_EVERY_S)


def _peers(values: dict[str, Any] | None) -> Peers:
    """None: as the environment of this process says, where a pod has its secrets."""
    if values is not None:
        return Peers.model_validate(values)
    from cluster.config import resolve

    return resolve().config.tls


class _Directory:
    """Live workers of one role, from a thread."""

    def __init__(self, role: str, address: str, peers: Peers) -> None:
        self._role = kv_pb2.WORKER_ROLE_PREFILL if role == PREFILL else kv_pb2.WORKER_ROLE_DECODE
        self._address = address
        self._peers = peers

    def __call__(self) -> Sequence[kv_pb2.Worker]:
        import asyncio

        from kvstore.directory_client import DirectoryClient

        async def read() -> list[kv_pb2.Worker]:
            client = DirectoryClient(
                self._address, call_timeout_s=_RPC_TIMEOUT_S, peers=self._peers
            )
            try:
                return await client.list()
            finally:
                await client.close()

        workers = asyncio.run(read())
        return [w for w in workers if w.role == self._role and not w.draining]


def serve_config(
    section: AutoscalingSection,
    *,
    role: str,
    replicas: int,
    store_address: str,
    peers: Peers | None,
) -> Any:
    """Serve's AutoscalingConfig for a pool. `peers` None: the controller's environment has them."""
    from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

    policy = cast(Any, AutoscalingPolicy)(
        policy_function="cluster.scaler:ServePolicy",
        policy_kwargs={
            "section": section.model_dump(mode="json"),
            "role": role,
            "store_address": store_address,
            "peers": None if peers is None else peers.model_dump(mode="json"),
        },
    )
    return AutoscalingConfig(
        min_replicas=section.min_replicas,
        max_replicas=section.max_replicas,
        initial_replicas=min(max(replicas, section.min_replicas), section.max_replicas),
        upscale_delay_s=_NO_DELAY_S,
        downscale_delay_s=_NO_DELAY_S,
        policy=policy,
    )
