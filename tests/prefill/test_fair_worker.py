"""The worker's promises through its gRPC door, counted in steps of the engine, never in seconds."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence as Seq

import pytest

from model.engine import Segment, SegmentResult
from model.fake import FakeEngine, FakeSettings
from penstock.errors import OverloadedError
from protos.penstock.worker.v1 import worker_pb2
from tests.decode.pair import (
    Answer,
    Pair,
    eventually,
    failure,
    memory_store,
    oracle,
    pair,
    prompt_of,
)

NORMAL, INTERACTIVE, BATCH = 2, 1, 3
SLOW = FakeSettings(prefill_tokens_per_s=60_000)


class Log:
    """What each step of the prefill engine read: tokens by sequence."""

    def __init__(self, engine: FakeEngine) -> None:
        self.steps: list[dict[int, int]] = []
        self._forward = engine.forward
        engine.forward = self.forward  # type: ignore[method-assign]

    def forward(self, segments: Seq[Segment]) -> list[SegmentResult]:
        self.steps.append({s.sequence.capacity: len(s.tokens) for s in segments})
        return self._forward(segments)

    def tokens(self, length: int, since: int = 0) -> int:
        """How many of the prompt of this length were read."""
        return sum(step.get(length, 0) for step in self.steps[since:])


def ask(
    workers: Pair, length: int, *, tenant: bytes = b"a", priority: int = NORMAL, seed: int = 1
) -> asyncio.Task[Answer]:
    prompt = workers.prompt(prompt_of(length, seed))
    prompt.tenant, prompt.priority = tenant, worker_pb2.Priority.ValueType(priority)
    return asyncio.create_task(workers.read([], prompt=prompt))


@contextlib.asynccontextmanager
async def ended(*tasks: asyncio.Task[Answer]):  # type: ignore[no-untyped-def]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_1k_prompt_beside_million_token_prompts_is_in_the_next_step() -> None:
    async with pair(settings=SLOW, prefill={"chunk_tokens": 2048}) as workers:
        log = Log(workers.prefill_engine)
        # Eight at once, which is more than the worker takes in: a stream of them.
        long = [ask(workers, 1_000_000 - seed, seed=seed) for seed in range(8)]
        async with ended(*long):
            await eventually(lambda: len(log.steps) > 3)
            for seed in range(4):
                before = len(log.steps)
                answer = await ask(
                    workers, 1000 + seed, tenant=b"ab"[seed % 2 :][:1], seed=90 + seed
                )
                waited = next(n for n, step in enumerate(log.steps[before:]) if 1000 + seed in step)
                steps = sum(1000 + seed in step for step in log.steps)
                print(f"a 1k prompt: {waited} steps before its own, {steps} of its own")
                assert answer.computed_tokens == 1000 + seed
                # The one under way, perhaps one planned while it was hashed and looked up.
                assert waited <= 2 and steps == 1
        await eventually(lambda: not any(workers.held().values()))


async def test_two_tenants_with_ten_to_one_load_share_one_to_one() -> None:
    limits = {"max_running": 12, "chunk_tokens": 1024}
    async with pair(settings=SLOW, prefill=limits) as workers:
        log = Log(workers.prefill_engine)
        much = [ask(workers, 50_000 + n, tenant=b"much", seed=n) for n in range(10)]
        async with ended(*much):
            await eventually(lambda: len(log.steps) > 2)
            little = ask(workers, 40_000, tenant=b"little", seed=77)
            async with ended(little):
                await eventually(lambda: log.tokens(40_000))
                since = len(log.steps)
                await eventually(lambda: len(log.steps) > since + 20)
                upto = log.steps[since : since + 20]
    one = sum(step.get(40_000, 0) for step in upto)
    other = sum(sum(step.values()) for step in upto) - one
    print(f"of 20 steps the tenant with one prompt had {one} tokens, that with ten {other}")
    assert abs(one - other) <= 2 * 1024


async def test_a_better_class_goes_first_and_sends_a_worse_one_to_rest() -> None:
    """Memory for one of them: the batch prompt rests, comes back to where it was, and is right."""
    length = 20_000
    size_bytes = FakeEngine().bytes_for(length)
    limits = {"kv_memory_bytes": int(size_bytes * 1.5), "chunk_tokens": 1024}
    async with pair(settings=SLOW, prefill=limits) as workers:
        log = Log(workers.prefill_engine)
        batch = ask(workers, length, priority=BATCH, seed=5)
        await eventually(lambda: log.tokens(length) > 4000)
        urgent = ask(workers, length - 7, priority=INTERACTIVE, seed=6)
        async with ended(batch, urgent):
            await urgent
            assert not batch.done()
            at = log.tokens(length)
            answer = await batch
        print(f"rested at {at} of {length} tokens, computed {answer.computed_tokens} in all")
        assert workers.prefill.scheduler.rests == 1
        assert answer.computed_tokens == length, "what it had read was read again"
        assert answer.progress == sorted(set(answer.progress))
        again = await workers.ask(prompt_of(length, 5), max_tokens=12, ignore_eos=True)
        assert (
            again.token_ids
            == oracle(prompt_of(length, 5), max_tokens=12, ignore_eos=True).token_ids
        )
        await workers.store.release("request-0")
        await workers.store.release("request-1")
        await workers.settles()


async def test_the_same_prompt_ten_times_at_once_is_read_once() -> None:
    async with pair(settings=SLOW) as workers:
        answers = await asyncio.gather(*(ask(workers, 9000) for _ in range(10)))
        computed = [answer.computed_tokens for answer in answers]
        print(f"computed {computed}")
        assert sum(computed) == 9000
        assert workers.prefill.runner.in_flight.waits >= 9
        assert len(workers.prefill.runner.in_flight) == 0


async def test_questions_about_one_document_read_it_once_and_part_where_they_differ() -> None:
    document = prompt_of(8192 + 300, 3)
    async with pair(settings=SLOW) as workers:

        async def question(seed: int) -> Answer:
            prompt = workers.prompt([*document, *prompt_of(600, 50 + seed)])
            return await workers.read([], prompt=prompt)

        answers = await asyncio.gather(*(question(seed) for seed in range(5)))
        computed = sum(answer.computed_tokens for answer in answers)
        shared = len(document) // 256 * 256
        alone = len(document) + 600
        print(f"5 prompts of {alone} tokens with {shared} in common: {computed} computed")
        assert computed == alone + 4 * (alone - shared)


@pytest.mark.parametrize("way", ["cancelled", "failed"])
async def test_when_the_first_one_dies_the_next_takes_over(way: str) -> None:
    async with pair(settings=SLOW, store=memory_store(FakeEngine())) as workers:
        log = Log(workers.prefill_engine)
        first = ask(workers, 30_000)
        await eventually(lambda: log.tokens(30_000) > 3000)
        others = [ask(workers, 30_000) for _ in range(3)]
        async with ended(first, *others):
            await eventually(lambda: workers.prefill.runner.in_flight.waits == 3)
            at = log.tokens(30_000)
            await eventually(lambda: log.tokens(30_000) > at + 3000)
            if way == "cancelled":
                first.cancel()
            else:

                def broken(segments: Seq[Segment]) -> list[SegmentResult]:
                    workers.prefill_engine.forward = log.forward  # type: ignore[method-assign]
                    raise RuntimeError("the device is on fire")

                workers.prefill_engine.forward = broken  # type: ignore[method-assign]
            await asyncio.gather(first, return_exceptions=True)
            answers = await asyncio.gather(*others)
        computed = sum(answer.computed_tokens for answer in answers)
        print(f"the others computed {computed} of 30000 tokens after the first had {way}")
        assert computed < 30_000 - 2000, "what the first had committed was read again"
        await eventually(lambda: not any(workers.held().values()))


async def test_a_prompt_lends_its_class_to_the_one_it_waits_for() -> None:
    async with pair(settings=SLOW) as workers:
        log = Log(workers.prefill_engine)
        normal = [ask(workers, 60_000 + n, seed=n, tenant=b"n") for n in range(2)]
        batch = ask(workers, 9000, priority=BATCH, seed=40)
        async with ended(*normal, batch):
            await eventually(lambda: len(log.steps) > 3)
            urgent = ask(workers, 9000, priority=INTERACTIVE, seed=40)
            await urgent
            assert not any(task.done() for task in normal)


async def test_a_wait_that_is_predicted_to_be_too_long_is_refused_at_once() -> None:
    async with pair(settings=SLOW) as workers:
        long = [ask(workers, 200_000 + n, seed=n) for n in range(3)]
        async with ended(*long):
            await eventually(lambda: workers.prefill.scheduler.tokens_per_s > 0)
            await eventually(lambda: workers.prefill.scheduler.running == 3)
            prompt = workers.prompt(prompt_of(300_000, 9))
            call = workers.prefill_stub.Run(
                worker_pb2.PrefillRequest(prompt=prompt, lease_ttl_ms=5000, most_wait_ms=500)
            )

            async def read() -> None:
                from tests.decode.pair import mapped_errors

                with mapped_errors():
                    async for _ in call:
                        pass

            error = await failure(read())
            assert isinstance(error, OverloadedError)
            assert error.reason == "predicted_wait"
            assert error.retry_after_s is not None and error.retry_after_s >= 1
            print(error.message)
            # A short one goes in front of them: nothing to refuse.
            prompt = workers.prompt(prompt_of(900, 9))
            call = workers.prefill_stub.Run(
                worker_pb2.PrefillRequest(prompt=prompt, lease_ttl_ms=5000, most_wait_ms=500)
            )
            await read()
