"""Dockerfile and compose.yaml: what can be held against chart and product without a container."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.launchers.common import free_port
from tests.helm import chart

DOCKERFILE = (chart.ROOT / "Dockerfile").read_text()
_BIN = Path(sys.executable).parent


def constraint(name: str) -> str:
    lines = (chart.ROOT / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{name}=="))


def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((chart.ROOT / "compose.yaml").read_text()))


def stages() -> dict[str, str]:
    parts = re.split(r"^FROM (?=\S+ AS )", DOCKERFILE, flags=re.MULTILINE)[1:]
    return {re.match(r"\S+ AS (\S+)", part)[1]: part for part in parts}  # type: ignore[index]


def test_the_image_has_the_ray_that_kuberay_is_told() -> None:
    values = yaml.safe_load((chart.CHART / "values.yaml").read_text())
    service = chart.one(chart.render(), "RayService")
    assert values["ray"]["version"] == constraint("ray")
    assert service["spec"]["rayClusterConfig"]["rayVersion"] == constraint("ray")
    for name in ("build-cpu", "build-cuda"):
        installs = re.findall(r"pip install (.+)", stages()[name])
        assert all("constraints.txt" in line for line in installs), installs
        assert not re.search(r"ray[=<>~]", stages()[name])
        # Else telemetry.otlp_endpoint of the chart would be a setting without its exporter.
        assert '".[otel]"' in installs[-1]
    assert "^triton==" in stages()["build-cuda"]
    assert "ray==" in (chart.ROOT / "constraints.txt").read_text()


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_an_image_runs_as_the_charts_user_and_leaves_the_command_to_kuberay(name: str) -> None:
    text = stages()[name]
    user = chart.group(chart.render(), "head")["template"]["spec"]["securityContext"]["runAsUser"]
    assert f"USER {user}:{user}" in text
    assert f"--uid {user}" in text
    assert "ENTRYPOINT []" in text
    assert "bash" in text
    assert "COPY --from=build-" in text, "no build tools and no sources in what runs"


def test_bases_are_named_by_version_and_may_be_named_by_digest() -> None:
    bases = re.findall(r"^ARG (\w+_IMAGE)=(\S+)", DOCKERFILE, re.MULTILINE)
    assert [name for name, _ in bases] == ["PYTHON_IMAGE", "CUDA_IMAGE"]
    for _, image in bases:
        tag = image.rpartition(":")[2]
        assert re.match(r"\d+\.\d+", tag), image
    used = set(re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE))
    assert used == {"${PYTHON_IMAGE}", "${CUDA_IMAGE}", "cpu"}
    assert DOCKERFILE.rstrip().endswith("FROM cpu")


def test_the_charts_tag_is_one_that_the_dockerfile_names() -> None:
    image = chart.group(chart.render(), "head")["template"]["spec"]["containers"][0]["image"]
    assert image.rpartition(":")[2] in DOCKERFILE


def test_compose_is_as_tight_as_the_chart() -> None:
    values = yaml.safe_load((chart.CHART / "values.yaml").read_text())
    services = compose()["services"]
    assert services["redis"]["image"] == values["redis"]["bundled"]["image"]
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["user"] == "10001:10001", name
        assert ":latest" not in service["image"], name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "published on loopback alone"


@pytest.fixture
def started(tmp_path: Path) -> Iterator[dict[str, Any]]:
    """compose's own commands, in its order, with paths, names and ports of this machine. The
    cluster's Ray is left out: its processes are subprocesses here.
    """
    services = compose()["services"]
    ports = {name: free_port() for name in ("redis", "kvstore", "serve")}
    processes = []

    def here(word: str) -> str:
        word = word.replace("/certs", str(tmp_path / "certs"))
        word = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word)
        word = word.replace("redis:6379", f"127.0.0.1:{ports['redis']}")
        return re.sub("(0.0.0.0|kvstore):7070", f"127.0.0.1:{ports['kvstore']}", word)

    def start(name: str, *extra: str) -> subprocess.Popen[str]:
        service = services[name]
        env = {k: here(str(v)) for k, v in service.get("environment", {}).items()}
        home = {"PATH": f"{_BIN}:{os.environ['PATH']}", "HOME": str(Path.home())}
        words = [here(str(word)) for word in service["command"]]
        words = ["127.0.0.1" if word == "0.0.0.0" else word for word in words]
        process = subprocess.Popen(
            [*words, *extra],
            env={**home, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    try:
        (tmp_path / "certs").mkdir()
        start("redis", "--port", str(ports["redis"]))
        certs = start("certs")
        assert certs.wait(60) == 0, certs.stdout and certs.stdout.read()
        await_word(start("kvstore"), "ready")
        await_word(start("serve", "--launcher", "local", "--port", str(ports["serve"])), "ready")
        yield {"url": f"http://127.0.0.1:{ports['serve']}", "model": "ledger"}
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(20)


def await_word(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout
    said, deadline = [], time.monotonic() + 120
    for line in process.stdout:
        said.append(line)
        if line.startswith(word):
            return
        assert time.monotonic() < deadline, said
    raise AssertionError("".join(said))


def test_composes_commands_make_a_cluster_that_answers(started: dict[str, Any]) -> None:
    key = re.search(r"PENSTOCK_API_KEY:-(\S+?)\}", (chart.ROOT / "compose.yaml").read_text())
    assert key
    body = {
        "model": started["model"],
        "temperature": 0,
        "messages": [
            {
                "role": "user",
                "content": "the code of bakilo is 4821.\n\nQuestion: what is the code of bakilo?",
            }
        ],
    }
    url = f"{started['url']}/v1/chat/completions"
    assert httpx.post(url, json=body).status_code == 401
    answer = httpx.post(
        url, json=body, headers={"authorization": f"Bearer {key[1]}"}, timeout=60
    ).json()
    print(answer["choices"][0]["message"]["content"])
    assert answer["choices"][0]["message"]["content"] == "4821"
