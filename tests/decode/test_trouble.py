"""Cancels, failures and refusals through the gRPC door: clean errors, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from itertools import pairwise

import pytest

from decode.batch import Batch
from decode.output import Output
from decode.stream import Stream, Wishes
from model.engine import Segment
from model.fake import FakeEngine, FakeSettings
from penstock.errors import (
    ContextLengthError,
    DeadlineError,
    FingerprintMismatchError,
    InvalidRequestError,
    OverloadedError,
    PenstockError,
    StoreUnavailableError,
    WorkerUnavailableError,
)
from penstock.request import StopRule
from protos.penstock.worker.v1 import worker_pb2
from tests.decode.pair import (
    GREEDY,
    Pair,
    eventually,
    failure,
    memory_store,
    oracle,
    pair,
    prompt_of,
)

SLOW = FakeSettings(prefill_tokens_per_s=40_000, decode_step_ms=2)


async def cancelled_after(workers: Pair, seconds: float, length: int) -> None:
    asking = asyncio.create_task(workers.ask(prompt_of(length), max_tokens=200, ignore_eos=True))
    await asyncio.sleep(seconds)
    asking.cancel()
    with contextlib.suppress(asyncio.CancelledError, PenstockError):
        await asking


@pytest.mark.parametrize("seed", range(4))
async def test_a_cancel_at_any_moment_gives_everything_back(seed: int) -> None:
    draw = random.Random(seed)
    async with pair(settings=SLOW, decode={"max_running": 3}) as workers:
        await asyncio.gather(
            *(
                cancelled_after(workers, draw.random() * 0.5, draw.randrange(1, 6000))
                for _ in range(12)
            )
        )
        await workers.settles()
        prompt = prompt_of(500)
        got = await workers.ask(prompt)
        assert got.token_ids == oracle(prompt, max_tokens=24).token_ids
        await workers.settles()


async def test_a_cancel_while_waiting_for_prefill_gives_everything_back() -> None:
    async with pair() as workers:
        asking = asyncio.create_task(workers.ask(prompt_of(900), prefill=False))
        await eventually(lambda: workers.decode.admission.running)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await workers.settles()
        assert workers.decode.metrics()["requests_cancelled_total"] == 1


async def test_a_cancel_while_waiting_for_credit_gives_everything_back() -> None:
    async with pair(decode={"max_running": 1}) as workers:
        holding = asyncio.create_task(workers.ask(prompt_of(300), prefill=False))
        waiting = asyncio.create_task(workers.ask(prompt_of(300)))
        await eventually(lambda: workers.decode.admission.queued)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await eventually(lambda: not workers.decode.admission.queued)
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        await workers.settles()


async def test_a_prompt_that_nobody_reads_ends_in_a_deadline_error() -> None:
    async with pair() as workers:
        error = await failure(workers.ask(prompt_of(900), prefill=False, prefill_timeout_ms=200))
        assert isinstance(error, DeadlineError)
        assert "did not appear" in error.message
        await workers.settles()


async def test_without_a_store_both_workers_say_so() -> None:
    store = memory_store(FakeEngine())
    async with pair(store=store) as workers:
        store.reachable = False
        for asking in (workers.ask(prompt_of(900)), workers.read(prompt_of(900))):
            error = await failure(asking)
            assert isinstance(error, StoreUnavailableError)
            assert "store" in error.message
        store.reachable = True
        await workers.settles()
        assert (await workers.ask(prompt_of(900))).token_ids


async def test_a_store_that_goes_while_prefill_runs_fails_the_prompt() -> None:
    store = memory_store(FakeEngine())
    async with pair(store=store, settings=FakeSettings(prefill_tokens_per_s=20_000)) as workers:
        reading = asyncio.create_task(failure(workers.read(prompt_of(8000))))
        await asyncio.sleep(0.1)
        store.reachable = False
        error = await reading
        assert isinstance(error, StoreUnavailableError)
        store.reachable = True
        assert workers.held() == dict.fromkeys(workers.held(), 0)
        assert workers.prefill.metrics()["requests_failed_total"] == 1


async def test_a_store_that_goes_while_decode_writes_does_not_end_the_stream() -> None:
    store = memory_store(FakeEngine())
    prompt = prompt_of(700)
    async with pair(store=store) as workers:

        def lose() -> None:
            store.reachable = False

        got = await workers.ask(prompt, max_tokens=400, ignore_eos=True, on_tokens=lose)
        assert got.token_ids == oracle(prompt, max_tokens=400, ignore_eos=True).token_ids
        assert workers.decode.metrics()["decode_publish_failures_total"] >= 1
        assert workers.held() == dict.fromkeys(workers.held(), 0)


async def test_a_request_for_another_fingerprint_is_refused() -> None:
    async with pair() as workers:
        workers.fingerprint = b"x" * 32
        for asking in (workers.ask([1, 2, 3]), workers.read([1, 2, 3])):
            assert isinstance(await failure(asking), FingerprintMismatchError)


async def test_what_can_never_fit_is_refused_at_once() -> None:
    settings = FakeSettings(max_model_len=20_000)
    memory = {"kv_memory_bytes": 1 << 16}
    async with pair(settings=settings, decode=memory, prefill=memory) as workers:
        too_long = await failure(workers.ask(prompt_of(19_900), max_tokens=200))
        assert isinstance(too_long, ContextLengthError)
        assert "context" in too_long.message
        for asking in (workers.ask(prompt_of(9000)), workers.read(prompt_of(9000))):
            too_large = await failure(asking)
            assert isinstance(too_large, ContextLengthError)
            assert "bytes of cache" in too_large.message
        await workers.settles()


@pytest.mark.parametrize(
    ("tokens", "fields", "says"),
    [
        ([], {}, "empty"),
        ([257], {}, "vocabulary"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"min_tokens": 99}, "min_tokens"),
        ([1], {"stop": ["x"] * 17}, "stop"),
    ],
)
async def test_wrong_requests_are_refused_in_a_sentence(
    tokens: list[int], fields: dict[str, object], says: str
) -> None:
    async with pair() as workers:
        error = await failure(workers.ask(tokens, **fields))  # type: ignore[arg-type]
        assert isinstance(error, InvalidRequestError)
        assert says in error.message


async def test_a_full_line_is_refused_with_a_time_to_come_back() -> None:
    async with pair(decode={"max_running": 1, "max_queued": 1}) as workers:
        asked = [asyncio.create_task(workers.ask(prompt_of(300), prefill=False)) for _ in range(2)]
        await eventually(lambda: workers.decode.admission.queued)
        full = await failure(workers.ask(prompt_of(300)))
        assert isinstance(full, OverloadedError)
        assert full.retry_after_s is not None
        assert full.retry_after_s >= 1
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        await workers.settles()


async def test_waiting_for_credit_in_vain_is_an_overload() -> None:
    async with pair(decode={"max_running": 1}) as workers:
        holding = asyncio.create_task(workers.ask(prompt_of(300), prefill=False))
        await eventually(lambda: workers.decode.admission.running)
        error = await failure(workers.ask(prompt_of(300), admission_timeout_ms=100))
        assert isinstance(error, OverloadedError)
        holding.cancel()
        await asyncio.gather(holding, return_exceptions=True)
        await workers.settles()


async def test_a_grant_that_nobody_uses_goes_to_the_next() -> None:
    async with pair(decode={"max_running": 1, "grant_ttl_s": 0.3}) as workers:
        unused = asyncio.create_task(failure(workers.ask(prompt_of(300), prefill=False)))
        await eventually(lambda: workers.decode.admission.running)
        answer = await workers.ask(prompt_of(300, 2), max_tokens=4, ignore_eos=True)
        assert len(answer.token_ids) == 4
        error = await unused
        assert isinstance(error, OverloadedError)
        assert (error.reason, error.retry_after_s is not None) == ("grant_expired", True)
        # One that is used may take longer than that.
        slow = oracle(prompt_of(300, 3), max_tokens=60, ignore_eos=True)
        workers.decode_engine._settings = FakeSettings(decode_step_ms=10)
        answer = await workers.ask(prompt_of(300, 3), max_tokens=60, ignore_eos=True)
        assert answer.token_ids == slow.token_ids
        await workers.settles()


async def test_a_line_that_is_predicted_to_take_too_long_is_refused_at_once() -> None:
    async with pair(decode={"max_running": 1}) as workers:
        workers.decode_engine._settings = FakeSettings(decode_step_ms=10)
        await workers.ask(prompt_of(300), max_tokens=40, ignore_eos=True)
        running = [
            asyncio.create_task(workers.ask(prompt_of(300, n), max_tokens=40, ignore_eos=True))
            for n in range(3)
        ]
        await eventually(lambda: workers.decode.admission.queued == 2)
        error = await failure(workers.ask(prompt_of(300), admission_timeout_ms=500))
        assert isinstance(error, OverloadedError)
        assert error.reason == "predicted_wait"
        assert error.retry_after_s is not None and error.retry_after_s >= 1
        print(error.message)
        await asyncio.gather(*running)
        await workers.settles()


async def test_a_failing_step_ends_its_streams_and_the_worker_goes_on() -> None:
    async with pair() as workers:
        forward = workers.decode_engine.forward
        calls = 0

        def fail_once(segments: list[Segment]) -> object:
            nonlocal calls
            calls += 1
            if calls == 3:
                raise RuntimeError("device lost")
            return forward(segments)

        workers.decode_engine.forward = fail_once  # type: ignore[assignment,method-assign]
        error = await failure(workers.ask(prompt_of(300), ignore_eos=True))
        assert "device lost" in error.message
        await workers.settles()
        prompt = prompt_of(301)
        got = await workers.ask(prompt)
        assert got.token_ids == oracle(prompt, max_tokens=24).token_ids


async def test_a_draining_worker_ends_its_work_and_takes_no_more() -> None:
    async with pair(settings=SLOW) as workers:
        prompt = prompt_of(700)
        asking = asyncio.create_task(workers.ask(prompt, max_tokens=100, ignore_eos=True))
        await eventually(lambda: workers.decode.batch.generated_tokens)
        draining = asyncio.create_task(workers.decode.drain(10))
        await asyncio.sleep(0.02)
        assert isinstance(await failure(workers.ask(prompt)), WorkerUnavailableError)
        assert await draining
        assert len((await asking).token_ids) == 100


async def test_a_long_attach_does_not_hold_up_a_stream() -> None:
    """Blocks of a 200,000 token prompt arrive while another answer is being written."""
    async with pair(prefill={"chunk_tokens": 8192}) as workers:
        long, short = prompt_of(200_000), prompt_of(300)
        await workers.read(long)
        loop = asyncio.get_running_loop()
        stamps: list[float] = []
        asking = asyncio.create_task(
            workers.ask(
                short,
                max_tokens=600,
                ignore_eos=True,
                on_tokens=lambda: stamps.append(loop.time()),
            )
        )
        await eventually(lambda: stamps)
        await workers.ask(long, max_tokens=1)
        await asking
        gaps = sorted(b - a for a, b in pairwise(stamps))
        print(f"gaps between tokens: median {gaps[len(gaps) // 2]:.4f} s, worst {gaps[-1]:.4f} s")
        assert gaps[-1] < 1.0


async def test_leases_outlive_their_ttl_while_work_goes_on() -> None:
    settings = FakeSettings(prefill_tokens_per_s=8_000)
    async with pair(settings=settings) as workers:
        prompt = workers.prompt(prompt_of(8000))
        call = workers.prefill_stub.Run(
            worker_pb2.PrefillRequest(prompt=prompt, lease_ttl_ms=200), timeout=30
        )
        leases = [
            (await workers.store.stat()).leases
            async for event in call
            if event.WhichOneof("event") == "progress"
        ]
        # Blocks alone: two a chunk of 512, all of them still leased at the end of the last one.
        assert leases[-2] >= 2 * (len(leases) - 1)
        await asyncio.sleep(0.3)
        assert (await workers.store.stat()).leases == 0


async def test_a_batch_that_stops_answers_all_who_wait() -> None:
    engine = FakeEngine(FakeSettings(decode_step_ms=20))
    batch = Batch(engine)
    batch.start()
    sequence = engine.open(100)
    engine.forward([Segment(sequence, [1, 2, 3])])
    output = Output(StopRule(50, ignore_eos=True), engine.info.eos_token_ids, None)
    stream = Stream(sequence, GREEDY, output, Wishes(), lambda position, payload: None)
    batch.join(stream)
    await stream.take()
    late = batch.submit(time.sleep, 0.01)
    await batch.stop()
    await batch.stop()
    done, waiting = await asyncio.wait({late}, timeout=1)
    assert done and not waiting
    late.exception()
    with pytest.raises(WorkerUnavailableError):
        while await stream.take():
            pass
    with pytest.raises(WorkerUnavailableError):
        batch.submit(time.sleep, 0)


async def test_cancels_do_not_disturb_the_company() -> None:
    async with pair(settings=SLOW) as workers:
        prompt, draw = prompt_of(400), random.Random(5)
        asking = asyncio.create_task(workers.ask(prompt, max_tokens=300, ignore_eos=True))
        await eventually(lambda: workers.decode.batch.generated_tokens)
        await asyncio.gather(
            *(cancelled_after(workers, draw.random() * 0.6, 200 + seed) for seed in range(40))
        )
        got = await asking
        assert got.token_ids == oracle(prompt, max_tokens=300, ignore_eos=True).token_ids
        assert workers.decode.metrics()["requests_failed_total"] == 0
        await workers.settles()


async def test_work_that_comes_during_a_turn_waits_for_the_next() -> None:
    """A release in the middle of a turn would take the sequence away under the turn's step."""
    engine = FakeEngine()
    batch = Batch(engine)
    batch.start()
    loop = asyncio.get_running_loop()
    streams = []
    for _ in range(2):
        sequence = engine.open(600)
        engine.forward([Segment(sequence, [1, 2, 3])])
        output = Output(StopRule(500, ignore_eos=True), engine.info.eos_token_ids, None)
        streams.append(Stream(sequence, GREEDY, output, Wishes(), lambda position, payload: None))
        batch.join(streams[-1])
    leaver, stayer = streams
    await leaver.take()

    def leave() -> None:
        batch.leave(leaver)
        batch.submit(engine.release, leaver.sequence)

    def slow() -> None:
        # On the engine's thread: the turn has its streams already when the release comes.
        loop.call_soon_threadsafe(leave)
        time.sleep(0.003)

    await batch.submit(slow)
    while await stayer.take():
        pass
    assert len(stayer.tokens) == 500
    await batch.stop()


async def test_whoever_has_been_attached_takes_part_in_the_very_next_step() -> None:
    engine = FakeEngine(FakeSettings(decode_step_ms=20))
    batch = Batch(engine)
    batch.start()

    def stream() -> Stream:
        sequence = engine.open(600)
        engine.forward([Segment(sequence, [1, 2, 3], states_at=(3,))])
        output = Output(StopRule(50, ignore_eos=True), engine.info.eos_token_ids, None)
        return Stream(sequence, GREEDY, output, Wishes(), lambda position, payload: None)

    company = stream()
    batch.join(company)
    await company.take()
    for _ in range(5):
        fresh = stream()
        # The last piece of an attach: when it has been done, a step is about to begin.
        await batch.submit(engine.export_state, fresh.sequence)
        steps = batch.steps
        batch.join(fresh)
        await fresh.take()
        assert batch.steps == steps + 1
        batch.leave(fresh)
    await batch.stop()
