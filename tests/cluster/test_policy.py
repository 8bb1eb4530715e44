"""Routing is a pure function: the cheapest pair of one fingerprint, draining workers never."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.contracts import WorkerView
from cluster.policy import Charge, choose
from penstock.errors import WorkerUnavailableError


def worker(worker_id: str, role: str, **fields: object) -> WorkerView:
    base: dict[str, object] = {
        "address": f"127.0.0.1:{abs(hash(worker_id)) % 60000}",
        "pid": 1,
        "running": 0,
        "queued": 0,
        "queued_tokens": 0,
        "capacity_bytes": 1000,
        "used_bytes": 0,
        "draining": False,
        "fingerprint": b"f" * 32,
        "max_model_len": 100,
        "bytes_per_token": 1.0,
        "metrics": {},
    }
    return WorkerView(worker_id=worker_id, role=role, **{**base, **fields})  # type: ignore[arg-type]


workers = st.lists(
    st.builds(
        lambda i, role, tokens, running, used, draining, print_: worker(
            f"{role}-{i}",
            role,
            queued_tokens=tokens,
            running=running,
            used_bytes=used,
            draining=draining,
            fingerprint=print_ * 32,
        ),
        st.integers(0, 5),
        st.sampled_from(["prefill", "decode"]),
        st.integers(0, 10_000),
        st.integers(0, 20),
        st.integers(0, 1500),
        st.booleans(),
        st.sampled_from([b"a", b"b"]),
    ),
    max_size=10,
    unique_by=lambda w: w.worker_id,
)


@given(workers, st.integers(1, 2000))
def test_a_route_is_a_live_pair_of_one_fingerprint_or_a_named_error(
    pool: list[WorkerView], tokens: int
) -> None:
    live = [w for w in pool if not w.draining]
    pairs = {
        (p.worker_id, d.worker_id)
        for p in live
        for d in live
        if (p.role, d.role) == ("prefill", "decode") and p.fingerprint == d.fingerprint
    }
    if not pairs:
        with pytest.raises(WorkerUnavailableError):
            choose(pool, {}, total_tokens=tokens)
        return
    route = choose(pool, {}, total_tokens=tokens)
    assert (route.prefill.worker_id, route.decode.worker_id) in pairs
    assert route == choose(list(reversed(pool)), {}, total_tokens=tokens), "order does not matter"


@given(st.integers(2, 8), st.integers(1, 40))
def test_a_burst_is_spread_by_charges_before_any_heartbeat_tells(count: int, requests: int) -> None:
    pool = [worker(f"p{i}", "prefill") for i in range(count)]
    pool += [worker(f"d{i}", "decode", capacity_bytes=10**9) for i in range(count)]
    charges: dict[str, Charge] = {}
    taken: dict[str, int] = {w.worker_id: 0 for w in pool}
    for _ in range(requests):
        route = choose(pool, charges, total_tokens=10)
        for w in (route.prefill, route.decode):
            taken[w.worker_id] += 1
            n = taken[w.worker_id]
            charges[w.worker_id] = Charge(tokens=10 * n, requests=n, size_bytes=10 * n)
    assert max(taken.values()) - min(taken.values()) <= 1


def test_a_decode_worker_with_room_comes_before_an_idle_one_without() -> None:
    pool = [
        worker("p", "prefill"),
        worker("full", "decode", used_bytes=990),
        worker("busy", "decode", running=5, used_bytes=100),
    ]
    assert choose(pool, {}, total_tokens=50).decode.worker_id == "busy"


def test_different_fingerprints_are_named_as_the_cause() -> None:
    pool = [worker("p", "prefill"), worker("d", "decode", fingerprint=b"x" * 32)]
    with pytest.raises(WorkerUnavailableError, match="fingerprints differ"):
        choose(pool, {}, total_tokens=1)
