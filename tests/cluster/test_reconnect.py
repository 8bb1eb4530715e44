"""A client whose front died goes on reading at another one, or at the same one started again:
every event once, in order, and only for its own tenant.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.cluster.breakage import assert_idle, wait_for
from tests.cluster.harness import Cluster, cluster

KEYS = {"acme": "k-acme-0123456789abcdef", "other": "k-other-0123456789abcde"}


@pytest.fixture(scope="module")
def fronts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Two front processes on one port."""
    os.environ["XDG_STATE_HOME"] = str(tmp_path_factory.mktemp("state"))
    try:
        with cluster(
            "fake",
            model__fake_decode_step_ms=10,
            front__replicas=2,
            front__api_key=",".join(KEYS.values()),
        ) as running:
            threading.Thread(target=running.launcher.wait, daemon=True).start()
            running.client.headers["authorization"] = f"Bearer {KEYS['acme']}"
            yield running
    finally:
        del os.environ["XDG_STATE_HOME"]


@dataclass
class Reader:
    """One stream as an EventSource would read it, over as many connections as it takes."""

    url: str
    body: dict[str, Any]
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    key: str = KEYS["acme"]
    events: list[dict[str, Any]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    done: bool = False
    connections: int = 0

    def read(self, *, at_most: int | None = None) -> None:
        """Until the stream ends, or the connection breaks, or after `at_most` events more."""
        headers = {"authorization": f"Bearer {self.key}", "x-request-id": self.name}
        if self.ids:
            headers["last-event-id"] = self.ids[-1]
        self.connections += 1
        with (
            httpx.Client(timeout=60) as client,
            client.stream("POST", self.url, json=self.body, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                raise AssertionError(answer.read().decode())
            id_ = None
            for line in answer.iter_lines():
                if line.startswith("id: "):
                    id_ = line.removeprefix("id: ")
                elif line.startswith("data: "):
                    assert id_ is not None, "an event without an id"
                    self.ids.append(id_)
                    self._take(line.removeprefix("data: "))
                    id_ = None
                    if at_most is not None and len(self.ids) % at_most == 0:
                        return

    def read_to_the_end(self, *, at_most: int | None = None) -> None:
        while not self.done:
            try:
                self.read(at_most=at_most)
            except httpx.HTTPError:
                continue

    def _take(self, data: str) -> None:
        self.done = data == "[DONE]"
        if not self.done:
            event = json.loads(data)
            assert "error" not in event, event
            for varying in ("id", "created", "timings"):
                event.pop(varying, None)
            self.events.append(event)

    @property
    def text(self) -> str:
        return "".join(
            choice.get("text") or choice.get("delta", {}).get("content") or ""
            for event in self.events
            for choice in event["choices"]
        )


def completions(running: Cluster, **fields: Any) -> Reader:
    body = {
        "model": "fake",
        "prompt": [(7 * i) % 251 for i in range(1_500)],
        "max_tokens": 300,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0.8,
        "seed": 5,
        "stream_options": {"include_usage": True},
    }
    return Reader(f"{running.url}/v1/completions", body | fields)


def chat(running: Cluster, **fields: Any) -> Reader:
    body = {
        "model": "fake",
        "messages": [{"role": "user", "content": "word " * 200}],
        "max_tokens": 200,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    return Reader(f"{running.url}/v1/chat/completions", body | fields)


def undisturbed(reader: Reader) -> Reader:
    calm = Reader(reader.url, reader.body)
    calm.read()
    assert calm.done and len(set(calm.ids)) == len(calm.ids)
    return calm


@pytest.mark.parametrize("kind", ["text", "chat", "logprobs", "json"])
def test_a_client_that_comes_back_every_few_events_misses_and_repeats_none(
    fronts: Cluster, kind: str
) -> None:
    match kind:
        case "text":
            reader = completions(fronts)
        case "chat":
            reader = chat(fronts)
        case "logprobs":
            reader = completions(fronts, logprobs=2, max_tokens=60)
        case _:
            schema = {
                "type": "object",
                "properties": {"a": {"type": "string", "maxLength": 40}},
                "required": ["a"],
                "additionalProperties": False,
            }
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            reader = chat(fronts, response_format=form, ignore_eos=False)
    calm = undisturbed(reader)
    reader.read_to_the_end(at_most=23)
    assert reader.connections > 2
    assert reader.ids == calm.ids
    assert reader.text == calm.text
    assert reader.events[:-1] == calm.events[:-1]
    assert_idle(fronts)


def test_a_front_killed_in_mid_stream_is_followed_by_another(fronts: Cluster) -> None:
    launcher: Any = fronts.launcher
    reader = completions(fronts, max_tokens=400)
    calm = undisturbed(reader)
    thread = threading.Thread(target=reader.read_to_the_end, daemon=True)
    thread.start()
    wait_for("tokens flow", lambda: len(reader.ids) > 50, within_s=20)
    for front in launcher.fronts:
        # One of them has the stream; which one the kernel knows.
        os.kill(front.pid, signal.SIGKILL)
        wait_for("back", lambda front=front: front.running and front.is_ready, within_s=20)
    thread.join(40)
    assert reader.done and reader.connections > 1
    print(f"{reader.connections} connections, {len(reader.ids)} events")
    assert (reader.ids, reader.text) == (calm.ids, calm.text)
    assert reader.events[-1] == calm.events[-1] or reader.events[-1]["usage"]["completion_tokens"]


def test_a_stream_is_its_tenants_alone_and_belongs_to_one_request(fronts: Cluster) -> None:
    reader = completions(fronts, max_tokens=30)
    reader.read(at_most=5)
    stranger = Reader(reader.url, reader.body, name=reader.name, key=KEYS["other"])
    stranger.ids = reader.ids[-1:]
    with pytest.raises(AssertionError, match="no stream of this X-Request-Id"):
        stranger.read()
    changed = Reader(reader.url, reader.body | {"max_tokens": 31}, name=reader.name)
    changed.ids = reader.ids[-1:]
    with pytest.raises(AssertionError, match="another request"):
        changed.read()
    reader.ids[-1] = "x"
    with pytest.raises(AssertionError, match="Last-Event-ID is none"):
        reader.read()


def test_an_ended_stream_can_still_be_read_from_its_middle(fronts: Cluster) -> None:
    reader = completions(fronts, max_tokens=40)
    reader.read()
    again = Reader(reader.url, reader.body, name=reader.name)
    again.ids = reader.ids[:10]
    again.read()
    assert again.ids == reader.ids and again.done
    assert again.events[-1]["usage"] == reader.events[-1]["usage"]


def test_the_files_hold_no_text(fronts: Cluster) -> None:
    kept = list(Path(os.environ["XDG_STATE_HOME"]).rglob("streams-*.db"))
    assert kept and all(oct(file.stat().st_mode)[-3:] == "600" for file in kept)
