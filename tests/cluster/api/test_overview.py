"""`GET /cluster`: its form, what it costs, and what it says while parts are away."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
from api_harness import Api, chat, make_api

from cluster.auth.key_file import add_key
from cluster.auth.keys import KeyLimits, new_key
from cluster.contracts import WorkerView
from penstock.errors import StoreUnavailableError


class Watched:
    """Counts what the front asks of the cluster, and answers as ordered."""

    def __init__(self, api: Api) -> None:
        self.asked = 0
        self.error: Exception | None = None
        self.pause_s = 0.0
        self.stat: dict[str, float] = {"capacity_bytes": 100.0, "used_bytes": 40.0, "hits": 7.0}
        self.extra: list[WorkerView] = []
        inner = api.service.workers

        async def workers() -> list[WorkerView]:
            self.asked += 1
            await asyncio.sleep(self.pause_s)
            if self.error is not None:
                raise self.error
            return [*await inner(), *self.extra]

        async def store_stat() -> dict[str, float]:
            return self.stat

        api.service.workers = workers  # type: ignore[method-assign]
        api.service.store_stat = store_stat  # type: ignore[method-assign]


async def picture(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.get("/cluster")
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    found: dict[str, Any] = answer.json()
    return found


def worker(number: int, role: str = "decode", **metrics: float) -> WorkerView:
    return WorkerView(
        worker_id=f"{role}-{number:04}",
        role=role,
        address="10.1.2.3:4567",
        pid=4242,
        running=1,
        queued=2,
        queued_tokens=30,
        capacity_bytes=1000,
        used_bytes=250,
        draining=False,
        fingerprint=b"f" * 32,
        max_model_len=4096,
        bytes_per_token=3.5,
        metrics=metrics,
    )


async def test_the_picture_has_pools_store_and_hit_rate(api: Api) -> None:
    watched = Watched(api)
    watched.extra = [
        worker(
            1,
            "prefill",
            prefill_computed_tokens_total=300,
            prefill_cached_tokens_total=900,
            requests_total=4,
        ),
        worker(2, "decode", decode_generated_tokens_total=50, decode_attached_tokens_total=1200),
    ]
    watched.stat |= {"disk_capacity_bytes": 1000.0, "disk_used_bytes": 10.0}
    async with api.client() as client:
        got = await picture(client)
    assert got["object"] == "cluster"
    assert got["problems"] == []
    assert got["model"]["id"] == "fake"
    assert got["prefix_cache"] == {"cached_tokens": 900, "computed_tokens": 300, "hit_rate": 0.75}
    assert got["pools"]["prefill"]["workers"] == got["pools"]["decode"]["workers"] == 2
    assert got["pools"]["decode"]["queued"] == 2
    assert got["pools"]["decode"]["generated_tokens"] == 50
    assert [tier["name"] for tier in got["store"]["tiers"]] == ["memory", "disk"]
    assert got["store"]["hits"] == 7
    shown = {each["id"]: each for each in got["workers"]}
    assert shown["decode-0002"]["fetched_tokens"] == 1200
    # Where a worker listens and what its process is concerns nobody who may ask questions.
    text = str(got)
    assert "10.1.2.3" not in text and "4242" not in text and "in-process" not in text


async def test_however_many_watch_the_cluster_is_asked_twice_a_second(api: Api) -> None:
    watched = Watched(api)
    watched.pause_s = 0.05
    async with api.client() as client:
        for _ in range(3):
            await asyncio.gather(*(picture(client) for _ in range(40)))
        assert watched.asked == 1
        await asyncio.sleep(0.6)
        await asyncio.gather(*(picture(client) for _ in range(40)))
        assert watched.asked == 2


async def test_a_thousand_workers_are_summed_and_not_all_listed(api: Api) -> None:
    watched = Watched(api)
    watched.extra = [worker(n) for n in range(1000)]
    async with api.client() as client:
        got = await picture(client)
    assert len(got["workers"]) == 256
    assert got["workers_left_out"] == 1002 - 256
    assert got["pools"]["decode"]["workers"] == 1001
    assert got["pools"]["decode"]["running"] >= 1000


async def test_what_is_away_is_a_problem_and_no_error(api: Api) -> None:
    watched = Watched(api)
    watched.error = StoreUnavailableError("the store node cannot be reached (UNAVAILABLE)")
    async with api.client() as client:
        got = await picture(client)
    assert got["problems"] == ["the store node cannot be reached (UNAVAILABLE)"]
    assert got["store"] is None
    assert got["pools"]["decode"]["workers"] == 0
    assert got["prefix_cache"]["hit_rate"] is None


async def test_a_cluster_that_hangs_is_not_waited_for() -> None:
    api = make_api()
    watched = Watched(api)
    watched.pause_s = 30.0
    async with api.client() as client:
        async with asyncio.timeout(5):
            got = await picture(client)
    assert got["problems"] == ["the cluster did not answer within 3 s"]


async def test_watching_takes_the_scope_read_and_nothing_of_a_keys_quota(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"

    def key(scope: str) -> str:
        limits = KeyLimits(requests_per_minute=2)
        return add_key(
            path, lambda taken: new_key(tenant="a", limits=limits, taken=taken, scopes=(scope,))
        ).text

    reader, writer = key("read"), key("generate")
    api = make_api(api_keys_file=str(path))
    async with api.client(authorization=f"Bearer {reader}") as client:
        for _ in range(10):
            await picture(client)
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 429
        await picture(client)
    async with api.client(authorization=f"Bearer {writer}") as client:
        refused = await client.get("/cluster")
    assert refused.status_code == 403
    assert "scope 'read'" in refused.json()["error"]["message"]


async def test_streams_are_counted_while_they_run(api: Api) -> None:
    api.service.plan.token_pause_s = 0.2
    async with api.client() as client:
        body = chat(max_tokens=4, ignore_eos=True, stream=True)
        running = asyncio.create_task(client.post("/v1/chat/completions", json=body))
        await asyncio.sleep(0.3)
        assert (await picture(client))["front"]["streams"] == 1
        await running
        await asyncio.sleep(0.6)
        assert (await picture(client))["front"]["streams"] == 0
