"""Models, tokenizing, health and metrics."""

from __future__ import annotations

import subprocess
import sys

import httpx
from api_harness import Api, chat
from prometheus_client.parser import text_string_to_metric_families


async def test_models(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()
    assert [m["id"] for m in listed["data"]] == ["fake"]
    assert (await client.get("/v1/models/fake")).json() == listed["data"][0]
    assert listed["data"][0]["max_model_len"] == 4096


async def test_tokenize_and_back(client: httpx.AsyncClient) -> None:
    tokens = (await client.post("/tokenize", json={"prompt": "h\u00e9"})).json()
    assert tokens == {"count": 3, "max_model_len": 4096, "tokens": [104, 195, 169]}
    back = await client.post("/detokenize", json={"tokens": tokens["tokens"]})
    assert back.json() == {"prompt": "h\u00e9"}
    messages = (await client.post("/tokenize", json={"messages": chat("hi")["messages"]})).json()
    assert bytes(messages["tokens"]) == b"user: hi\nassistant: "


async def test_tokenize_refuses_nonsense(client: httpx.AsyncClient) -> None:
    assert (await client.post("/tokenize", json={})).status_code == 400
    for tokens in ([-1], [99999], ["a"], 3, [2**70]):
        answer = await client.post("/detokenize", json={"tokens": tokens})
        assert answer.status_code == 400, answer.text


async def test_ready_follows_the_cluster(client: httpx.AsyncClient, api: Api) -> None:
    assert (await client.get("/health")).json() == {"status": "ok"}
    assert (await client.get("/ready")).status_code == 200
    api.service.plan.ready = False
    answer = await client.get("/ready")
    assert (answer.status_code, answer.json()["reason"]) == (503, "no prefill worker")


async def test_version_and_openapi(client: httpx.AsyncClient) -> None:
    assert set((await client.get("/version")).json()) == {"version"}
    paths = (await client.get("/openapi.json")).json()["paths"]
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/metrics"} <= set(paths)


async def test_metrics_parse_and_count(client: httpx.AsyncClient) -> None:
    await client.post("/v1/chat/completions", json=chat(max_tokens=3, ignore_eos=True))
    await client.get("/nothing/at/all")
    text = (await client.get("/metrics")).text
    samples = {
        (s.name, tuple(sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }
    done = (("endpoint", "chat"), ("outcome", "length"))
    assert samples["penstock_requests_total", done] == 1
    assert samples["penstock_completion_tokens_total", ()] == 3
    assert samples["penstock_time_to_first_token_seconds_count", ()] == 1
    assert samples["penstock_http_responses_total", (("route", "other"), ("status", "404"))] == 1
    assert ("penstock_worker_running", (("role", "prefill"), ("worker", "prefill-0"))) in samples
    assert "nothing/at/all" not in text


def test_the_api_never_loads_torch() -> None:
    code = (
        "import sys, cluster.api, cluster.api.fake_service, penstock.chat; "
        "print([m for m in ('torch', 'triton', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
