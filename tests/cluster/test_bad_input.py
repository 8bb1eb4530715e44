"""Bad input: a sentence that names the cause, the right code, and nothing else disturbed."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cluster.launchers.common import free_port
from tests.cluster.breakage import (
    Stream,
    assert_idle,
    body_of,
    fake_answer,
    front_metric,
    prompt_of,
)
from tests.cluster.harness import Cluster, cluster

CONTEXT = 2048
BODY_LIMIT = 65536
KEY = "open-sesame"


@dataclass(frozen=True)
class Bad:
    """A request and what its refusal must say."""

    name: str
    content: Any
    status: int
    code: str
    word: str
    path: str = "/v1/chat/completions"
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=dict)


def _chat(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "messages": [{"role": "user", "content": "hi"}]} | fields


def _text(**fields: Any) -> dict[str, Any]:
    return {"model": "fake", "prompt": "hi", "max_tokens": 4} | fields


TEXT = "/v1/completions"
BAD = [
    Bad("prompt too long", _text(prompt=[7] * 3000), 400, "context_length_exceeded", "3000", TEXT),
    Bad(
        "chat too long",
        _chat(messages=[{"role": "user", "content": "x" * 3000}]),
        400,
        "context_length_exceeded",
        str(CONTEXT),
    ),
    Bad("prompt plus answer too long", _chat(max_tokens=2040), 400, "context_length_exceeded", ""),
    Bad("no messages", _chat(messages=[]), 400, "invalid_value", "messages"),
    Bad("messages left out", {"model": "fake"}, 400, "missing_required_parameter", "messages"),
    Bad("message without role", _chat(messages=[{"content": "x"}]), 400, "", "role"),
    Bad("unknown role", _chat(messages=[{"role": "king", "content": "x"}]), 400, "", "king"),
    Bad("empty prompt", _text(prompt=""), 400, "invalid_value", "empty", TEXT),
    Bad("empty token prompt", _text(prompt=[]), 400, "invalid_value", "empty", TEXT),
    Bad("token outside vocabulary", _text(prompt=[5, 999]), 400, "invalid_value", "257", TEXT),
    Bad("negative token", _text(prompt=[5, -1]), 400, "invalid_value", "vocabulary", TEXT),
    Bad("huge token", _text(prompt=[5, 2**70]), 400, "", "prompt", TEXT),
    Bad("unknown model", _chat(model="gpt-5"), 404, "model_not_found", "gpt-5"),
    Bad("model of wrong type", _chat(model=3), 400, "invalid_type", "model"),
    Bad("bad JSON", b'{"model": "fake", ', 400, "invalid_json", "JSON"),
    Bad("not an object", b"[1]", 400, "invalid_type", "object"),
    Bad("not UTF-8", b'{"model": "\xff\xfe"}', 400, "invalid_json", "JSON"),
    Bad("lone surrogate", b'{"model":"fake","prompt":"\\ud800"}', 400, "invalid_json", "", TEXT),
    Bad("no body", b"", 400, "invalid_json", "JSON"),
    Bad("messages of wrong type", _chat(messages="hi"), 400, "invalid_type", "messages"),
    Bad("temperature of wrong type", _chat(temperature="hot"), 400, "invalid_type", "temperature"),
    Bad("negative temperature", _chat(temperature=-1), 400, "invalid_value", "temperature"),
    Bad("top_p above 1", _chat(top_p=2), 400, "invalid_value", "top_p"),
    Bad("negative max_tokens", _chat(max_tokens=-5), 400, "invalid_value", "max_tokens"),
    Bad("zero max_tokens", _chat(max_tokens=0), 400, "invalid_value", "max_tokens"),
    Bad("huge max_tokens", _chat(max_tokens=2**63), 400, "context_length_exceeded", ""),
    Bad("fraction max_tokens", _chat(max_tokens=1.5), 400, "invalid_type", "max_tokens"),
    Bad("null byte in request id", _chat(), 400, "invalid_request_id", "", headers={
        "X-Request-Id": "a b"
    }),
    Bad("old functions", _chat(functions=[{"name": "f"}]), 400, "unsupported_value", "functions"),
    Bad("wrong key", _chat(), 401, "invalid_api_key", "key", headers={
        "Authorization": "Bearer wrong"
    }),
    Bad("no key", _chat(), 401, "invalid_api_key", "key", headers={"Authorization": ""}),
    Bad("body too long", _chat(user="x" * BODY_LIMIT), 413, "request_too_large", str(BODY_LIMIT)),
    Bad("unknown path", _chat(), 404, "unknown_url", "/v1/nothing", "/v1/nothing"),
    Bad("wrong method", None, 405, "method_not_allowed", "GET", method="GET"),
]  # fmt: skip


@pytest.fixture(scope="module")
def guarded() -> Iterator[Cluster]:
    """Few streams, a short context, a key: whatever leaks runs out at once."""
    with cluster(
        "fake",
        front__max_streams=4,
        front__api_key=KEY,
        front__max_body_bytes=BODY_LIMIT,
        model__max_model_len=CONTEXT,
        model__fake_decode_step_ms=5,
    ) as running:
        running.client.headers["Authorization"] = f"Bearer {KEY}"
        yield running


def _send(cluster: Cluster, bad: Bad) -> str:
    """The message of the refusal, checked for its shape."""
    content = bad.content
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    answer = cluster.client.request(
        bad.method, bad.path, content=None if content is None else raw, headers=bad.headers
    )
    assert answer.status_code == bad.status, f"{bad.name}: {answer.status_code} {answer.text}"
    assert answer.headers["content-type"].startswith("application/json")
    body = answer.json()
    assert set(body) == {"error"}, bad.name
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, bad.name
    assert error["type"] == "invalid_request_error", bad.name
    message = error["message"]
    assert bad.code in (error["code"], ""), f"{bad.name}: {error}"
    assert bad.word in message, f"{bad.name}: {message}"
    assert "\n" not in message and "Traceback" not in message
    assert len(message) < 500, bad.name
    assert answer.headers["x-request-id"]
    return str(message)


@pytest.mark.parametrize("bad", BAD, ids=[b.name.replace(" ", "_") for b in BAD])
def test_bad_request_is_refused_with_its_cause(guarded: Cluster, bad: Bad) -> None:
    print(f"{bad.name}: {bad.status} {bad.code}: {_send(guarded, bad)}")


def test_a_hundred_bad_requests_among_good_ones_leave_nothing_behind(guarded: Cluster) -> None:
    long = prompt_of(700, 90)
    body = body_of(long, max_tokens=600, stream=False)
    with ThreadPoolExecutor(3) as pool:
        slow = pool.submit(guarded.client.post, "/v1/completions", json=body)
        everything = [BAD[i % len(BAD)] for i in range(108)]
        messages = list(pool.map(lambda bad: _send(guarded, bad), everything))
        good = [pool.submit(_good, guarded, seed) for seed in range(8)]
        assert all(f.result() for f in good)
        answer = slow.result()
    assert answer.status_code == 200, answer.text
    got = tuple(answer.json()["choices"][0]["token_ids"])
    expected = fake_answer(long, 600)
    print(
        f"{len(messages)} refusals beside a stream of {len(got)} tokens, equal: {got == expected}"
    )
    assert got == expected
    took = assert_idle(guarded, within_s=5)
    print(f"all gauges zero after {took:.1f} s")
    assert front_metric(guarded.client, "penstock_requests_running") == 0
    # The front counts 4 streams at most: had one refusal kept its place, this would be refused.
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda seed: _good(guarded, seed), range(20, 24)))


def _good(cluster: Cluster, seed: int) -> bool:
    prompt = prompt_of(300 + seed, 100 + seed)
    answer = cluster.complete(prompt, max_tokens=6, ignore_eos=True)
    return answer.token_ids == fake_answer(prompt, 6)


def test_a_request_that_no_decode_worker_can_hold_is_refused_before_prefill() -> None:
    with cluster("fake", decode__kv_memory_bytes=1 << 16) as running:
        body = body_of(prompt_of(20_000, 5), max_tokens=4)
        answer = running.client.post("/v1/completions", json=body)
        print(answer.status_code, answer.text)
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert running.counter("prefill", "prefill_computed_tokens_total") == 0
        refused = Stream(running, prompt_of(20_000, 5), max_tokens=4).end(within_s=10)
        assert refused.error is not None and refused.status == 400
        assert_idle(running)


# The command line


def _penstock(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *args],
        capture_output=True,
        text=True,
        timeout=90,
        env={**os.environ, **env},
        check=False,
    )


def _assert_one_sentence(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    print(f"exit {done.returncode}: {done.stderr.strip()}")
    assert done.returncode == code
    assert done.stdout == ""
    assert done.stderr.startswith("penstock: ")
    assert done.stderr.count("\n") == 1, "not one line"
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_busy_port_is_named(launcher: str) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        done = _penstock("serve", "fake", "--port", port, "--launcher", launcher)
    _assert_one_sentence(done, 1, port, "--port")


@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_redis_that_cannot_be_reached_is_named(launcher: str) -> None:
    url = f"redis://user:hush-hush@127.0.0.1:{free_port()}/0"
    ours = str(free_port())
    done = _penstock("serve", "fake", "--port", ours, "--launcher", launcher, "--redis-url", url)
    _assert_one_sentence(done, 1, "Redis", url.rpartition("@")[2].removesuffix("/0"))
    assert "hush-hush" not in done.stderr


def test_redis_url_that_is_none_is_wrong_usage() -> None:
    done = _penstock("serve", "fake", "--port", str(free_port()), "--launcher", "local",
                     "--redis-url", "htp://x")  # fmt: skip
    print(done.stderr)
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1
    assert "redis" in done.stderr.lower()


def test_unknown_flag_and_bad_configuration_are_wrong_usage(tmp_path: Path) -> None:
    _assert_one_sentence(_penstock("serve", "fake", "--prefill-replicsa", "1"), 2, "replicsa")
    file = tmp_path / "penstock.yaml"
    for content, word in (("front: {prot: 1}", "port"), ("front: [", "YAML"), ("x: {}", "'x'")):
        file.write_text(content)
        _assert_one_sentence(_penstock("serve", "fake", "--config", str(file)), 2, word)
    done = _penstock("serve", "fake", PENSTOCK_DECODE__REPLICAS="many")
    _assert_one_sentence(done, 2, "PENSTOCK_DECODE__REPLICAS")


# Model folders


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers")
    from tests.model import oracle

    path = tmp_path_factory.mktemp("models") / "good"
    oracle.build("window_only", path)
    return path


def _change_header(file: Path, change: Any) -> None:
    """Rewrites a safetensors header, leaves the bytes."""
    raw = file.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


TENSOR = "layers.1.attn.wq_a.weight"


def _missing(folder: Path) -> str:
    # Renamed to a draft layer's, which is not read: offsets stay whole.
    def rename(header: dict[str, Any]) -> None:
        header[f"mtp.0.{TENSOR}"] = header.pop(TENSOR)

    _change_header(folder / "model.safetensors", rename)
    return TENSOR


def _misshapen(folder: Path) -> str:
    def reshape(header: dict[str, Any]) -> None:
        rows, columns = header[TENSOR]["shape"]
        header[TENSOR]["shape"] = [rows // 2, columns * 2]

    _change_header(folder / "model.safetensors", reshape)
    return TENSOR


def _truncated(folder: Path) -> str:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)
    return file.name


def _no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def _bad_config(folder: Path) -> str:
    (folder / "config.json").write_text('{"model_type": ')
    return "config.json"


@pytest.mark.parametrize(
    ("spoil", "launcher"),
    [
        (_missing, "local"),
        (_misshapen, "local"),
        (_truncated, "local"),
        (_no_config, "local"),
        (_bad_config, "local"),
        pytest.param(_misshapen, "ray", marks=pytest.mark.ray),
    ],
)
def test_spoilt_model_folder_is_named_in_one_sentence(
    folder: Path, tmp_path: Path, spoil: Any, launcher: str
) -> None:
    copy = tmp_path / "spoilt"
    shutil.copytree(folder, copy)
    word = spoil(copy)
    done = _penstock("serve", str(copy), "--port", str(free_port()), "--launcher", launcher)
    _assert_one_sentence(done, 1, word, "spoilt")
