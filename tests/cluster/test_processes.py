"""What `penstock serve` starts ends with it: no process, port, shared memory or file stays.

The `local` launcher; `test_ray.py` asks the same of Ray.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from cluster.launchers.common import free_port
from tests.cluster.breakage import (
    Served,
    Stream,
    assert_idle,
    body_of,
    fake_answer,
    loads,
    prompt_of,
    serving,
    wait_for,
)
from tests.cluster.harness import Cluster, cluster
from tests.kvstore.redis_server import running_redis

LOCAL = ("--launcher", "local")
GONE_WITHIN_S = 10.0


def answer_of(served: Served, prompt: list[int], tokens: int = 4) -> tuple[int, ...]:
    body = body_of(prompt, max_tokens=tokens)
    answer = httpx.post(f"{served.url}/v1/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return tuple(answer.json()["choices"][0]["token_ids"])


def assert_answers(served: Served, seed: int) -> None:
    prompt = prompt_of(600, seed)
    got, expected = answer_of(served, prompt), fake_answer(prompt, 4)
    print(f"tokens {got}, expected {expected}")
    assert got == expected


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_a_signal_under_load_leaves_nothing_behind(name: str) -> None:
    with serving(*LOCAL, PENSTOCK_MODEL__FAKE_DECODE_STEP_MS="10") as served:
        assert_answers(served, 1)
        pids = served.note()
        print("\n".join(pids.values()))
        torch = [command for pid, command in pids.items() if loads(pid, "libtorch")]
        print(f"{len(pids)} processes, with torch: {torch}")
        # Store, prefill, decode and front at least; the launcher itself carries the mark too.
        assert len(pids) >= 5 and torch == []
        assert len(served.ports) >= 4
        with httpx.Client(base_url=served.url) as client:
            stream = Stream(client, prompt_of(500, 2), max_tokens=5000)
            wait_for("tokens flow", lambda: len(stream.result.token_ids) > 5, within_s=10)
            served.signal(getattr(signal, name), group=name == "SIGINT")
            if name == "SIGINT":
                time.sleep(0.2)
                served.signal(signal.SIGINT, group=True)
            code = served.exit_code(within_s=GONE_WITHIN_S)
            assert code == (-9 if name == "SIGKILL" else 0), served.errors
            served.assert_gone(within_s=GONE_WITHIN_S)
            result = stream.end(within_s=GONE_WITHIN_S)
        print(f"the open stream: error {result.error}, broken {result.broken!r}")
        assert not result.done and (result.error or result.broken)
        assert not any("Traceback" in line for line in served.errors), served.errors


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
@pytest.mark.parametrize("children", [2, 4])
def test_a_signal_during_start_up_leaves_nothing_behind(name: str, children: int) -> None:
    """As soon as the launcher has so many children."""
    with serving(*LOCAL, ready=False) as served:
        # The launcher carries the mark as well, so one more.
        wait_for("children", lambda: len(served.pids) > children, within_s=30)
        served.note()
        served.signal(getattr(signal, name))
        code = served.exit_code(within_s=GONE_WITHIN_S)
        assert code == (-9 if name == "SIGKILL" else 0), served.errors
        served.assert_gone(within_s=GONE_WITHIN_S)
        assert not any("Traceback" in line for line in served.errors), served.errors


def _store_of(served: Served) -> int | None:
    found = [p for p, command in served.note().items() if "-m kvstore" in command]
    return found[0] if found else None


def _kill_store_until_given_up(served: Served) -> None:
    """Each new one before it is ready."""

    def given_up() -> bool:
        if (store := _store_of(served)) is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(store, signal.SIGKILL)
        # Then it stops the front first of all.
        return not any("-m cluster.front" in command for command in served.note().values())

    wait_for("the launcher gives up", given_up, within_s=40)


def test_a_store_node_that_dies_is_started_again_where_it_was() -> None:
    with serving(*LOCAL) as served:
        assert_answers(served, 5)
        before = _store_of(served)
        assert before is not None
        os.kill(before, signal.SIGKILL)
        assert_answers(served, 6)
        assert _store_of(served) not in (None, before)
        served.signal(signal.SIGTERM)
        assert served.exit_code(within_s=GONE_WITHIN_S) == 0
        served.assert_gone(within_s=GONE_WITHIN_S)
        assert not any("Traceback" in line for line in served.errors)


def test_a_store_node_that_keeps_dying_ends_the_cluster_with_one_sentence() -> None:
    with serving(*LOCAL) as served:
        _kill_store_until_given_up(served)
        assert served.exit_code(within_s=GONE_WITHIN_S) == 1
        served.assert_gone(within_s=GONE_WITHIN_S)
        print(served.errors)
        (sentence,) = [e for e in served.errors if e.startswith("penstock: ")]
        assert "kvstore keeps ending" in sentence
        assert not any("Traceback" in line for line in served.errors)


def test_ctrl_c_while_a_failed_cluster_stops_does_no_harm() -> None:
    with serving(*LOCAL) as served:
        pids = served.note()
        (decode,) = [p for p, command in pids.items() if "-m decode" in command]
        # A worker that does not end by itself makes the clean-up last.
        os.kill(decode, signal.SIGSTOP)
        _kill_store_until_given_up(served)
        time.sleep(0.5)
        print(f"Ctrl-C in the middle of the clean-up: {not served.ended}")
        assert not served.ended
        served.signal(signal.SIGINT, group=True)
        assert served.exit_code(within_s=GONE_WITHIN_S) == 1
        served.assert_gone(within_s=GONE_WITHIN_S)
        print(served.errors)
        assert any("keeps ending" in line for line in served.errors)
        assert not any("Traceback" in line for line in served.errors)


def test_two_clusters_at_once_and_one_port_twice_in_a_row() -> None:
    port = free_port()
    with serving(*LOCAL, port=port) as first, serving(*LOCAL) as second:
        for number, served in enumerate((first, second)):
            assert_answers(served, 10 + number)
            workers = httpx.get(f"{served.url}/metrics").text.count("penstock_worker_pid{")
            print(f"cluster {number} sees {workers} workers")
            assert workers == 2
        first.note()
        second.note()
        assert not first.ports & second.ports
        first.signal(signal.SIGTERM)
        assert first.exit_code(within_s=GONE_WITHIN_S) == 0
        first.assert_gone(within_s=GONE_WITHIN_S)
        assert_answers(second, 12)
        with serving(*LOCAL, port=port) as again:
            assert_answers(again, 13)


# Workers


@pytest.fixture(scope="module")
def watched() -> Iterator[Cluster]:
    """A cluster whose launcher watches its children, as `penstock serve` does."""
    with cluster(
        "fake", model__fake_prefill_tokens_per_s=4000, model__fake_decode_step_ms=10
    ) as running:
        watching = threading.Thread(target=running.launcher.wait, daemon=True)
        watching.start()
        yield running


@pytest.mark.parametrize("role", ["decode", "prefill", "front"])
def test_a_killed_process_comes_back_and_costs_no_stream_that_its_client_still_reads(
    watched: Cluster, role: str
) -> None:
    seed = {"decode": 30, "prefill": 40, "front": 50}[role]
    prompt = prompt_of(12_000 if role == "prefill" else 900, seed)
    launcher = watched.launcher
    child = launcher.front if role == "front" else launcher.workers[f"{role}-0"]  # type: ignore[attr-defined]
    killed = child.pid
    stream = Stream(watched, prompt, max_tokens=500)
    if role == "prefill":
        wait_for("prefill", lambda: watched.counter("prefill", "running") == 1, within_s=10)
    else:
        wait_for("tokens", lambda: len(stream.result.token_ids) > 10, within_s=10)
    os.kill(killed, signal.SIGKILL)
    at = time.monotonic()
    result = stream.end(within_s=40)
    print(f"{role} killed: {time.monotonic() - at:.1f} s, {result.error} {result.broken}")
    expected = fake_answer(prompt, 500)
    if role == "front":
        assert result.broken
        assert tuple(result.token_ids) == expected[: len(result.token_ids)]
    else:
        # There is one worker of the role: its successor goes on.
        assert result.error is None
        assert tuple(result.token_ids) == expected
    wait_for(
        "another process in its place",
        lambda: child.pid not in (None, killed) and _is_ready(watched),
        within_s=15,
    )
    took = _until_it_answers(watched, prompt, expected[:20])
    print(f"the same prompt again: the same 20 tokens, {took:.1f} s after that")
    # What the dead process had leased goes with its owner or, at the latest, with its TTL of 30 s.
    freed = assert_idle(watched, within_s=35)
    print(f"everything free {freed:.1f} s later")


def _is_ready(running: Cluster) -> bool:
    try:
        return running.client.get("/ready").status_code == 200
    except httpx.HTTPError:
        return False


def _until_it_answers(running: Cluster, prompt: list[int], expected: tuple[int, ...]) -> float:
    """A request may still meet the dead worker's entry; then it says so and may come again."""
    started = time.monotonic()
    while True:
        body = body_of(prompt, max_tokens=len(expected))
        answer = running.client.post("/v1/completions", json=body)
        if answer.status_code == 200:
            assert tuple(answer.json()["choices"][0]["token_ids"]) == expected
            return time.monotonic() - started
        print("refused:", answer.text)
        assert answer.status_code == 503 and answer.headers["retry-after"]
        assert time.monotonic() - started < 10
        time.sleep(0.5)


