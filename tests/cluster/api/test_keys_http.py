"""API keys, scopes and quotas as HTTP clients meet them."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from api_harness import Api, chat, make_api

from cluster.auth.key_file import add_key
from cluster.auth.keys import KeyLimits, new_key
from cluster.auth.limiter import Limiter, span

URL = "/v1/chat/completions"


class Door:
    """An API over a key file, with a clock that the test moves."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "keys.json"
        self.now_s = 1000.0
        self._api: Api | None = None

    def key(self, tenant: str = "acme", **more: Any) -> str:
        limits = KeyLimits(**{k: v for k, v in more.items() if k in KeyLimits.model_fields})
        rest = {k: v for k, v in more.items() if k not in KeyLimits.model_fields}
        return add_key(
            self.path, lambda taken: new_key(tenant=tenant, limits=limits, taken=taken, **rest)
        ).text

    @property
    def api(self) -> Api:
        """Made at the first use: the keys that exist by then are those it knows."""
        if self._api is None:
            self._api = make_api(api_keys_file=str(self.path))
            self._api.app.state.penstock.limiter = Limiter(lambda: self.now_s)
        return self._api

    def client(self, key: str) -> httpx.AsyncClient:
        return self.api.client(authorization=f"Bearer {key}")


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path)


def error(answer: httpx.Response) -> dict[str, Any]:
    found: dict[str, Any] = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"}
    return found


async def test_without_a_valid_key_everything_but_the_open_paths_is_401(door: Door) -> None:
    door.key()
    async with door.api.client() as nobody:
        for path in ("/health", "/ready", "/version", "/metrics", "/openapi.json"):
            assert (await nobody.get(path)).status_code == 200
        for path in ("/v1/models", "/v1/files", "/nothing", "http://api//health", "/health/"):
            answer = await nobody.get(path)
            assert answer.status_code == 401, path
            assert answer.headers["www-authenticate"] == "Bearer"
            assert error(answer)["code"] == "invalid_api_key"
    assert door.api.service.opened == 0


async def test_scopes(door: Door) -> None:
    reader, writer = door.key(scopes=("read",)), door.key(scopes=("generate",))
    async with door.client(reader) as client:
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.post("/tokenize", json={"prompt": "x"})).status_code == 200
        for path in (URL, "/v1/completions"):
            answer = await client.post(path, json=chat())
            assert answer.status_code == 403
            assert error(answer)["code"] == "insufficient_scope"
            assert "'generate'" in error(answer)["message"]
    async with door.client(writer) as client:
        assert (await client.post(URL, json=chat(max_tokens=2))).status_code == 200
        for path in ("/v1/models", "/v1/models/fake", "/v1/files", "/v1/batches/x"):
            assert (await client.get(path)).status_code == 403, path
    assert door.api.service.opened == 1


async def test_requests_per_minute_with_openai_headers(door: Door) -> None:
    key = door.key(requests_per_minute=2)
    async with door.client(key) as client:
        first = await client.get("/v1/models")
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        assert first.headers["x-ratelimit-reset-requests"] == "30s"
        assert "x-ratelimit-limit-tokens" not in first.headers
        assert (await client.get("/v1/models")).status_code == 200
        refused = await client.get("/v1/models")
        assert refused.status_code == 429
        assert error(refused)["code"] == "rate_limit_exceeded"
        assert error(refused)["type"] == "rate_limit_error"
        assert refused.headers["retry-after"] == "30"
        assert refused.headers["x-ratelimit-remaining-requests"] == "0"
        door.now_s += 30
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 429


async def test_another_key_is_not_held_up(door: Door) -> None:
    one, other = door.key(requests_per_minute=1), door.key(requests_per_minute=1)
    for key in (one, other):
        async with door.client(key) as client:
            assert (await client.get("/v1/models")).status_code == 200
            assert (await client.get("/v1/models")).status_code == 429


async def test_only_uncached_tokens_and_the_answer_count(door: Door) -> None:
    key = door.key(tokens_per_minute=300)
    body = chat("x" * 200, max_tokens=10, ignore_eos=True)
    async with door.client(key) as client:
        first = await client.post(URL, json=body)
        usage = first.json()["usage"]
        spent = usage["prompt_tokens"] + usage["completion_tokens"]
        assert spent > 210
        second = await client.post("/tokenize", json={"prompt": "x"})
        assert second.headers["x-ratelimit-remaining-tokens"] == str(300 - spent)
        # All but one token cached: the same request costs 1 + 10.
        door.api.service.plan.cached_tokens = 10_000
        again = await client.post(URL, json=body)
        assert again.json()["usage"]["prompt_cache_miss_tokens"] == 1
        third = await client.post("/tokenize", json={"prompt": "x"})
        assert third.headers["x-ratelimit-remaining-tokens"] == str(300 - spent - 11)


async def test_a_debt_is_waited_for(door: Door) -> None:
    key = door.key(tokens_per_minute=100)
    body = chat("x" * 400, max_tokens=1)
    async with door.client(key) as client:
        first = await client.post(URL, json=body)
        assert first.status_code == 200, "a prompt larger than the bucket is served once"
        refused = await client.post(URL, json=body)
        assert refused.status_code == 429
        wait_s = int(refused.headers["retry-after"])
        spent = first.json()["usage"]["total_tokens"]
        assert abs(wait_s - (spent - 100 + 1) * 0.6) <= 1
        assert door.api.service.opened == 1, "nothing was computed for it"
        door.now_s += wait_s
        assert (await client.post(URL, json=body)).status_code == 200


