"""The Ray launcher, broken on purpose, beside a Ray cluster that is none of its business."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from cluster.launchers.common import free_port
from tests.cluster.breakage import (
    Served,
    Stream,
    descendants,
    every_process,
    fake_answer,
    loads,
    marked,
    prompt_of,
    serving,
    wait_for,
)
from tests.cluster.test_processes import answer_of, assert_answers

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RAY = ("--launcher", "ray")
_QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass
class Neighbour:
    """Somebody else's Ray cluster."""

    address: str
    pids: dict[int, int]
    """Id -> start time."""

    def assert_untouched(self) -> None:
        now = {pid: started for pid, (_, started) in every_process().items()}
        gone = [pid for pid, started in self.pids.items() if now.get(pid) != started]
        status = _ray("status", "--address", self.address)
        print(f"neighbour: {len(self.pids)} processes, gone: {gone}; status {status.returncode}")
        assert gone == []
        assert status.returncode == 0, status.stderr
        assert "1 node_" in status.stdout, status.stdout


def _ray(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    ray = Path(sys.executable).with_name("ray")
    return subprocess.run(
        [str(ray), *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **_QUIET, **env},
        check=False,
    )


@pytest.fixture(scope="module")
def neighbour() -> Iterator[Neighbour]:
    directory = Path(tempfile.mkdtemp(prefix="nb", dir="/tmp"))
    mark = f"NEIGHBOUR_MARK={directory.name}"
    port = str(free_port())
    started = _ray(
        *("start", "--head", "--port", port, "--node-ip-address", "127.0.0.1"),
        *("--temp-dir", str(directory), "--include-dashboard=false", "--num-cpus", "1"),
        *("--object-store-memory", str(80 << 20), "--disable-usage-stats"),
        NEIGHBOUR_MARK=directory.name,
    )
    assert started.returncode == 0, started.stderr
    try:
        # Its workers and agents come and go; the daemons must stay.
        every = every_process()
        daemons = [p for p, c in marked(mark).items() if "raylet/raylet" in c or "gcs_server" in c]
        assert len(daemons) >= 2
        yield Neighbour(f"127.0.0.1:{port}", {p: every[p][1] for p in daemons})
    finally:
        # Not `ray stop`, which would end every Ray on the machine.
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(directory, ignore_errors=True)


def _worker(served: Served, role: str) -> int:
    """Its pid; 0 unless it is the only one of its role that the front may send requests to."""
    text = httpx.get(f"{served.url}/metrics").text
    if f'penstock_workers{{role="{role}",state="ready"}} 1.0' not in text:
        return 0
    for line in text.splitlines():
        if line.startswith("penstock_worker_pid{") and f'role="{role}"' in line:
            return int(float(line.split()[-1]))
    return 0


@pytest.fixture(scope="module")
def beside(neighbour: Neighbour) -> Iterator[Served]:
    """Under a RAY_ADDRESS that a careless launcher would join."""
    flags = {"RAY_ADDRESS": neighbour.address, "PENSTOCK_MODEL__FAKE_DECODE_STEP_MS": "10"}
    with serving(*RAY, **flags) as served:
        yield served


def test_ray_cluster_serves_without_torch_in_any_process(beside: Served) -> None:
    assert_answers(beside, 1)
    pids = beside.note()
    torch = [command for pid, command in pids.items() if loads(pid, "libtorch")]
    print(f"{len(pids)} processes, with torch: {torch}")
    assert len(pids) >= 8 and torch == []


@pytest.mark.parametrize("role", ["decode", "prefill"])
def test_serve_replaces_a_killed_replica_and_the_stream_goes_on(beside: Served, role: str) -> None:
    prompt = prompt_of(900, 20 + len(role))
    expected = fake_answer(prompt, 900)
    killed = _worker(beside, role)
    with httpx.Client(base_url=beside.url) as client:
        stream = Stream(client, prompt, max_tokens=900)
        wait_for("tokens", lambda: len(stream.result.token_ids) > 10, within_s=20)
        os.kill(killed, signal.SIGKILL)
        started = time.monotonic()
        wait_for(
            "another replica in its place",
            lambda: _worker(beside, role) not in (0, killed),
            within_s=45,
        )
        got = answer_of(beside, prompt, 20)
        took = time.monotonic() - started
        print(f"{took:.1f} s later the same prompt gives the same tokens: {got == expected[:20]}")
        assert got == expected[:20]
        result = stream.end(within_s=60)
        print(f"the stream: {result.seconds:.1f} s, {len(result.token_ids)} tokens, {result.error}")
        assert tuple(result.token_ids) == expected and result.error is None


def test_ctrl_c_twice_leaves_nothing_and_does_not_touch_the_neighbour(
    beside: Served, neighbour: Neighbour
) -> None:
    beside.note()
    beside.signal(signal.SIGINT, group=True)
    time.sleep(0.5)
    if not beside.ended:
        beside.signal(signal.SIGINT, group=True)
    code = beside.exit_code(within_s=30)
    print(f"exit code {code}, stderr {beside.errors[-5:]}")
    assert code == 0
    beside.assert_gone(within_s=10)
    neighbour.assert_untouched()
    # Behind it Ray tells on stdout of the replicas that were killed.
    assert beside.output[0] == f"ready {beside.url}"
    assert not any("Traceback" in line for line in beside.errors), beside.errors


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_signal_leaves_nothing_of_ray(neighbour: Neighbour, name: str) -> None:
    with serving(*RAY) as served:
        assert_answers(served, 30)
        served.note()
        served.signal(getattr(signal, name))
        code = served.exit_code(within_s=30)
        assert code == (-9 if name == "SIGKILL" else 0), served.errors
        served.assert_gone(within_s=20)
        assert served.output == [f"ready {served.url}"]
    neighbour.assert_untouched()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_signal_during_start_up_leaves_nothing_of_ray(name: str) -> None:
    """Once Ray's first daemon runs: in the middle of `ray.init`."""
    with serving(*RAY, ready=False) as served:
        wait_for(
            "a daemon of Ray",
            lambda: any("gcs_server" in c for c in descendants(served.process.pid).values()),
            within_s=60,
        )
        served.note()
        served.signal(getattr(signal, name))
        code = served.exit_code(within_s=40)
        print(f"exit code {code}, stderr {served.errors[-3:]}")
        served.assert_gone(within_s=20)
        assert code == (-9 if name == "SIGKILL" else 0), served.errors
