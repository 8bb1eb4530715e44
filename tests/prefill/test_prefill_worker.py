"""The prefill worker through its gRPC door: fairness, overload, cancel, process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from kvstore.config import StoreConfig
from kvstore.directory_client import DirectoryClient
from kvstore.server import start_server
from model.fake import FakeEngine, FakeSettings
from penstock.errors import OverloadedError, PenstockError
from protos.penstock.kv.v1 import kv_pb2
from tests.decode.pair import eventually, failure, memory_store, pair, prompt_of, spec


async def test_a_long_prompt_does_not_hold_up_a_short_one() -> None:
    settings = FakeSettings(prefill_tokens_per_s=20_000)
    async with pair(settings=settings) as workers:
        loop = asyncio.get_running_loop()
        long = asyncio.create_task(workers.read(prompt_of(40_000)))
        await asyncio.sleep(0.2)
        begun = loop.time()
        await workers.read(prompt_of(100, seed=4))
        took_s = loop.time() - begun
        assert not long.done()
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)
        await eventually(lambda: not any(workers.held().values()))
    print(f"short prompt beside a 2 s prompt: {took_s * 1e3:.0f} ms (a chunk is 26 ms)")
    assert took_s < 0.5


@pytest.mark.parametrize("seed", range(3))
async def test_cancelled_prompts_give_everything_back(seed: int) -> None:
    draw = random.Random(seed)
    settings = FakeSettings(prefill_tokens_per_s=40_000)
    async with pair(settings=settings, prefill={"max_running": 3}) as workers:

        async def one(number: int) -> None:
            reading = asyncio.create_task(workers.read(prompt_of(draw.randrange(1, 9000), number)))
            await asyncio.sleep(draw.random() * 0.4)
            reading.cancel()
            with contextlib.suppress(asyncio.CancelledError, PenstockError):
                await reading

        await asyncio.gather(*(one(number) for number in range(10)))
        await eventually(lambda: not any(workers.held().values()), within_s=2)
        for name in workers.names:
            # What completed keeps its leases for decode; the others must have none.
            await workers.store.release(name)
        assert (await workers.store.stat()).leases == 0


async def test_a_full_line_is_refused_with_a_time_to_come_back() -> None:
    settings = FakeSettings(prefill_tokens_per_s=5_000)
    limits = {"max_running": 1, "max_queued": 1}
    async with pair(settings=settings, prefill=limits) as workers:
        asked = [asyncio.create_task(workers.read(prompt_of(9000, seed))) for seed in (1, 2)]
        await eventually(lambda: workers.prefill.scheduler.queued)
        error = await failure(workers.read(prompt_of(100)))
        assert isinstance(error, OverloadedError)
        assert error.retry_after_s is not None
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await eventually(lambda: not any(workers.held().values()))


async def test_blocks_lost_while_prefill_runs_are_put_again() -> None:
    """The node forgets everything in the middle, as after a restart; decode still gets it all."""
    store = memory_store(FakeEngine())
    settings = FakeSettings(prefill_tokens_per_s=20_000)
    async with pair(store=store, settings=settings) as workers:
        prompt = prompt_of(6000)
        reading = asyncio.create_task(workers.read(prompt))
        await asyncio.sleep(0.15)
        catalog = store.node._catalog
        store.node.release(workers.names[0])
        for id_ in catalog.ids():
            catalog._remove(catalog.entry(id_))  # type: ignore[arg-type]
        store.node._let_go()
        await reading
        again = await workers.read(prompt)
        assert again.cached_tokens == 6000


async def test_a_worker_registers_serves_health_and_leaves() -> None:
    node = await start_server(StoreConfig())
    directory = DirectoryClient(node.address)
    try:
        from prefill.worker import open_worker

        worker = await open_worker(spec("p-1", store_address=node.address, heartbeat_s=0.05))
        address = await worker.start()
        worker.check()
        (entry,) = await directory.list()
        assert (entry.worker_id, entry.address) == ("p-1", address)
        assert entry.role == kv_pb2.WORKER_ROLE_PREFILL
        async with grpc.aio.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
            assert await worker.drain(1)
            assert (await directory.list())[0].draining
            answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
        await worker.stop()
        await worker.stop()
        assert await directory.list() == []
        with pytest.raises(PenstockError):
            worker.check()
    finally:
        await directory.close()
        await node.stop()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_worker_process_ends_with_its_leash_and_with_sigterm(role: str) -> None:
    node = await start_server(StoreConfig())
    try:
        for by_signal in (False, True):
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                role,
                "--spec-stdin",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            assert process.stdin and process.stdout
            text = spec(f"{role}-x", store_address=node.address).model_dump_json()
            process.stdin.write(text.encode() + b"\n")
            ready = await asyncio.wait_for(process.stdout.readline(), 30)
            assert ready.startswith(b"ready 127.0.0.1:")
            if by_signal:
                os.kill(process.pid, signal.SIGTERM)
            else:
                process.stdin.close()
            assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        await node.stop()


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_model_that_is_not_there_is_one_sentence_and_exit_code_1(role: str) -> None:
    text = spec("x").model_dump_json().replace('"fake"', '"no/such/folder"')
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", role, "--spec-json", text, stderr=asyncio.subprocess.PIPE
    )
    _, stderr = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert stderr.decode().startswith("error: no model at 'no/such/folder'")
    assert len(stderr.decode().strip().splitlines()) == 1
