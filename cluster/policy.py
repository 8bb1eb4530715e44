"""Which workers a request goes to: pure functions from the directory's picture to a choice.

Work is charged to a worker at the decision, not when its next heartbeat says so; otherwise a burst
of requests all see the same idle worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cluster.contracts import WorkerView
from penstock.errors import WorkerUnavailableError

PREFILL, DECODE = "prefill", "decode"


@dataclass(frozen=True)
class Charge:
    """Work given to a worker that its heartbeat may not show yet."""

    tokens: int = 0
    requests: int = 0
    size_bytes: int = 0


@dataclass(frozen=True)
class Route:
    """A prefill and a decode worker of one fingerprint."""

    prefill: WorkerView
    decode: WorkerView


def prefill_cost(worker: WorkerView, charge: Charge) -> tuple[int, int]:
    """Tokens in front of a new request, then requests. Less is better."""
    return worker.queued_tokens + charge.tokens, worker.running + worker.queued + charge.requests


def decode_cost(worker: WorkerView, charge: Charge, need_bytes: int) -> tuple[bool, int, float]:
    """A worker with room comes first, then the smaller batch, then the emptier cache."""
    used = worker.used_bytes + charge.size_bytes
    full = used + need_bytes > worker.capacity_bytes
    return full, worker.running + worker.queued + charge.requests, used / worker.capacity_bytes


def choose(
    workers: Sequence[WorkerView],
    charges: Mapping[str, Charge],
    *,
    total_tokens: int,
    avoid: frozenset[str] = frozenset(),
) -> Route:
    """The cheapest pair of one fingerprint. Draining workers and those in `avoid` get nothing new.

    Raises `WorkerUnavailableError` that names the missing role. Ties go to the lowest worker id.
    """
    able = [w for w in workers if not w.draining and w.worker_id not in avoid]
    prefills = [w for w in able if w.role == PREFILL]
    decodes = [w for w in able if w.role == DECODE]
    for role, found in ((PREFILL, prefills), (DECODE, decodes)):
        if not found:
            raise WorkerUnavailableError(
                f"no {role} worker is registered in the directory; it may be starting or have "
                "crashed, see /ready"
            )
    none = Charge()

    def prefill_key(worker: WorkerView) -> tuple[object, ...]:
        return *prefill_cost(worker, charges.get(worker.worker_id, none)), worker.worker_id

    def decode_key(worker: WorkerView) -> tuple[object, ...]:
        need = int(total_tokens * worker.bytes_per_token)
        charge = charges.get(worker.worker_id, none)
        return *decode_cost(worker, charge, need), worker.worker_id

    by_fingerprint = {w.fingerprint for w in prefills} & {w.fingerprint for w in decodes}
    if not by_fingerprint:
        raise WorkerUnavailableError(
            "the prefill and the decode pool serve different models or formats (their fingerprints "
            "differ); restart the older pool"
        )
    decode = min((w for w in decodes if w.fingerprint in by_fingerprint), key=decode_key)
    prefill = min((w for w in prefills if w.fingerprint == decode.fingerprint), key=prefill_key)
    return Route(prefill, decode)
