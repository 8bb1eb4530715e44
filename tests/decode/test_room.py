"""Answers that outgrow their room: nothing is lost, nothing changes, memory is never exceeded."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model.fake import FakeEngine, FakeSettings
from penstock.errors import ContextLengthError, StoreUnavailableError
from penstock.request import Sampling
from tests.decode.pair import (
    DRAWN,
    GREEDY,
    Answer,
    Pair,
    eventually,
    failure,
    oracle,
    pair,
    prompt_of,
)

ROOM = 64


def bytes_for(tokens: int) -> int:
    return FakeEngine().bytes_for(tokens)


def ask(workers: Pair, length: int, tokens: int, sampling: Sampling, seed: int) -> Any:
    return workers.ask(
        prompt_of(length, seed), max_tokens=tokens, sampling=sampling, ignore_eos=True
    )


def assert_right(answer: Answer, length: int, tokens: int, sampling: Sampling, seed: int) -> None:
    want = oracle(prompt_of(length, seed), max_tokens=tokens, sampling=sampling, ignore_eos=True)
    assert answer.token_ids == want.token_ids
    assert answer.digests == want.digests
    assert answer.text == want.text
    starts = [0, *answer.indices]
    assert starts == sorted(starts)


@pytest.mark.parametrize("drafts", [0, 5])
async def test_an_answer_grows_and_is_the_same(drafts: int) -> None:
    settings = FakeSettings(draft_tokens=drafts)
    async with pair(settings=settings, decode={"answer_room_tokens": ROOM}) as workers:
        answer = await ask(workers, 500, 700, DRAWN, 3)
        assert_right(answer, 500, 700, DRAWN, 3)
        grown = workers.decode.counters["decode_grown_total"]
        print(f"700 tokens in room for {ROOM}: grown {grown} times")
        assert grown >= 8
        assert workers.decode.counters["decode_rested_total"] == 0
        await workers.settles()


async def test_no_room_for_all_of_them_to_grow_some_rest_and_all_end_the_same() -> None:
    """Three answers, memory for hardly more than one when they are whole."""
    lengths, tokens = (300, 340, 500), 900
    memory = int(1.3 * bytes_for(500 + tokens))
    limits = {"answer_room_tokens": ROOM, "kv_memory_bytes": max(memory, 1 << 16)}
    async with pair(decode=limits) as workers:
        workers.decode.admission._credits.capacity_bytes = memory
        workers.decode.admission.capacity_bytes = memory
        answers = await asyncio.gather(
            *(ask(workers, n, tokens, (GREEDY, DRAWN)[n % 3 == 0], n) for n in lengths)
        )
        for answer, n in zip(answers, lengths, strict=True):
            assert_right(answer, n, tokens, (GREEDY, DRAWN)[n % 3 == 0], n)
        counters = workers.decode.counters
        print(
            f"rested {counters['decode_rested_total']} times, "
            f"replayed {counters['decode_replayed_tokens_total']} tokens"
        )
        assert counters["decode_rested_total"] >= 1
        assert workers.decode.batch.unfed_tokens == 0
        await workers.settles()


async def test_who_could_never_be_whole_is_refused_at_once() -> None:
    limits = {"answer_room_tokens": ROOM, "kv_memory_bytes": 1 << 16}
    async with pair(decode=limits) as workers:
        error = await failure(ask(workers, 300, 20_000, GREEDY, 1))
        assert isinstance(error, ContextLengthError)


async def test_a_store_that_takes_nothing_makes_nobody_lose_its_answer() -> None:
    """Nobody can rest then: those that need room wait for one another's end, and for the store."""
    memory = int(1.3 * bytes_for(300 + 900))
    limits = {"answer_room_tokens": ROOM, "kv_memory_bytes": max(memory, 1 << 16)}
    async with pair(decode=limits, settings=FakeSettings(decode_step_ms=2)) as workers:
        workers.decode.admission._credits.capacity_bytes = memory
        workers.decode.admission.capacity_bytes = memory
        answers = [asyncio.create_task(ask(workers, 300, 900, GREEDY, n)) for n in (1, 2)]
        await eventually(lambda: workers.decode.counters["decode_attached_tokens_total"] == 600)
        put = workers.store.put

        async def refuse(*args: Any, **kwargs: Any) -> bool:
            raise StoreUnavailableError("gone for a while")

        workers.store.put = refuse  # type: ignore[method-assign]
        await asyncio.sleep(0.6)
        workers.store.put = put  # type: ignore[method-assign]
        for answer, n in zip(await asyncio.gather(*answers), (1, 2), strict=True):
            assert_right(answer, 300, 900, GREEDY, n)
        await workers.settles()


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    jobs=st.lists(
        st.tuples(st.integers(1, 900), st.integers(1, 500), st.booleans(), st.floats(0, 0.1)),
        min_size=2,
        max_size=6,
    ),
    spare=st.floats(1.0, 2.5),
    room=st.sampled_from([16, 64, 200]),
    gone=st.lists(st.integers(0, 5), max_size=2),
)
def test_any_mix_of_answers_ends_right_in_any_memory(
    jobs: list[tuple[int, int, bool, float]], spare: float, room: int, gone: list[int]
) -> None:
    memory = int(spare * max(bytes_for(length + tokens) for length, tokens, _, _ in jobs))
    limits = {"answer_room_tokens": room, "kv_memory_bytes": 1 << 20}

    async def run() -> None:
        async with pair(decode=limits) as workers:
            workers.decode.admission._credits.capacity_bytes = memory
            workers.decode.admission.capacity_bytes = memory
            most = 0

            async def watch() -> None:
                nonlocal most
                while True:
                    most = max(most, workers.decode.admission.reserved_bytes)
                    await asyncio.sleep(0.001)

            async def one(number: int) -> None:
                length, tokens, drawn, after_s = jobs[number]
                sampling = DRAWN if drawn else GREEDY
                await asyncio.sleep(after_s)
                asking = asyncio.create_task(ask(workers, length, tokens, sampling, number))
                if number in gone:
                    await asyncio.sleep(after_s)
                    asking.cancel()
                    await asyncio.gather(asking, return_exceptions=True)
                    return
                assert_right(await asking, length, tokens, sampling, number)

            watching = asyncio.create_task(watch())
            await asyncio.gather(*(one(number) for number in range(len(jobs))))
            watching.cancel()
            assert most <= memory
            await workers.settles(within_s=4.0)

    asyncio.run(run())
