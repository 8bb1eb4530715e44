"""A decode worker killed at token 700 of 1,000 after a prompt of 32k tokens: what its successor
feeds once more, by the workers' own counts; plain, with drafts, and bound to a JSON schema.
"""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import httpx
import pytest

from tests.cluster.breakage import every_process, prompt_of, wait_for
from tests.cluster.harness import Cluster, cluster
from tests.cluster.test_reconnect import Reader

pytestmark = pytest.mark.slow
PROMPT, ANSWER, AT = 32_000, 1_000, 700
MOST_REPLAYED = 256 + 128
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "string", "minLength": 960, "maxLength": 980}},
    "required": ["a"],
    "additionalProperties": False,
}


def _body(kind: str) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": "fake",
        "prompt": prompt_of(PROMPT, 3),
        "max_tokens": ANSWER,
        "temperature": 0.7,
        "seed": 9,
        "stream": True,
    }
    if kind != "json":
        return body | {"ignore_eos": True}
    del body["prompt"]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    text = "word " * (PROMPT // 5)
    return body | {"messages": [{"role": "user", "content": text}], "response_format": form}


def _reader(running: Cluster, kind: str) -> Reader:
    path = "chat/completions" if kind == "json" else "completions"
    return Reader(f"{running.url}/v1/{path}", _body(kind))


@pytest.mark.parametrize("kind", ["plain", "drafts", "json"])
def test_killed_at_token_700_little_is_fed_once_more(kind: str) -> None:
    drafts = {"model__num_speculative_tokens": 4} if kind == "drafts" else {}
    with cluster("fake", model__fake_decode_step_ms=4, decode__replicas=2, **drafts) as running:
        threading.Thread(target=running.launcher.wait, daemon=True).start()
        calm = _reader(running, kind)
        calm.read()
        reader = _reader(running, kind)
        reading = threading.Thread(target=reader.read, daemon=True)
        reading.start()
        wait_for("token 700", lambda: len(reader.ids) >= AT, within_s=40)
        (busy,) = [w for w in running.workers() if w.worker_id.startswith("decode") and w.running]
        at = len(reader.ids)
        os.kill(busy.pid, signal.SIGKILL)
        reading.join(40)
        assert reader.done
        assert (reader.ids, reader.text) == (calm.ids, calm.text)
        replayed = "decode_replayed_tokens_total"
        wait_for(
            "its successor counts", lambda: running.counter("decode", replayed) > 0, within_s=5
        )
        assert busy.pid not in every_process()
        again = running.counter("decode", replayed)
        computed = running.counter("decode", "decode_prompt_tokens_computed_total")
        with httpx.Client(base_url=running.url) as client:
            text = client.get("/metrics").text
        assert "penstock_decode_failovers_total 1.0" in text
        print(f"{kind}: killed at event {at} of {len(reader.ids)}: {again:.0f} tokens fed again")
        assert again <= MOST_REPLAYED and computed == 0
