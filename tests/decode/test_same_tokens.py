"""The same token, whichever way it came: workers against a plain loop over one engine."""

from __future__ import annotations

import asyncio

import pytest

from kvstore.client import StoreClient
from kvstore.config import StoreConfig
from kvstore.server import start_server
from model.fake import FakeEngine
from penstock.request import Sampling
from tests.decode.pair import DRAWN, GREEDY, Answer, memory_store, oracle, pair, prompt_of


def assert_same(got: Answer, want: Answer) -> None:
    assert got.token_ids == want.token_ids
    assert got.digests == want.digests
    assert (got.text, got.reason) == (want.text, want.reason)
    assert got.completion_tokens == len(want.token_ids)


@pytest.mark.parametrize("length", [1, 3, 127, 128, 129, 255, 256, 257, 512, 1000, 2048, 2051])
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
async def test_a_cold_answer_is_the_plain_loops(length: int, sampling: Sampling) -> None:
    prompt = prompt_of(length)
    async with pair() as workers:
        got = await workers.ask(prompt, sampling=sampling, max_tokens=40)
        assert_same(got, oracle(prompt, max_tokens=40, sampling=sampling))
        assert (got.cached_tokens, got.computed_tokens) == (0, length)
        assert workers.decode.metrics()["decode_prompt_tokens_computed_total"] == 0
        await workers.settles()


@pytest.mark.parametrize("chunk_tokens", [16, 100, 128, 256, 300, 4096])
async def test_chunk_size_does_not_change_the_answer(chunk_tokens: int) -> None:
    prompt = prompt_of(1111)
    async with pair(prefill={"chunk_tokens": chunk_tokens}) as workers:
        got = await workers.ask(prompt, max_tokens=40)
        assert_same(got, oracle(prompt, max_tokens=40))
        assert got.progress == sorted(got.progress)
        assert got.progress[-1] == 1111


@pytest.mark.parametrize(
    ("first", "shared", "boundaries", "cached"),
    [
        pytest.param(3000, 3000, (), 2944, id="prompt end rounded down"),
        pytest.param(3072, 3072, (), 3072, id="the whole prompt"),
        pytest.param(3000, 2400, (), 2304, id="one of the last 8 borders"),
        pytest.param(3000, 700, (650,), 640, id="message boundary"),
        pytest.param(9000, 8500, (), 8448, id="last border beside the period"),
        pytest.param(20000, 8300, (), 8192, id="every 8192 tokens"),
        pytest.param(12000, 9000, (), 8832, id="replayed beyond it"),
    ],
)
async def test_a_prefix_hit_at_every_kind_of_boundary_gives_the_same_tokens(
    first: int, shared: int, boundaries: tuple[int, ...], cached: int
) -> None:
    head = prompt_of(first)
    async with pair(prefill={"chunk_tokens": 2048}) as workers:
        await workers.ask(head, boundaries=boundaries, max_tokens=1)
        prompt = head[:shared] + ([] if shared == cached else prompt_of(77, seed=9))
        got = await workers.ask(prompt, max_tokens=40, boundaries=boundaries)
        assert got.cached_tokens == cached
        assert got.cached_tokens + got.computed_tokens == len(prompt)
        assert_same(got, oracle(prompt, max_tokens=40))
        await workers.settles()


async def test_company_does_not_change_the_answer() -> None:
    prompts = [prompt_of(length, seed=length) for length in (700, 1500, 64, 2300)]
    samplings = [GREEDY, DRAWN, GREEDY, Sampling(temperature=0.7, seed=3)]
    async with pair() as workers:
        answers = await asyncio.gather(
            *(
                workers.ask(prompt, sampling=sampling, max_tokens=60, ignore_eos=True)
                for prompt, sampling in zip(prompts, samplings, strict=True)
            )
        )
        for answer, prompt, sampling in zip(answers, prompts, samplings, strict=True):
            want = oracle(prompt, max_tokens=60, sampling=sampling, ignore_eos=True)
            assert_same(answer, want)
        await workers.settles()


async def test_two_twins_at_once_get_the_same_answer() -> None:
    prompt = prompt_of(2000)
    async with pair() as workers:
        answers = await asyncio.gather(*(workers.ask(prompt) for _ in range(4)))
        for answer in answers:
            assert_same(answer, oracle(prompt, max_tokens=24))


@pytest.mark.parametrize("answer_tokens", [10, 130, 256, 700])
async def test_the_next_turn_finds_all_but_256_tokens(answer_tokens: int) -> None:
    prompt = prompt_of(900)
    async with pair() as workers:
        one = await workers.ask(prompt, max_tokens=answer_tokens, ignore_eos=True)
        conversation = prompt + one.token_ids
        follow_up = conversation + prompt_of(40, seed=5)
        two = await workers.ask(follow_up, max_tokens=30)
        assert two.cached_tokens >= len(conversation) - 256
        assert_same(two, oracle(follow_up, max_tokens=30))
        await workers.settles()


async def test_evidence_and_digests_belong_to_each_token() -> None:
    prompt = prompt_of(600)
    async with pair() as workers:
        got = await workers.ask(prompt, max_tokens=20, evidence=True, ignore_eos=True)
        want = oracle(prompt, max_tokens=20, ignore_eos=True)
        assert got.evidence == want.evidence
        assert got.indices == list(range(20))
        assert_same(got, want)


@pytest.mark.parametrize("index", [pytest.param(n, id=f"evict {n}") for n in (0, 3, 7)])
async def test_lost_blocks_cost_time_and_never_tokens(index: int) -> None:
    """Objects are really gone from the node, as after an eviction or a restart."""
    prompt = prompt_of(2300)
    store = memory_store(FakeEngine())
    async with pair(store=store) as workers:
        await workers.ask(prompt, max_tokens=2)
        victim = store.node._catalog.ids()[index]
        store.node._catalog._remove(store.node._catalog.entry(victim))  # type: ignore[arg-type]
        store.node._let_go()
        got = await workers.ask(prompt, max_tokens=40)
        assert_same(got, oracle(prompt, max_tokens=40))
        await workers.settles()


async def test_over_a_real_node_the_tokens_are_the_same() -> None:
    engine = FakeEngine()
    node = await start_server(StoreConfig(memory_bytes=64 << 20))
    store = StoreClient(
        node.address, fingerprint=engine.info.fingerprint, layout=engine.info.layout
    )
    try:
        async with pair(store=store) as workers:
            prompt = prompt_of(1800)
            one = await workers.ask(prompt, max_tokens=300, ignore_eos=True)
            assert_same(one, oracle(prompt, max_tokens=300, ignore_eos=True))
            follow_up = prompt + one.token_ids + [1, 2, 3]
            two = await workers.ask(follow_up)
            assert two.cached_tokens >= 2100 - 256
            assert_same(two, oracle(follow_up, max_tokens=24))
            await workers.settles()
    finally:
        await store.close()
        await node.stop()
