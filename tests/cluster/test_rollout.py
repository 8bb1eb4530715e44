"""`penstock rollout` under load: fresh workers, and nobody who asks notices."""

from __future__ import annotations

import re
import signal
import threading
import time
from pathlib import Path

import httpx
import pytest

from cluster.cli import main
from tests.cluster.breakage import Stream, fake_answer, prompt_of, serving, wait_for

TOKENS = 60


def workers(url: str) -> dict[int, str]:
    """Process id -> role, of all that are ready."""
    text = httpx.get(f"{url}/metrics").text
    found = re.findall(r'penstock_worker_pid\{[^}]*role="(\w+)"[^}]*\} (\S+)', text)
    return {int(float(pid)): role for role, pid in found}


class Load(threading.Thread):
    """Asks again and again until it is told to end; keeps what came."""

    def __init__(self, client: httpx.Client, seed: int) -> None:
        super().__init__(daemon=True)
        self.prompt = prompt_of(400 + seed, seed)
        self.results: list[tuple[int, ...] | str] = []
        self.over = threading.Event()
        self._client = client
        self.start()

    def run(self) -> None:
        while not self.over.is_set():
            result = Stream(self._client, self.prompt, max_tokens=TOKENS).end(within_s=60)
            trouble = result.error or result.broken or ("" if result.done else "not done")
            self.results.append(str(trouble) if trouble else tuple(result.token_ids))


def test_every_worker_is_replaced_and_every_answer_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("decode: {max_running: 8}\nlauncher: {drain_timeout_s: 20}\n")
    flags = ("--launcher", "local", "--config", str(config))
    with serving(*flags, PENSTOCK_MODEL__FAKE_DECODE_STEP_MS="20") as served:
        wait_for("both workers", lambda: len(workers(served.url)) == 2, within_s=20)
        before = workers(served.url)
        # Settings that cannot be: the old workers stay.
        config.write_text("model: {fake_draft_accuracy: 7}\n")
        assert main(["rollout", "--url", served.url, "--timeout", "1"]) == 1
        assert "still the old ones" in capsys.readouterr().err
        assert any("no rollout" in line for line in served.errors), served.errors
        assert workers(served.url) == before
        config.write_text("decode: {max_running: 5}\nlauncher: {drain_timeout_s: 20}\n")
        with httpx.Client(base_url=served.url) as client:
            loads = [Load(client, seed) for seed in range(3)]
            wait_for("answers", lambda: all(load.results for load in loads), within_s=30)
            assert main(["rollout", "--url", served.url, "--timeout", "60"]) == 0
            assert "replaced 2 workers" in capsys.readouterr().out
            after = workers(served.url)
            seen = [len(load.results) for load in loads]
            wait_for(
                "answers of the new ones",
                lambda: all(len(load.results) > n for load, n in zip(loads, seen, strict=True)),
                within_s=30,
            )
            for load in loads:
                load.over.set()
            for load in loads:
                load.join(60)
        assert sorted(after.values()) == ["decode", "prefill"] and not before.keys() & after.keys()
        for load in loads:
            expected = fake_answer(load.prompt, TOKENS)
            print(f"{len(load.results)} answers")
            assert load.results and all(result == expected for result in load.results)
        # The file was read again: the new decode worker has other slots.
        with httpx.Client(base_url=served.url) as client:
            streams = [Stream(client, prompt_of(50, s), max_tokens=100) for s in range(8)]
            wait_for("five of them", lambda: running(served.url) == 5, within_s=20)
            for stream in streams:
                stream.end(within_s=60)
        # A signal in the middle of another rollout leaves nothing behind either.
        served.signal(signal.SIGHUP)
        time.sleep(1.0)
        served.note()
        served.signal(signal.SIGTERM)
        assert served.exit_code(within_s=40) == 0
        served.assert_gone(within_s=10)


def running(url: str) -> int:
    for line in httpx.get(f"{url}/metrics").text.splitlines():
        if line.startswith("penstock_worker_running{") and 'role="decode"' in line:
            return int(float(line.split()[-1]))
    return -1


def test_a_cluster_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollout", "--url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().err.count("\n") == 1
