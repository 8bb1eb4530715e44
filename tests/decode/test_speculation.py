"""Drafts change how many steps an answer takes, and nothing else of it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from decode.speculation import PROBE_STEPS, Acceptance, stand, states_between
from kvstore.contracts import StoreObject
from kvstore.fake import MemoryBlockStore
from model.engine import DraftCost, DraftRequest, Segment
from model.fake import EOS, FakeEngine, FakeSettings
from penstock.blocks import BLOCK_TOKENS, ObjectKind
from penstock.identity import Chain
from penstock.request import Sampling
from penstock.tokenizer import ByteTokenizer
from tests.decode.pair import (
    DRAWN,
    GREEDY,
    NAMESPACE,
    Answer,
    oracle,
    pair,
    prompt_of,
)

ACCURACIES = [0.0, 0.5, 0.9, 1.0]


def drafting(accuracy: float, tokens: int = 5) -> FakeSettings:
    return FakeSettings(draft_tokens=tokens, draft_accuracy=accuracy)


def assert_same(got: Answer, want: Answer) -> None:
    assert got.token_ids == want.token_ids
    assert got.digests == want.digests
    assert (got.text, got.reason) == (want.text, want.reason)
    assert got.completion_tokens == len(want.token_ids)


class Spy(MemoryBlockStore):
    """Remembers what was put."""

    def __init__(self, engine: FakeEngine) -> None:
        super().__init__(fingerprint=engine.info.fingerprint, layout=engine.info.layout)
        self.objects: list[StoreObject] = []

    async def put(self, item: StoreObject, **options: Any) -> bool:
        self.objects.append(item)
        return await super().put(item, **options)


@pytest.mark.parametrize("accuracy", ACCURACIES)
@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
async def test_the_answer_is_that_of_the_plain_loop(accuracy: float, sampling: Sampling) -> None:
    async with pair(settings=drafting(accuracy)) as workers:
        for length in (1, 126, 255, 1000):
            prompt = prompt_of(length)
            got = await workers.ask(
                prompt, sampling=sampling, max_tokens=150, ignore_eos=True, evidence=length > 200
            )
            want = oracle(prompt, max_tokens=150, sampling=sampling, ignore_eos=True)
            assert_same(got, want)
            if length > 200:
                assert got.evidence == want.evidence
        metrics = workers.decode.metrics()
        assert metrics["decode_prompt_tokens_computed_total"] == 0
        assert metrics["decode_generated_tokens_total"] == 4 * 150
        steps = metrics["decode_steps_total"]
        if accuracy == 1.0:
            assert steps <= 4 * (150 / 6 + 2)
            assert (
                metrics["spec_decode_num_accepted_tokens_total"]
                == metrics["spec_decode_num_draft_tokens_total"]
            )
        if accuracy == 0.0:
            # After a few misses drafts are given up, but for a probe now and then.
            assert steps == 4 * 150
            assert metrics["spec_decode_num_draft_tokens_total"] < 4 * 60
        await workers.settles()


@pytest.mark.parametrize("max_tokens", [1, 2, 3, 5, 6, 7, 12])
async def test_the_end_of_an_answer_cuts_the_draft(max_tokens: int) -> None:
    prompt = prompt_of(300)
    async with pair(settings=drafting(1.0)) as workers:
        got = await workers.ask(prompt, max_tokens=max_tokens, ignore_eos=True)
        assert_same(got, oracle(prompt, max_tokens=max_tokens, ignore_eos=True))
        await workers.settles()


@pytest.mark.parametrize("min_tokens", [0, 3, 40, 90])
async def test_an_end_token_inside_a_draft_ends_the_answer_there(min_tokens: int) -> None:
    async with pair(settings=drafting(0.95)) as workers:
        ended = 0
        for seed in range(8):
            prompt = prompt_of(200 + seed, seed=seed)
            got = await workers.ask(prompt, max_tokens=120, min_tokens=min_tokens)
            want = oracle(prompt, max_tokens=120, min_tokens=min_tokens)
            assert_same(got, want)
            ended += want.reason == "stop"
        assert ended, "no answer ended with the end token: this test shows nothing"
        await workers.settles()


async def test_a_stop_string_inside_a_draft_ends_the_answer_there() -> None:
    prompt = prompt_of(400)
    whole = oracle(prompt, max_tokens=200, ignore_eos=True)
    async with pair(settings=drafting(1.0)) as workers, pair() as plain:
        for place in (20, 57, 90, 131):
            string = whole.text[place : place + 4]
            fields = {"max_tokens": 200, "ignore_eos": True, "stop": [string]}
            got, want = await workers.ask(prompt, **fields), await plain.ask(prompt, **fields)
            assert_same(got, want)
            assert got.reason == "stop" and got.text == whole.text[: whole.text.find(string)]
        await workers.settles()


async def published(settings: FakeSettings, prompt: list[int], **fields: Any) -> Spy:
    store = Spy(FakeEngine())
    async with pair(store=store, settings=settings) as workers:
        await workers.ask(prompt, **fields)
        await workers.settles()
    return store


@pytest.mark.parametrize("accuracy", ACCURACIES)
async def test_only_tokens_of_the_answer_are_ever_published(accuracy: float) -> None:
    """Rejected drafts, and accepted ones behind a stop string, must not reach the store."""
    prompt = prompt_of(BLOCK_TOKENS - 3)
    whole = oracle(prompt, max_tokens=700, ignore_eos=True)
    # Ends just before, at and behind a position whose state is kept, by length or by stop string.
    ends: list[tuple[int, tuple[str, ...]]] = [(3 + 128 + shift, ()) for shift in (-1, 0, 1, 2)]
    for count in (256, 257, 258, 259, 260):
        text = ByteTokenizer().decode(whole.token_ids[:count])
        assert whole.text.find(text[-5:]) == len(text) - 5
        ends.append((700, (text[-5:],)))
    for max_tokens, stop in ends:
        fields: dict[str, Any] = {"max_tokens": max_tokens, "stop": stop, "ignore_eos": True}
        plain = await published(FakeSettings(), prompt, **fields)
        drafted = await published(drafting(accuracy), prompt, **fields)
        blocks = {o.id: o.payload for o in plain.objects if o.kind is ObjectKind.BLOCK}
        ours = {o.id: o.payload for o in drafted.objects if o.kind is ObjectKind.BLOCK}
        assert ours == blocks
        # Of the rolling states some may be skipped; none may be of other tokens or bytes.
        check_states(drafted, prompt, whole.token_ids)
        last = max(o.index for o in plain.objects if o.kind is ObjectKind.STATE)
        assert last == max(o.index for o in drafted.objects if o.kind is ObjectKind.STATE)


def check_states(store: Spy, prompt: list[int], answer: list[int]) -> None:
    engine = FakeEngine()
    tokens = prompt + answer
    chain = Chain.start(engine.info.fingerprint, NAMESPACE).extend(tokens)
    states = [o for o in store.objects if o.kind is ObjectKind.STATE]
    assert states
    for item in states:
        assert item.id == chain.state_id(item.index)
        sequence = engine.open(len(tokens))
        engine.forward([Segment(sequence, tokens[: item.index])])
        assert engine.export_state(sequence) == item.payload


async def test_the_next_turn_finds_a_drafted_answer() -> None:
    prompt = prompt_of(900)
    async with pair(settings=drafting(0.8)) as workers:
        one = await workers.ask(prompt, max_tokens=700, ignore_eos=True)
        conversation = prompt + one.token_ids
        follow_up = conversation + prompt_of(40, seed=5)
        two = await workers.ask(follow_up, max_tokens=30)
        assert two.cached_tokens >= len(conversation) - 256
        assert_same(two, oracle(follow_up, max_tokens=30))
        await workers.settles()


async def test_streams_of_different_draft_lengths_share_steps() -> None:
    prompts = [prompt_of(length, seed=length) for length in (700, 64, 1500, 230)]
    samplings = [GREEDY, DRAWN, Sampling(temperature=0.7, seed=3), GREEDY]
    async with pair(settings=drafting(0.7)) as workers:
        answers = await asyncio.gather(
            *(
                workers.ask(prompt, sampling=sampling, max_tokens=40 + 30 * i, ignore_eos=True)
                for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
            )
        )
        for i, (got, prompt, sampling) in enumerate(zip(answers, prompts, samplings, strict=True)):
            want = oracle(prompt, max_tokens=40 + 30 * i, sampling=sampling, ignore_eos=True)
            assert_same(got, want)
        await workers.settles()


async def test_a_failing_draft_ends_the_streams_with_one_error_and_frees_all() -> None:
    class Broken(FakeEngine):
        def draft(self, requests: Any) -> list[list[int]]:
            raise RuntimeError("no draft today")

    from decode.batch import Batch
    from decode.output import Output
    from decode.stream import Stream, Wishes
    from penstock.errors import PenstockError
    from penstock.request import StopRule

    engine = Broken(drafting(1.0))
    batch = Batch(engine)
    batch.start()
    sequence = engine.open(64)
    engine.forward([Segment(sequence, [1, 2, 3])])
    output = Output(StopRule(20, ignore_eos=True), frozenset({EOS}), None)
    stream = Stream(sequence, GREEDY, output, Wishes(), lambda position, payload: None)
    batch.join(stream)
    with pytest.raises(PenstockError, match="no draft today"):
        while await stream.take():
            pass
    assert batch.is_alive
    await batch.stop()


def test_without_drafts_an_engine_is_never_asked_for_one() -> None:
    engine = FakeEngine()
    assert engine.info.draft_tokens == 0
    with pytest.raises(ValueError, match="draft"):
        engine.draft([DraftRequest(engine.open(9), 1, 1, GREEDY)])


# The plans


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_what_stands_is_the_longest_equal_prefix_and_one_draw(
    drafts: list[int], target: list[int]
) -> None:
    got = stand(lambda index: target[index], drafts)
    equal = 0
    while equal < len(drafts) and drafts[equal] == target[equal]:
        equal += 1
    assert got == target[: equal + 1]


@given(st.integers(0, 2000), st.integers(0, 300))
def test_states_are_the_multiples_of_128_that_a_step_passes(start: int, length: int) -> None:
    want = [p for p in range(start + 1, start + length + 1) if p % 128 == 0]
    assert list(states_between(start, start + length)) == want


@given(st.floats(0, 1), st.integers(0, 16), st.floats(0, 1), st.floats(0.01, 1.0))
def test_a_draft_length_is_the_best_of_all_lengths(
    rate: float, most: int, start: float, token: float
) -> None:
    got = Acceptance(rate).length(most, DraftCost(start, token))
    assert 0 <= got <= most

    def value(count: int) -> float:
        price = 1 + (start + token * count if count else 0)
        return sum(rate**i for i in range(count + 1)) / price

    assert value(got) >= max(value(count) for count in range(most + 1)) - 1e-9


def test_bad_drafts_are_given_up_and_tried_again() -> None:
    acceptance = Acceptance()
    lengths = []
    for _ in range(200):
        length = acceptance.length(5, DraftCost(0.1, 0.05))
        lengths.append(length)
        acceptance = acceptance.after(length, 0)
    assert lengths[0] >= 2
    assert 0 < sum(lengths[20:]) <= 180 / PROBE_STEPS + 1
    for _ in range(40 * PROBE_STEPS):
        acceptance = acceptance.after(length := acceptance.length(5, DraftCost(0.1, 0.05)), length)
    assert acceptance.length(5, DraftCost(0.1, 0.05)) == 5
