"""The rendered commands are true: what the default chart would run is run here, and `helm test`'s
own script passes against it.
"""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator

import httpx
import pytest

from tests.helm import chart
from tests.helm.pods import Machine

pytestmark = [pytest.mark.ray, pytest.mark.slow]
GROUPS = ("prefill", "decode", "front")


def wait(what: str, holds: Callable[[], bool], machine: Machine, *, within_s: float) -> float:
    started = time.monotonic()
    while not holds():
        if time.monotonic() - started > within_s:
            raise AssertionError(f"{what}: not within {within_s:.0f} s\n{machine.logs()}")
        time.sleep(0.2)
    return time.monotonic() - started


def listens(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """The default release, up."""
    docs = chart.render()
    machine = Machine(docs, tmp_path_factory.mktemp("release"))
    try:
        redis = chart.one(docs, "Deployment", "-redis")["spec"]["template"]
        port = str(machine.ports["redis"])
        machine.start_pod(
            "redis", redis, lambda word: word.replace("--port 6379", f"--port {port}")
        )
        machine.start_ray("head")
        wait("redis", lambda: listens(machine.ports["redis"]), machine, within_s=20)
        store = chart.one(docs, "StatefulSet", "-kvstore")["spec"]["template"]
        listen = f"127.0.0.1:{machine.ports['kvstore']}"
        machine.start_pod("kvstore-0", store, lambda w: w.replace("0.0.0.0:7070", listen))
        # KubeRay holds workers back until this port answers.
        wait("Ray's head", lambda: listens(machine.gcs, machine.ip), machine, within_s=60)
        for group in GROUPS:
            machine.start_ray(group)
        wait("the dashboard", lambda: listens(machine.dashboard, machine.ip), machine, within_s=60)
        machine.deploy()
        yield machine
    finally:
        machine.close()


def test_the_release_answers_helms_test(machine: Machine) -> None:
    test = chart.one(machine.docs, "Pod", "-test")
    try:
        done = machine.run_to_end("test", test, timeout_s=200)
    except subprocess.TimeoutExpired:
        pytest.fail(f"{machine.applications()}\n{machine.logs()}")
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "answer: '4821'" in done.stdout


def test_the_probes_of_every_pod_pass(machine: Machine) -> None:
    for group in ("head", *GROUPS):
        (container,) = chart.group(machine.docs, group)["template"]["spec"]["containers"]
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            print(group, probe, machine.probe(group, container[probe]))


def test_a_key_is_asked_for(machine: Machine) -> None:
    url = f"http://127.0.0.1:{machine.ports['front']}/v1/models"
    assert httpx.get(url).status_code == 401


def test_no_secret_is_in_an_argument(machine: Machine) -> None:
    secrets = [v for each in machine.secrets.values() for v in each.values() if len(v) < 200]
    seen = machine.command_lines()
    print(f"{len(seen)} processes, {len(secrets)} secrets")
    assert len(seen) >= 15
    for line in seen:
        assert not any(secret in line for secret in secrets), line


def test_a_pod_that_goes_hands_over_first(machine: Machine) -> None:
    """Last: afterwards there is no decode worker."""
    (container,) = chart.group(machine.docs, "decode")["template"]["spec"]["containers"]
    done = machine.exec_in("decode", container["lifecycle"]["preStop"]["exec"]["command"])
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    assert "drained in" in done.stdout
    with pytest.raises(AssertionError):
        machine.probe("decode", container["readinessProbe"])
    url = f"http://127.0.0.1:{machine.ports['front']}/ready"
    assert httpx.get(url).status_code == 503
