"""Room set aside: never promised twice, there for its owner, gone with it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.config import StoreConfig
from kvstore.pledges import Pledges
from kvstore.server import start_server
from model.fake import FakeEngine
from penstock.errors import OverloadedError
from tests.decode.pair import eventually, failure, memory_store, pair, prompt_of
from tests.kvstore.objects import FINGERPRINT, LAYOUT, block, chain

OWNERS = st.sampled_from(["a", "a/prompt/0", "a/prompt/1", "b"])


@given(
    st.lists(
        st.tuples(st.sampled_from(["take", "spend", "drop", "wait"]), OWNERS, st.integers(0, 100)),
        max_size=40,
    )
)
def test_pledges_are_what_a_list_says(steps: list[tuple[str, str, int]]) -> None:
    pledges, model, now_s = Pledges(), dict[str, tuple[int, float]](), 0.0
    for what, owner, number in steps:
        match what:
            case "take":
                pledges.take(owner, number, now_s + 50)
                model[owner] = (number, now_s + 50)
            case "spend":
                pledges.spend(owner, number)
                if owner in model:
                    model[owner] = (model[owner][0] - number, model[owner][1])
            case "drop":
                pledges.drop(owner)
                model = {o: p for o, p in model.items() if o != owner and owner + "/" not in o}
            case _:
                now_s += number
        model = {o: p for o, p in model.items() if p[0] > 0 and p[1] > now_s}
        for but in ("", "a", "b"):
            want = sum(size for o, (size, _) in model.items() if o != but)
            assert pledges.total_bytes(now_s, but=but) == want
    assert len(pledges) == len(model)


async def test_over_the_wire_room_is_refused_kept_spent_and_given_back() -> None:
    from kvstore.client import StoreClient

    one = LAYOUT.block_bytes + 512
    node = await start_server(StoreConfig(memory_bytes=4 * one, max_object_bytes=one))
    store = StoreClient(node.address, fingerprint=FINGERPRINT, layout=LAYOUT)
    try:
        await store.pledge("r/prompt/0", 3 * one, ttl_s=30)
        error = await failure(store.pledge("s", 2 * one, ttl_s=30))
        assert isinstance(error, OverloadedError)
        ids = chain(6)
        await store.put(block(ids, 0), owner="s", lease_ttl_s=30)
        error = await failure(store.put(block(ids, 1), owner="s", lease_ttl_s=30))
        assert isinstance(error, OverloadedError), "it took what is another's"
        for index in (1, 2, 3):
            assert await store.put(block(ids, index), owner="r/prompt/0", lease_ttl_s=30)
        assert (await store.stat()).reserved_bytes < 3 * 512, "it is spent"
        await store.release("s")
        await store.pledge("r/prompt/0", one, ttl_s=30)
        await store.release("r")
        stat = await store.stat()
        assert (stat.reserved_bytes, stat.leases) == (0, 0)
    finally:
        await store.close()
        await node.stop()


async def test_a_prompt_that_the_store_could_not_take_is_refused_before_it_is_read() -> None:
    engine = FakeEngine()
    room = 20 * engine.info.layout.block_bytes
    store = memory_store(engine, capacity_bytes=room)
    async with pair(store=store) as workers:
        error = await failure(workers.read(prompt_of(10_000)))
        assert isinstance(error, OverloadedError)
        assert error.reason == "store_full"
        assert workers.prefill.counters["prefill_computed_tokens_total"] == 0
        answer = await workers.ask(prompt_of(3000), max_tokens=4, ignore_eos=True)
        assert len(answer.token_ids) == 4
        await workers.store.release("request-0")
        await workers.settles()
        await eventually(lambda: not workers.prefill.runner._cleanups)
        assert (await store.stat()).reserved_bytes == 0


@pytest.mark.parametrize("number", [2])
async def test_two_prompts_that_do_not_fit_together_do_not_both_begin(number: int) -> None:
    from model.fake import FakeSettings

    engine = FakeEngine()
    store = memory_store(engine, capacity_bytes=60 * engine.info.layout.block_bytes)
    async with pair(store=store, settings=FakeSettings(prefill_tokens_per_s=60_000)) as workers:
        reads = [asyncio.create_task(workers.read(prompt_of(10_000, n))) for n in range(number)]
        ends = await asyncio.gather(*reads, return_exceptions=True)
        refused = [end for end in ends if isinstance(end, OverloadedError)]
        assert [end.reason for end in refused] == ["store_full"]
        assert sum(not isinstance(end, BaseException) for end in ends) == 1
