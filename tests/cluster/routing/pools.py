"""Pools of workers as hypothesis draws them."""

from __future__ import annotations

from hypothesis import strategies as st

from cluster.contracts import WorkerView
from cluster.policy import DECODE, PREFILL, Coefficients, RoutingPolicy
from cluster.routing.choice import open_policy

POLICIES = {name: open_policy(name) for name in RoutingPolicy}


def worker(worker_id: str, role: str, **fields: object) -> WorkerView:
    base: dict[str, object] = {
        "address": "127.0.0.1:1",
        "pid": 1,
        "running": 0,
        "queued": 0,
        "queued_tokens": 0,
        "capacity_bytes": 1_000_000,
        "used_bytes": 0,
        "draining": False,
        "fingerprint": b"f" * 32,
        "max_model_len": 1 << 20,
        "bytes_per_token": 1.0,
        "metrics": {},
    }
    return WorkerView(worker_id=worker_id, role=role, **{**base, **fields})  # type: ignore[arg-type]


def equal_pool(prefills: int, decodes: int) -> list[WorkerView]:
    """Workers that differ in nothing but their names."""
    return [worker(f"p{i:02}", PREFILL) for i in range(prefills)] + [
        worker(f"d{i:02}", DECODE, capacity_bytes=10**9) for i in range(decodes)
    ]


pools = st.lists(
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
        st.sampled_from([PREFILL, DECODE]),
        st.integers(0, 10_000),
        st.integers(0, 20),
        st.integers(0, 1_500_000),
        st.booleans(),
        st.sampled_from([b"a", b"b"]),
    ),
    max_size=10,
    unique_by=lambda w: w.worker_id,
)

coefficients = st.builds(
    Coefficients,
    token_s=st.floats(1e-6, 1e-2),
    pair_s=st.floats(0, 1e-7),
    fetch_bytes_per_s=st.floats(1e6, 1e10),
    step_s=st.floats(1e-4, 1e-1),
    sequence_s=st.floats(0, 1e-2),
    stay_s=st.floats(0, 100),
)

every_policy = st.sampled_from(list(POLICIES.values()))