async def test_tokens_per_day_are_another_code(door: Door) -> None:
    key = door.key(tokens_per_day=10)
    async with door.client(key) as client:
        assert (await client.post(URL, json=chat("x" * 50, max_tokens=1))).status_code == 200
        refused = await client.post(URL, json=chat())
        assert (refused.status_code, error(refused)["code"]) == (429, "insufficient_quota")
        assert "tokens per day" in error(refused)["message"]


async def test_a_prompt_that_the_key_may_not_send(door: Door) -> None:
    key = door.key(max_prompt_tokens=50)
    async with door.client(key) as client:
        assert (await client.post(URL, json=chat("x" * 20))).status_code == 200
        for stream in (False, True):
            refused = await client.post(URL, json=chat("x" * 60, stream=stream))
            assert (refused.status_code, error(refused)["code"]) == (400, "prompt_tokens_exceeded")
            assert "at most 50" in error(refused)["message"]


async def test_requests_at_once(door: Door) -> None:
    key = door.key(concurrent_requests=2)
    door.api.service.plan.prefill_pause_s = 0.3
    async with door.client(key) as client:
        running = [asyncio.create_task(client.post(URL, json=chat(max_tokens=1))) for _ in "12"]
        await asyncio.sleep(0.1)
        refused = await client.post(URL, json=chat(max_tokens=1))
        assert refused.status_code == 429
        assert error(refused)["code"] == "concurrent_requests_exceeded"
        assert [r.status_code for r in await asyncio.gather(*running)] == [200, 200]
        assert (await client.post(URL, json=chat(max_tokens=1))).status_code == 200


async def test_at_the_limit_the_next_request_after_the_last_byte_is_not_refused(door: Door) -> None:
    key = door.key(concurrent_requests=1)
    door.api.service.plan.close_pause_s = 0.2
    async with door.client(key) as client:
        for stream in (True, False) * 3:
            answer = await client.post(URL, json=chat(max_tokens=2, stream=stream))
            assert answer.status_code == 200


async def test_failures_give_the_place_back(door: Door) -> None:
    key = door.key(concurrent_requests=1)
    async with door.client(key) as client:
        for _ in range(3):
            assert (await client.post(URL, content=b"{")).status_code == 400
            door.api.service.plan.break_after_tokens = 1
            assert (await client.post(URL, json=chat(max_tokens=5))).status_code == 500
            assert (await client.get("/nothing")).status_code == 404


async def test_who_hangs_up_has_still_used_the_prompt(door: Door) -> None:
    key = door.key(tokens_per_minute=1000)
    door.api.service.plan.token_pause_s = 0.05
    async with door.client(key) as client:
        body = chat("x" * 500, max_tokens=1000, stream=True, ignore_eos=True)
        task = asyncio.create_task(client.post(URL, json=body))
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        left = (await client.get("/v1/models")).headers["x-ratelimit-remaining-tokens"]
        assert 400 < int(left) < 500


async def test_openai_client_raises_its_own_types(door: Door) -> None:
    limited, expired = door.key(requests_per_minute=1), "pen-" + "0" * 12 + "-" + "A" * 43
    reader = door.key(scopes=("read",))
    door.key(expires=datetime.now(UTC) + timedelta(seconds=1))

    async def ask(key: str) -> Any:
        transport = httpx.ASGITransport(door.api.app)
        async with httpx.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(
                api_key=key, base_url="http://api/v1", max_retries=0, http_client=http
            )
            return await client.chat.completions.create(**chat(max_tokens=1))

    assert (await ask(limited)).choices
    with pytest.raises(openai.RateLimitError) as limit:
        await ask(limited)
    assert limit.value.code == "rate_limit_exceeded"
    assert limit.value.response.headers["retry-after"] == "60"
    with pytest.raises(openai.AuthenticationError):
        await ask(expired)
    with pytest.raises(openai.PermissionDeniedError):
        await ask(reader)


async def test_two_tenants_never_share_a_namespace(door: Door) -> None:
    keys = {
        "a1": door.key("acme"),
        "a2": door.key("acme"),
        "b": door.key("beta"),
    }
    spaces: dict[tuple[str, str], bytes] = {}
    for who, key in keys.items():
        async with door.client(key) as client:
            for salt in ("", "s", "beta"):
                answer = await client.post(URL, json=chat("same", max_tokens=1, cache_salt=salt))
                assert answer.status_code == 200
                spaces[who, salt] = door.api.service.requests[-1].namespace
    for salt in ("", "s", "beta"):
        assert spaces["a1", salt] == spaces["a2", salt]
    assert len(set(spaces.values())) == 6


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0123, "12ms"), (1.5, "1.5s"), (59.9, "59.9s"), (360, "6m0s"), (3723, "1h2m3s")],
)
def test_spans_are_spelled_as_openai_does(seconds: float, text: str) -> None:
    assert span(seconds) == text