# Redis


def test_redis_flushed_and_killed_under_load_is_no_error_to_any_client() -> None:
    with running_redis() as redis, cluster("fake", kvstore__redis_url=redis.url) as running:
        assert running.stat().index_backend == "redis"
        stop = threading.Event()
        faults: list[str] = []
        answered = [0]

        def ask(worker: int) -> None:
            number = 0
            while not stop.is_set():
                number += 1
                # Every second prompt extends one that was asked before.
                prompt = prompt_of(300 + 256 * (number % 4), 100 + worker)
                body = body_of(prompt, max_tokens=8)
                answer = running.client.post("/v1/completions", json=body)
                if answer.status_code != 200:
                    faults.append(answer.text)
                elif tuple(answer.json()["choices"][0]["token_ids"]) != fake_answer(prompt, 8):
                    faults.append(f"wrong tokens for {worker}/{number}")
                answered[0] += 1

        askers = [threading.Thread(target=ask, args=(n,)) for n in range(3)]
        for asker in askers:
            asker.start()
        counts = []
        for step in (lambda: None, lambda: redis.command(b"FLUSHALL"), redis.kill, redis.start):
            step()
            time.sleep(2.0)
            counts.append(answered[0])
        stop.set()
        for asker in askers:
            asker.join(20)
        print(f"answers after warm-up, FLUSHALL, kill, restart: {counts}; faults: {faults[:3]}")
        assert faults == []
        assert all(a < b for a, b in zip([0, *counts], counts, strict=False))
        wait_for("the index is healthy", lambda: running.stat().index_healthy, within_s=10)
        assert_idle(running)
