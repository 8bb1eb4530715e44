"""A request outlives the workers that it meets: the same tokens, whoever fails, and little is
computed twice.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.cluster.breakage import (
    Stream,
    assert_idle,
    body_of,
    every_process,
    fake_answer,
    front_metric,
    prompt_of,
    wait_for,
)
from tests.cluster.harness import Cluster, cluster

PROMPT, ANSWER = 1_500, 700


@pytest.fixture(scope="module")
def pairs() -> Iterator[Cluster]:
    """Two workers of each role, 4,000 prompt tokens a second, 5 ms a token."""
    with cluster(
        "fake",
        model__fake_prefill_tokens_per_s=4000,
        model__fake_decode_step_ms=5,
        prefill__chunk_tokens=512,
        prefill__replicas=2,
        decode__replicas=2,
    ) as running:
        watching = threading.Thread(target=running.launcher.wait, daemon=True)
        watching.start()
        yield running


def busy(running: Cluster, role: str) -> list[Any]:
    """Workers of the role that have a request, as the directory shows them."""
    alive = every_process()
    return [
        w
        for w in running.workers()
        if w.worker_id.startswith(role) and w.running and w.pid in alive
    ]


def kill_the_busy(running: Cluster, role: str) -> str:
    wait_for(f"a busy {role} worker", lambda: bool(busy(running, role)), within_s=10)
    (worker,) = busy(running, role)
    os.kill(worker.pid, signal.SIGKILL)
    return str(worker.worker_id)


def whole_again(running: Cluster) -> None:
    """All four are back, so that the next test finds the same cluster."""
    wait_for(
        "four workers",
        lambda: (
            len({(w.worker_id, w.pid) for w in running.workers()}) == 4
            and all(w.pid in every_process() for w in running.workers())
        ),
        within_s=20,
    )


def undisturbed(running: Cluster, prompt: list[int], **fields: Any) -> tuple[int, ...]:
    answer = running.client.post("/v1/completions", json=body_of(prompt, **fields))
    assert answer.status_code == 200, answer.text
    return tuple(answer.json()["choices"][0]["token_ids"])


@pytest.mark.parametrize("drawn", [False, True], ids=["greedy", "sampled with penalties"])
def test_a_decode_worker_killed_in_mid_stream_changes_no_token(pairs: Cluster, drawn: bool) -> None:
    fields: dict[str, Any] = {"max_tokens": ANSWER}
    if drawn:
        fields |= {"temperature": 0.9, "seed": 11, "frequency_penalty": 0.4, "top_p": 0.9}
    prompt = prompt_of(PROMPT, 1 + drawn)
    expected = undisturbed(pairs, prompt, **fields)
    assert len(expected) == ANSWER and (drawn or expected == fake_answer(prompt, ANSWER))
    before = pairs.counter("decode", "decode_replayed_tokens_total")
    stream = Stream(pairs, prompt, **fields)
    wait_for("tokens flow", lambda: len(stream.result.token_ids) > 400, within_s=20)
    name = kill_the_busy(pairs, "decode")
    so_far = len(stream.result.token_ids)
    result = stream.end(within_s=30)
    print(f"{name} killed at token {so_far}: {len(result.token_ids)} tokens, {result.error}")
    assert (result.error, result.finish_reason, result.done) == (None, "length", True)
    assert tuple(result.token_ids) == expected
    whole_again(pairs)
    again = pairs.counter("decode", "decode_replayed_tokens_total") - before
    print(f"fed once more: {again:.0f} tokens")
    assert pairs.counter("decode", "decode_prompt_tokens_computed_total") == 0
    assert again <= 256 + 128
    assert_idle(pairs)


def test_a_decode_worker_killed_before_its_first_block_is_followed_by_prefill(
    pairs: Cluster,
) -> None:
    prompt = prompt_of(PROMPT, 5)
    stream = Stream(pairs, prompt, max_tokens=200)
    wait_for("tokens flow", lambda: len(stream.result.token_ids) > 20, within_s=20)
    kill_the_busy(pairs, "decode")
    result = stream.end(within_s=30)
    assert tuple(result.token_ids) == fake_answer(prompt, 200)
    whole_again(pairs)
    assert_idle(pairs)


def test_a_prefill_worker_killed_in_mid_prompt_resumes_at_the_last_chunk(pairs: Cluster) -> None:
    prompt = prompt_of(12_000, 7)
    stream = Stream(pairs, prompt, max_tokens=20)
    wait_for("a busy prefill worker", lambda: bool(busy(pairs, "prefill")), within_s=10)
    computed = {
        w.worker_id: w.metrics["prefill_computed_tokens_total"]
        for w in pairs.workers()
        if w.worker_id.startswith("prefill")
    }
    held = pairs.stat().objects
    wait_for("half is read", lambda: pairs.stat().objects > held + 20, within_s=10)
    name = kill_the_busy(pairs, "prefill")
    result = stream.end(within_s=30)
    assert tuple(result.token_ids) == fake_answer(prompt, 20), result
    (other,) = computed.keys() - {name}

    def its_tokens() -> float:
        now = {
            w.worker_id: w.metrics["prefill_computed_tokens_total"]
            for w in pairs.workers()
            if w.worker_id.startswith("prefill")
        }
        return now.get(other, 0.0) - computed[other]

    # It tells with its heartbeat.
    wait_for("the other one has counted", lambda: its_tokens() > 0, within_s=5)
    rest = its_tokens()
    print(f"{name} killed; the other one computed {rest:.0f} of {len(prompt)} tokens")
    # 16 blocks and more had been committed, all but the last of them with their states.
    assert 0 < rest <= len(prompt) - 16 * 256
    assert front_metric(pairs.client, "penstock_prefill_failovers_total") >= 1
    assert front_metric(pairs.client, "penstock_prefill_failover_lost_tokens_total") == 0
    whole_again(pairs)
    assert_idle(pairs)


def test_a_store_that_dies_costs_time_and_no_stream(pairs: Cluster) -> None:
    """Its memory is gone: what was read is read again; answers that are being written go on."""
    prompts = [prompt_of(9_000, 21), prompt_of(700, 22)]
    writing = Stream(pairs, prompts[1], max_tokens=900)
    wait_for("tokens flow", lambda: len(writing.result.token_ids) > 100, within_s=20)
    reading = Stream(pairs, prompts[0], max_tokens=20)
    wait_for("a busy prefill worker", lambda: bool(busy(pairs, "prefill")), within_s=10)
    os.kill(pairs.launcher.store.pid, signal.SIGKILL)  # type: ignore[attr-defined]
    late = Stream(pairs, prompt_of(500, 23), max_tokens=20)
    results = [stream.end(within_s=40) for stream in (writing, reading, late)]
    assert [result.error for result in results] == [None] * 3
    assert tuple(results[0].token_ids) == fake_answer(prompts[1], 900)
    assert tuple(results[1].token_ids) == fake_answer(prompts[0], 20)
    assert tuple(results[2].token_ids) == fake_answer(prompt_of(500, 23), 20)
    print("seconds:", [round(result.seconds, 1) for result in results])
    whole_again(pairs)
    assert_idle(pairs)


def test_the_successor_of_a_dead_decode_worker_may_die_too(pairs: Cluster) -> None:
    prompt = prompt_of(PROMPT, 31)
    stream = Stream(pairs, prompt, max_tokens=1_200)
    for at in (50, 500):
        wait_for("tokens flow", lambda at=at: len(stream.result.token_ids) > at, within_s=20)
        # Not the one that the directory still shows though it is dead.
        wait_for("one is busy", lambda: len(busy(pairs, "decode")) == 1, within_s=10)
        kill_the_busy(pairs, "decode")
    result = stream.end(within_s=40)
    assert tuple(result.token_ids) == fake_answer(prompt, 1_200), result.error
    whole_again(pairs)
    assert_idle(pairs)
