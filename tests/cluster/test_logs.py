"""Logs of a cluster: JSON, one id from the front to the store, and never what a client wrote."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from cluster.launchers.common import free_port

PROMPT = "zebrafinch codeword 4821 under the doormat"
PIECES = ("zebrafinch", "codeword 4821", "doormat")


@dataclass
class Served:
    """`penstock serve` as a user runs it, with all that it writes."""

    url: str
    process: subprocess.Popen[str]
    errors: list[str] = field(default_factory=list)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.errors]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    port = free_port()
    environment = os.environ | {"PENSTOCK_TELEMETRY__LOG_LEVEL": "info"}
    command = ["-m", "cluster.cli", "serve", "fake", "--launcher", "local", "--port", str(port)]
    process = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout and process.stderr
    running = Served(f"http://127.0.0.1:{port}", process)
    stderr = process.stderr
    reader = threading.Thread(target=lambda: running.errors.extend(stderr))
    reader.start()
    try:
        assert process.stdout.readline().startswith("ready"), running.errors
        yield running
    finally:
        process.terminate()
        process.wait(30)
        reader.join(10)


def use(url: str, request_id: str) -> str:
    """Whatever a client may send, with the same words in it; text of the answers."""
    said = ""
    with httpx.Client(base_url=url, headers={"x-request-id": request_id}, timeout=30) as client:
        text = {"model": "fake", "prompt": PROMPT * 20, "max_tokens": 300, "ignore_eos": True}
        said += client.post("/v1/completions", json=text).json()["choices"][0]["text"]
        chat = {"model": "fake", "messages": [{"role": "user", "content": PROMPT}]}
        assert client.post("/v1/chat/completions", json=chat).status_code == 200
        with client.stream("POST", "/v1/completions", json=text | {"stream": True}) as answer:
            said += "".join(answer.iter_text())
        assert client.post("/tokenize", json={"prompt": PROMPT}).status_code == 200
        assert client.post("/v1/completions", content=PROMPT).status_code == 400
        assert client.post("/v1/completions", json=text | {PROMPT: 1}).status_code in (200, 400)
        assert client.post("/v1/completions", json=text | {"stop": [PROMPT]}).status_code == 200
        assert client.post("/v1/completions", json=text | {"model": PROMPT}).status_code == 404
        assert client.get(f"/{PIECES[0]}").status_code == 404
        too_long = text | {"prompt": PROMPT, "max_tokens": 10**9}
        assert client.post("/v1/completions", json=too_long).status_code == 400
        with client.stream("POST", "/v1/completions", json=text | {"stream": True}) as answer:
            next(answer.iter_raw())
    return said


def test_a_run_tells_every_request_once_by_id_and_nothing_that_was_written(served: Served) -> None:
    request_id = f"mine-{secrets.token_hex(8)}"
    said = use(served.url, request_id)
    # Its own lines come last: all is written when the cluster has ended.
    served.process.terminate()
    served.process.wait(30)
    lines = served.lines()
    written = "".join(served.errors)
    for piece in (*PIECES, said[:40], said[-40:]):
        assert piece not in written, f"the log repeats {piece!r}"
    mine = [line for line in lines if line.get("request_id") == request_id]
    processes = {line["process"] for line in mine}
    assert {"front", "prefill-0", "decode-0"} <= processes, processes
    posts = [line for line in mine if line["process"] == "front" and "status" in line]
    assert sorted(line["status"] for line in posts) == sorted(
        [200, 200, 200, 200, 400, 404, 404, 400, *(line["status"] for line in posts[5:7]), 200]
    )
    answered = [line for line in posts if "completion_tokens" in line]
    assert all({"answer_id", "prompt_tokens", "cached_tokens"} <= set(line) for line in answered)
    read = {line["answer_id"] for line in mine if line["message"] == "prompt read"}
    assert {line["answer_id"] for line in answered} <= {i.rsplit("/", 1)[0] for i in read} | read
    print(f"{len(lines)} lines, {len(mine)} of them of one request id, processes {processes}")
