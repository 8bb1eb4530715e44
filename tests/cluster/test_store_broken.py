"""A KV store that is broken for good: each request looks for it for as long as it may
(`front.failover_timeout_s`), then fails and says so; none hangs, no token is wrong. What comes back
in time costs nothing: `test_failover.py`.
"""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.cluster.breakage import (
    Sse,
    Stream,
    body_of,
    fake_answer,
    front_metric,
    held,
    prompt_of,
    wait_for,
)
from tests.cluster.harness import Cluster, cluster

BOUND_S = 15.0
PATIENCE_S = 3.0


def _store_pid(running: Cluster) -> int:
    pid = running.launcher.store.pid  # type: ignore[attr-defined]
    assert isinstance(pid, int)
    return pid


def _assert_names_the_store(error: dict[str, object] | None) -> None:
    assert error is not None
    print("error:", error)
    assert error["code"] in ("kv_store_unavailable", "kv_integrity"), error
    assert "KV store" in str(error["message"]), error
    assert "\n" not in str(error["message"])


def _assert_new_request_fails(running: Cluster, seed: int) -> None:
    started = time.monotonic()
    body = body_of(prompt_of(600, seed), max_tokens=4)
    answer = running.client.post("/v1/completions", json=body)
    took = time.monotonic() - started
    print(f"a new request: {answer.status_code} after {took:.1f} s")
    assert answer.status_code == 503, answer.text
    assert took < BOUND_S
    _assert_names_the_store(answer.json()["error"])
    assert answer.headers["retry-after"]


def _assert_front_and_workers_are_free(running: Cluster) -> None:
    wait_for("no request in the front", lambda: not held(running, store=False), within_s=5)
    assert front_metric(running.client, "penstock_requests_running") == 0


def test_store_killed_in_mid_prefill_fails_every_request_with_its_cause() -> None:
    with cluster(
        "fake",
        model__fake_prefill_tokens_per_s=1000,
        prefill__chunk_tokens=256,
        front__failover_timeout_s=PATIENCE_S,
    ) as running:
        streams = [Stream(running, prompt_of(9000, seed), max_tokens=4) for seed in (1, 2)]
        wait_for("prefill runs", lambda: running.counter("prefill", "running") >= 2, within_s=10)
        os.kill(_store_pid(running), signal.SIGKILL)
        for stream in streams:
            result = stream.end(within_s=BOUND_S)
            print(f"in flight: status {result.status}, {result.seconds:.1f} s")
            assert result.token_ids == []
            _assert_names_the_store(result.error)
        # The prompts before were broken in flight; this one starts without a store.
        _assert_new_request_fails(running, 3)
        ready = running.client.get("/ready")
        print("ready:", ready.status_code, ready.text)
        assert ready.status_code == 503 and "store" in ready.json()["reason"]
        assert running.client.get("/health").status_code == 200
        _assert_front_and_workers_are_free(running)


def test_store_killed_in_mid_decode_never_gives_a_wrong_token() -> None:
    with cluster(
        "fake", model__fake_decode_step_ms=10, front__failover_timeout_s=PATIENCE_S
    ) as running:
        prompt = prompt_of(1500, 4)
        stream = Stream(running, prompt, max_tokens=400)
        wait_for("tokens flow", lambda: len(stream.result.token_ids) > 40, within_s=10)
        os.kill(_store_pid(running), signal.SIGKILL)
        so_far = len(stream.result.token_ids)
        result: Sse = stream.end(within_s=BOUND_S)
        got, expected = tuple(result.token_ids), fake_answer(prompt, 400)
        print(f"{so_far} tokens before the kill, {len(got)} in all, error {result.error}")
        assert got == expected[: len(got)]
        if result.error is not None:
            _assert_names_the_store(result.error)
        else:
            assert (result.finish_reason, len(got)) == ("length", 400)
        _assert_new_request_fails(running, 5)
        # What was cached before has gone with the store: the same prompt must fail as well.
        again = Stream(running, prompt, max_tokens=4).end(within_s=BOUND_S)
        _assert_names_the_store(again.error)
        _assert_front_and_workers_are_free(running)


@pytest.mark.parametrize("moment", ["before the request", "in mid-prefill"])
def test_store_that_stopped_answering_ends_requests_within_a_bound(moment: str) -> None:
    """Not dead but silent: the connection stands, nothing comes."""
    with cluster(
        "fake",
        model__fake_prefill_tokens_per_s=1000,
        prefill__chunk_tokens=256,
        front__failover_timeout_s=PATIENCE_S,
    ) as running:
        store = _store_pid(running)
        prompt = prompt_of(5000, 6)
        try:
            if moment == "before the request":
                os.kill(store, signal.SIGSTOP)
                stream = Stream(running, prompt, max_tokens=4)
            else:
                stream = Stream(running, prompt, max_tokens=4)
                wait_for("prefill", lambda: running.counter("prefill", "running") > 0, within_s=10)
                os.kill(store, signal.SIGSTOP)
            result = stream.end(within_s=45)
            print(f"{moment}: {result.seconds:.1f} s, {result.error}")
            _assert_names_the_store(result.error)
        finally:
            os.kill(store, signal.SIGCONT)
        # The workers' entries ran out meanwhile; their next heartbeat brings them back.
        is_ready = lambda: running.client.get("/ready").status_code == 200  # noqa: E731
        took = wait_for("ready again", is_ready, within_s=10)
        print(f"ready {took:.1f} s after the store went on")
        answer = running.complete(prompt, max_tokens=4, ignore_eos=True)
        expected = fake_answer(prompt, 4)
        print(f"once it answers again: {answer.token_ids}, expected {expected}")
        assert answer.token_ids == expected
