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


def use(url: str, request_id: str) -> tuple[list[int], str]:
    """Whatever a client may send, with the same words in it; statuses and text of the answers."""
    statuses, said = [], ""
    text = {"model": "fake", "prompt": PROMPT * 20, "max_tokens": 300, "ignore_eos": True}
    chat = {"model": "fake", "messages": [{"role": "user", "content": PROMPT}]}
    with httpx.Client(base_url=url, headers={"x-request-id": request_id}, timeout=30) as client:

        def post(path: str, **arguments: Any) -> httpx.Response:
            answer = client.post(path, **arguments)
            statuses.append(answer.status_code)
            return answer

        said += post("/v1/completions", json=text).json()["choices"][0]["text"]
        post("/v1/chat/completions", json=chat)
        post("/tokenize", json={"prompt": PROMPT})
        post("/v1/completions", content=PROMPT)
        post("/v1/completions", json=text | {PROMPT: 1})
        post("/v1/completions", json=text | {"stop": [PROMPT]})
        post("/v1/completions", json=text | {"model": PROMPT})
        post("/v1/completions", json=text | {"max_tokens": 10**9})
        post(f"/{PIECES[0]}")
        for read_all in (True, False):
            body = text | {"stream": True}
            with client.stream("POST", "/v1/completions", json=body) as answer:
                statuses.append(answer.status_code)
                said += "".join(answer.iter_text()) if read_all else next(answer.iter_text())
    assert {200, 400, 404} <= set(statuses)
    return statuses, said


def test_a_run_tells_every_request_once_by_id_and_nothing_that_was_written(served: Served) -> None:
    request_id = f"mine-{secrets.token_hex(8)}"
    statuses, said = use(served.url, request_id)
    # The last lines are written while the cluster ends.
    served.process.terminate()
    served.process.wait(30)
    lines = served.lines()
    written = "".join(served.errors)
    for piece in (*PIECES, said[:40], said[-40:]):
        assert piece not in written, f"the log repeats {piece!r}"
    mine = [line for line in lines if line.get("request_id") == request_id]
    processes = {line["process"] for line in mine}
    assert {"front", "prefill-0", "decode-0"} <= processes
    told = [line for line in mine if line["process"] == "front" and "status" in line]
    assert sorted(line["status"] for line in told) == sorted(statuses)
    answered = [line for line in told if "completion_tokens" in line]
    assert len(answered) >= 4
    for line in answered:
        assert {"answer_id", "prompt_tokens", "cached_tokens", "took_s"} <= set(line)
        parts = [each for each in mine if line["answer_id"] in str(each.get("answer_id"))]
        assert {each["process"] for each in parts} == {"front", "prefill-0", "decode-0"}
    print(f"{len(lines)} lines, {len(mine)} of one request id, from {sorted(processes)}")
