"""A client that goes away cancels its request within two seconds, whatever it was doing."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest
from api_harness import Api, chat, make_api, served

URL = "/v1/chat/completions"


async def closed(api: Api, count: int, *, within_s: float = 2.0) -> float:
    """Seconds until `count` requests have been closed."""
    begun = time.monotonic()
    while api.service.closed < count:
        assert time.monotonic() - begun < within_s, "the request was not cancelled"
        await asyncio.sleep(0.01)
    return time.monotonic() - begun


async def opened(api: Api, count: int) -> None:
    while api.service.opened < count:  # noqa: ASYNC110  the fake keeps plain counters
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("phase", ["prefill", "decode"])
async def test_going_away_cancels(stream: bool, phase: str) -> None:
    api = make_api(keep_alive_s=30.0)
    setattr(api.service.plan, f"{'prefill' if phase == 'prefill' else 'token'}_pause_s", 20.0)
    async with served(api.app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            call = asyncio.create_task(client.post(URL, json=chat(stream=stream)))
            await opened(api, 1)
            await asyncio.sleep(0.1)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
        took_s = await closed(api, 1)
        print(f"{phase} stream={stream}: closed {took_s * 1e3:.0f} ms after the client went away")
        async with httpx.AsyncClient(base_url=url) as client:
            metrics = (await client.get("/metrics")).text
    assert 'penstock_requests_total{endpoint="chat",outcome="cancelled"} 1.0' in metrics
    assert "penstock_requests_running 0.0" in metrics


async def test_leaving_in_the_middle_of_a_stream_cancels(api: Api) -> None:
    api.service.plan.token_pause_s = 0.02
    body: dict[str, Any] = chat(stream=True, ignore_eos=True, max_tokens=2000)
    async with served(api.app) as url, httpx.AsyncClient(base_url=url) as client:
        async with client.stream("POST", URL, json=body) as answer:
            async for line in answer.aiter_lines():
                if '"content":"' in line and '""' not in line:
                    break
        await closed(api, 1)
    assert api.service.opened == 1


async def test_many_leaving_at_once_leave_nothing(api: Api) -> None:
    api.service.plan.token_pause_s = 0.5
    async with served(api.app) as url:
        async with httpx.AsyncClient(base_url=url) as client:
            calls = [
                asyncio.create_task(client.post(URL, json=chat(stream=i % 2 == 0)))
                for i in range(40)
            ]
            await opened(api, 40)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        await closed(api, 40)
    assert api.app.state.penstock._streams == 0
