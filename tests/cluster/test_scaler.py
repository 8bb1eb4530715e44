"""The autoscaler as Serve holds it: made of plain values, never waiting, still when it is blind."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest

from cluster.autoscale import AutoscalingSection
from cluster.config import ClusterConfig, resolve
from cluster.launchers.ray import RayLauncher
from cluster.scaler import Picture, ServePolicy, serve_config, signals_of
from penstock.errors import UsageError
from penstock.peers import Peers
from protos.penstock.kv.v1 import kv_pb2

FAST = {"max_replicas": 4, "use": 0.5, "down_hold_s": 0, "down_pause_s": 0, "up_pause_s": 0}


@dataclass
class Context:
    """What of Serve's AutoscalingContext the policy reads."""

    target_num_replicas: int


@dataclass
class Pool:
    """A directory that can be silent, and a clock."""

    workers: list[kv_pb2.Worker] = field(default_factory=list)
    now_s: float = 0.0
    silent: bool = False

    def read(self) -> list[kv_pb2.Worker]:
        if self.silent:
            raise TimeoutError("nobody answers")
        return self.workers

    def policy(self, role: str, **changes: Any) -> ServePolicy:
        section = AutoscalingSection(**(FAST | changes)).model_dump(mode="json")
        return ServePolicy(section, role, "nowhere:1", read=self.read, clock=lambda: self.now_s)


def decoding(running: int, *, slots: int = 4, step_s: float = 0.01) -> kv_pb2.Worker:
    return kv_pb2.Worker(
        running=running, capacity_bytes=100, metrics={"slots": slots, "step_s": step_s}
    )


def test_it_rises_with_load_falls_without_and_keeps_still_when_it_is_blind() -> None:
    pool = Pool([decoding(4)])
    policy = pool.policy("decode")
    assert policy(Context(1))[0] == 1, "nothing has been read yet"
    policy.look()
    assert policy(Context(1))[0] == 2
    # The second one has been asked for and has not come: half of a pool tells nothing.
    assert policy(Context(2))[0] == 2
    pool.workers = [decoding(0), decoding(0)]
    pool.silent = True
    policy.look()
    pool.now_s = 60.0
    assert policy(Context(2))[0] == 2, "the last picture is old"
    pool.silent = False
    policy.look()
    assert policy(Context(2))[0] == 1


def test_what_workers_tell_becomes_signals() -> None:
    section = AutoscalingSection(queue_s=2.0, token_gap_ms=50.0, use=0.5)
    prefill = [
        kv_pb2.Worker(queued_tokens=8000, metrics={"tokens_per_s": 1000.0}),
        kv_pb2.Worker(queued_tokens=0, metrics={}),
    ]
    found = signals_of(section, "prefill", Picture(prefill, 5.0), now_s=6.0)
    assert (found.workers, found.age_s, found.loads) == (2, 1.0, (2.0,))
    # The step of a worker that does nothing is of long ago.
    idle = [decoding(0, step_s=9.0), decoding(2, step_s=0.1)]
    found = signals_of(section, "decode", Picture(idle, 0.0), now_s=0.0)
    assert found.loads == (pytest.approx(2.0), pytest.approx(0.5))


def test_serve_gets_a_policy_that_survives_its_pickling_and_adds_no_delay_of_its_own() -> None:
    section = AutoscalingSection(enabled=True, min_replicas=2, max_replicas=6)
    config = serve_config(
        section, role="decode", replicas=1, store_address="127.0.0.1:9", peers=Peers()
    )
    assert (config.min_replicas, config.initial_replicas, config.max_replicas) == (2, 2, 6)
    assert config.upscale_delay_s == config.downscale_delay_s == 0
    kwargs = json.loads(json.dumps(config.policy.policy_kwargs))
    kind = config.policy.get_policy()
    policy = kind(**kwargs)
    # Nobody listens there: it stays as it is, but inside the bounds.
    assert [policy(Context(count))[0] for count in (1, 3, 9)] == [2, 3, 6]


def test_a_pool_that_is_not_scaled_has_its_size_and_secrets_stay_out_of_serves_store() -> None:
    section = AutoscalingSection(enabled=True)
    config = serve_config(section, role="prefill", replicas=1, store_address="x:1", peers=None)
    assert config.policy.policy_kwargs["peers"] is None
    for flags in ({}, {"prefill.autoscaling.enabled": True, "prefill.autoscaling.max_replicas": 9}):
        wanted = RayLauncher(resolve({"model.model": "fake", **flags}, env={}).config)
        assert wanted._cpus_wanted() == (13 if flags else 5)


def test_wrong_bounds_name_the_setting() -> None:
    env = {"PENSTOCK_DECODE__AUTOSCALING__MIN_REPLICAS": "9"}
    with pytest.raises(UsageError, match="max_replicas \\(4\\) must not be below min_replicas"):
        resolve(env=env)
    assert ClusterConfig().decode.autoscaling.enabled is False
