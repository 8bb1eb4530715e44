"""`penstock` as a user runs it: exit codes, one sentence an error, nothing heavy for help."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from cluster.api import create_app
from cluster.api.fake_service import FakeService
from cluster.cli import main
from cluster.config import FrontSection
from penstock.chat import PlainChat
from penstock.telemetry import Telemetry
from penstock.tokenizer import ByteTokenizer
from tests.penstock import v4_folder as v4

COMMANDS = ("serve", "demo", "ask", "logits", "config", "doctor", "keys", "kv")


def penstock(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
        check=False,
    )


def test_help_lists_the_commands_and_loads_nothing_heavy() -> None:
    done = penstock("--help")
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"  {command} " in done.stdout
    heavy = ("torch", "ray", "grpc", "fastapi", "tokenizers", "pydantic", "numpy", "httpx", "yaml")
    code = (
        "import sys, cluster.cli; cluster.cli.main(['--help']); "
        f"print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert loaded.stderr.strip() == "[]"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    assert "Usage: penstock" in capsys.readouterr().out


def test_serve_has_the_flags_of_the_surface(capsys: pytest.CaptureFixture[str]) -> None:
    main(["serve", "--help"])
    shown = capsys.readouterr().out
    flags = (
        "--host --port --served-model-name --max-model-len --tensor-parallel-size --max-num-seqs "
        "--max-num-batched-tokens --kv-cache-dtype --api-key --config --prefill-replicas "
        "--decode-replicas --kv-memory --decode-kv-memory --kv-disk --redis-url --journal-url "
        "--numerics --device --grpc-port --launcher --insecure"
    )
    for flag in flags.split(" "):
        assert flag in shown


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["frobnicate"], 2, ["frobnicate", "--help"]),
        (["serve", "--prot", "3"], 2, ["--prot", "--port"]),
        (["serve", "fake", "--port", "x"], 2, ["--port", "integer"]),
        (["serve", "fake", "--port", "99999"], 2, ["front.port"]),
        (["serve", "no/model"], 1, ["no/model", "hf download"]),
        (["serve", "fake", "--host", "0.0.0.0"], 2, ["--api-key", "--insecure"]),
        (["serve", "fake", "--kv-memory", "much"], 2, ["much", "4GiB"]),
        (["serve", "fake", "--kv-disk", "1MiB"], 2, ["disk_bytes", "at least 8 files"]),
        (["kvstore", "--disk", "x"], 2, ["--disk-size"]),
        (["serve", "ledger", "--tensor-parallel-size", "3"], 1, ["2 heads", "3 ranks"]),
        (["serve", "fake", "--config", "none.yaml"], 2, ["none.yaml"]),
        (["ask", "--question", "x"], 2, ["--document"]),
        (["ask", "--document", "none.txt", "--question", "x"], 2, ["none.txt"]),
        (["logits", "fake", "--tokens", "none.json", "--out", "x"], 2, ["none.json"]),
        (["config", "show", "--config", "none.yaml"], 2, ["none.yaml"]),
    ],
)
def test_errors_are_one_sentence_and_an_exit_code(
    args: list[str], code: int, words: list[str]
) -> None:
    done = penstock(*args)
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("penstock: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_debug_shows_the_traceback_wherever_it_stands() -> None:
    for args in (["--debug", "serve", "no/model"], ["serve", "no/model", "--debug"]):
        done = penstock(*args)
        assert done.returncode == 1
        assert "Traceback" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("penstock: ")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("penstock ")


def test_config_show_tells_origins(capsys: pytest.CaptureFixture[str]) -> None:
    done = penstock("config", "show", "--json", PENSTOCK_FRONT__PORT="1234")
    row = next(r for r in json.loads(done.stdout) if r["name"] == "front.port")
    assert row == {"name": "front.port", "value": 1234, "origin": "env PENSTOCK_FRONT__PORT"}
    assert main(["config", "schema"]) == 0
    assert "front" in json.loads(capsys.readouterr().out)["properties"]


def test_doctor_finds_a_bad_model(capsys: pytest.CaptureFixture[str]) -> None:
    done = penstock("doctor", PENSTOCK_MODEL__MODEL="no/model", PENSTOCK_FRONT__PORT="0")
    assert done.returncode == 1
    assert "FAIL no model at 'no/model'" in done.stdout
    assert (
        penstock("doctor", PENSTOCK_MODEL__MODEL="fake", PENSTOCK_FRONT__PORT="0").returncode == 0
    )


def test_doctor_and_serve_replay_the_examples_of_a_model_s_encoding(tmp_path: Path) -> None:
    folder = v4.write_folder(tmp_path, goldens=v4.GOLDENS)
    done = penstock("doctor", PENSTOCK_MODEL__MODEL=folder, PENSTOCK_FRONT__PORT="0")
    # The folder has no model in it, and that alone is wrong.
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAIL")]
    assert done.returncode == 1 and len(failed) == 1 and "config.json lacks" in failed[0]
    assert "ok   chat encoding of DeepSeek-V4, preview generation" in done.stdout
    assert "ok   test_input_4.json encodes as the release does (chat)" in done.stdout
    output = tmp_path / "encoding" / "tests" / "test_output_2.txt"
    output.write_text(output.read_text() + "more")
    done = penstock("doctor", PENSTOCK_MODEL__MODEL=folder, PENSTOCK_FRONT__PORT="0")
    assert done.returncode == 1
    assert "FAIL test_output_2.txt differs from character" in done.stdout
    done = penstock("serve", folder)
    assert done.returncode == 1
    assert "test_output_2.txt differs from character" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The API over the fake in a thread of its own."""
    tokenizer = ByteTokenizer()
    app = create_app(
        FakeService(),
        tokenizer=tokenizer,
        chat=PlainChat(tokenizer),
        config=FrontSection(api_key="k"),
        telemetry=Telemetry(),
    )
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    started = threading.Event()

    async def serve() -> None:
        task = asyncio.create_task(uvicorn_server.serve())
        while not uvicorn_server.started:  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.01)
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert started.wait(20)
    port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    uvicorn_server.should_exit = True
    thread.join(20)


def test_ask_answers_over_http(server: str, tmp_path: Path) -> None:
    document = tmp_path / "d.txt"
    document.write_text("the code of bakilo is 1234. " * 50)
    args = ("ask", "--document", str(document), "--url", server, "--api-key", "k")
    asked = ("--question", "what is a?", "--question", "what is b?", "what is c?")
    done = penstock(*args, *asked, "--json", "--evidence")
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    assert [a["question"] for a in answers] == ["what is a?", "what is b?", "what is c?"]
    assert all(a["usage"]["prompt_tokens"] > 1400 for a in answers)
    shown = penstock(*args, *asked, "--evidence").stdout
    assert "prompt tokens" in shown
    wrong = penstock(*args[:-1], "wrong", *asked)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "API key" in wrong.stderr


def test_ask_without_a_server_says_how_to_start_one(tmp_path: Path) -> None:
    document = tmp_path / "d.txt"
    document.write_text("x")
    done = penstock(
        "ask", "--document", str(document), "--question", "q", "--url", "http://[::1]:9"
    )
    assert done.returncode == 1
    assert "penstock serve" in done.stderr
    assert done.stderr.count("\n") == 1
