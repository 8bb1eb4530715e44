"""Workers of several ranks in a whole cluster: the same answers, and nothing hangs or stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.cluster.breakage import Served, Stream, fake_answer, prompt_of, serving, wait_for
from tests.cluster.harness import cluster
from tests.cluster.test_processes import answer_of, assert_answers

PROMPT = [(i * 37) % 40 + 60 for i in range(700)]
EXACT = {"model__kv_cache_dtype": "fp32", "model__dtype": "float32"}


def followers(served: Served) -> list[int]:
    return [pid for pid, command in served.pids.items() if "model.ranks" in command]


def test_two_ranks_answer_as_one_does() -> None:
    """Prefill cut in tensors and context, decode in tensors: blocks cross between them."""
    answers = []
    for settings in ({}, {"parallel__tensor": 2, "parallel__prefill_context": 2}):
        with cluster("ledger", **EXACT, **settings) as running:
            cold = running.complete(PROMPT, max_tokens=12, ignore_eos=True)
            warm = running.complete(PROMPT, max_tokens=12, ignore_eos=True)
            assert warm.same_bits(cold)
            assert warm.cached_tokens >= 512
            assert running.counter("decode", "decode_prompt_tokens_computed_total") == 0
            answers.append(cold)
    assert answers[0].token_ids == answers[1].token_ids


def test_killed_ranks_are_replaced_with_their_workers_and_the_stream_goes_on() -> None:
    with serving(
        *("--launcher", "local", "--tensor-parallel-size", "2"),
        PENSTOCK_MODEL__FAKE_DECODE_STEP_MS="10",
    ) as served:
        assert_answers(served, 1)
        known = followers(served)
        assert len(known) == 2
        prompt = prompt_of(900, 23)
        with httpx.Client(base_url=served.url) as client:
            stream = Stream(client, prompt, max_tokens=1000)
            wait_for("tokens", lambda: len(stream.result.token_ids) > 10, within_s=20)
            for pid in known:
                os.kill(pid, signal.SIGKILL)
            result = stream.end(within_s=90)
        print(f"{result.seconds:.1f} s, {len(result.token_ids)} tokens, {result.error}")
        assert result.error is None
        assert tuple(result.token_ids) == fake_answer(prompt, 1000)
        started = time.monotonic()
        wait_for(
            "new followers",
            lambda: len([pid for pid in followers(served) if pid not in known]) == 2,
            within_s=30,
        )
        wait_for("ready again", lambda: _ready(served), within_s=30)
        assert answer_of(served, prompt, 20) == fake_answer(prompt, 20)
        print(f"answers again {time.monotonic() - started:.1f} s later")


def _ready(served: Served) -> bool:
    return httpx.get(f"{served.url}/ready").status_code == 200


def rank_actors(served: Served) -> list[int]:
    """Ray names a process by its actor's class and the call that it is in."""
    return [pid for pid, command in served.pids.items() if "ray::Rank.run" in command]


@pytest.mark.ray
@pytest.mark.slow
def test_ray_replicas_of_two_rank_actors_serve_and_leave_nothing() -> None:
    """Rank 1 of each replica is an actor in its placement group; a killed one is replaced with its
    replica, and a killed launcher leaves none.
    """
    with serving("--launcher", "ray", "--tensor-parallel-size", "2") as served:
        assert_answers(served, 3)
        known = rank_actors(served)
        assert len(known) == 2
        assert not followers(served)
        for pid in known:
            os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        wait_for(
            "new rank actors",
            lambda: len([pid for pid in rank_actors(served) if pid not in known]) == 2,
            within_s=60,
        )
        wait_for("ready again", lambda: _ready(served), within_s=30)
        print(f"two replicas replaced in {time.monotonic() - started:.1f} s")
        wait_for("an answer", lambda: _answers(served), within_s=30)
        served.note()
        served.signal(signal.SIGKILL)
        served.exit_code(within_s=30)
        served.assert_gone(within_s=20)


def _answers(served: Served) -> bool:
    prompt = prompt_of(300, 5)
    try:
        return answer_of(served, prompt, 8) == fake_answer(prompt, 8)
    except (httpx.HTTPError, KeyError, AssertionError):
        # Until the front has heard of both new workers.
        return False


@pytest.mark.parametrize("name", ["SIGINT", "SIGKILL"])
def test_signal_leaves_no_rank(name: str) -> None:
    flags = ("--launcher", "local", "--expert-parallel-size", "2")
    with serving(*flags) as served:
        assert len(followers(served)) == 2
        served.note()
        served.signal(getattr(signal, name), group=name == "SIGINT")
        served.exit_code(within_s=30)
        served.assert_gone(within_s=10)


def test_logits_over_ranks_agree_with_one_rank(tmp_path: Path) -> None:
    tokens = tmp_path / "tokens.json"
    tokens.write_text(json.dumps(PROMPT[:400]))
    found = []
    for flags in ((), ("--tensor-parallel-size", "2"), ("--prefill-context-parallel-size", "2")):
        out = tmp_path / "out.safetensors"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "cluster.cli", "logits", "ledger"),
                *("--tokens", str(tokens), "--out", str(out), "--prefill-tokens", "390"),
                *("--kv-cache-dtype", "fp32", "--dtype", "float32", *flags),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        found.append(load_file(out)["logits"])
    one, tensor, context = found
    print(f"tensor: {np.abs(tensor - one).max():.1e} of {np.abs(one).max():.1f}")
    assert np.abs(tensor - one).max() <= 1e-5 * max(1.0, float(np.abs(one).max()))
    assert np.array_equal(tensor.argmax(1), one.argmax(1))
    assert np.array_equal(context, one)
