"""What every `BlockStore` must do: for the fake, a node with its own index, a node with Redis."""

from __future__ import annotations

import asyncio
import time

import pytest

from kvstore.contracts import BlockStore, Missing, StoreObject
from penstock.blocks import CacheLayout, Component, ComponentKind, ObjectKind
from penstock.errors import InvalidRequestError, OverloadedError, StoreUnavailableError
from tests.kvstore.conftest import World
from tests.kvstore.objects import LAYOUT, block, blocks_of, chain, fetch, same, state


async def test_what_was_put_comes_back_equal_and_in_the_order_asked(store: BlockStore) -> None:
    prompt = chain(4, tail=77)
    items = [*blocks_of(prompt), state(prompt, 1101), state(prompt, 1)]
    assert await store.put_many(items, owner="w", lease_ttl_s=5) == [True] * 6
    ids = [item.id for item in reversed(items)]
    got = await fetch(store, ids)
    assert all(same(left, right) for left, right in zip(got, reversed(items), strict=True))


async def test_has_tells_committed_from_absent(store: BlockStore) -> None:
    prompt = chain(3)
    await store.put(block(prompt, 1), owner="w", lease_ttl_s=5)
    assert await store.has(prompt.blocks) == [False, True, False]
    assert await store.has(prompt.blocks) == [False, True, False]
    assert await store.has([]) == []


async def test_the_first_commit_wins_and_the_second_gets_its_lease(world: World) -> None:
    store, item = world.client(), block(chain(1), 0)
    assert await store.put(item, owner="a", lease_ttl_s=5)
    assert not await store.put(item, owner="b", lease_ttl_s=5)
    assert await store.put_many([item, item], owner="c", lease_ttl_s=5) == [False, False]
    stat = await store.stat()
    assert (stat.objects, stat.leases, stat.lease_owners, stat.reserved_bytes) == (1, 3, 3, 0)


async def test_two_writers_of_one_object_at_once_both_succeed(world: World) -> None:
    items = blocks_of(chain(8))
    stores = [world.client() for _ in range(4)]
    rounds = await asyncio.gather(
        *(
            one.put_many(items, owner=f"w{number}", lease_ttl_s=5)
            for number, one in enumerate(stores)
        )
    )
    assert [sum(fresh) for fresh in zip(*rounds, strict=True)] == [1] * 8
    stat = await stores[0].stat()
    assert (stat.objects, stat.reserved_bytes, stat.open_puts) == (8, 0, 0)


async def test_missing_objects_are_reported_at_once_without_patience(store: BlockStore) -> None:
    prompt = chain(2)
    await store.put(block(prompt, 1), owner="w", lease_ttl_s=5)
    first, second = await fetch(store, prompt.blocks)
    assert first == Missing(prompt.blocks[0])
    assert same(second, block(prompt, 1))


async def test_get_waits_for_commit(world: World) -> None:
    reader, writer, prompt = world.client(), world.client(), chain(6)
    waiting = asyncio.create_task(fetch(reader, prompt.blocks, wait_s=10))
    await asyncio.sleep(0.1)
    for index in reversed(range(6)):
        await writer.put(block(prompt, index), owner="w", lease_ttl_s=5)
    got = await asyncio.wait_for(waiting, 5)
    assert all(same(left, block(prompt, index)) for index, left in enumerate(got))
    assert not world.node._waiters


async def test_patience_ends(store: BlockStore) -> None:
    started = time.monotonic()
    got = await fetch(store, chain(1).blocks, wait_s=0.2)
    assert isinstance(got[0], Missing)
    assert 0.15 < time.monotonic() - started < 2


async def test_closing_a_waiting_get_frees_all_it_holds(world: World) -> None:
    store, prompt = world.client(), chain(2)
    await store.put(block(prompt, 0), owner="w", lease_ttl_s=5)
    stream = store.get(prompt.blocks, owner="r", lease_ttl_s=5, wait_s=60)
    assert isinstance(await anext(stream), StoreObject)
    waiting = asyncio.create_task(anext(stream))
    await asyncio.sleep(0.1)
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await until(lambda: not world.node._waiters and world.node.stat().open_gets == 0)


async def test_leases_renew_expire_and_are_released_all_at_once(store: BlockStore) -> None:
    prompt = chain(3)
    await store.put_many(blocks_of(prompt), owner="w", lease_ttl_s=0.15)
    absent = chain(1, seed=9).blocks[0]
    assert await store.lease([prompt.blocks[0], absent], owner="r", ttl_s=30) == [True, False]
    await asyncio.sleep(0.3)
    stat = await store.stat()
    assert (stat.leases, stat.lease_owners, stat.objects) == (1, 1, 3)
    await store.release("r")
    await store.release("r")
    await store.release("never seen")
    assert (await store.stat()).leases == 0


async def test_leased_objects_stay_when_others_must_go(store: BlockStore) -> None:
    kept, others = chain(2, seed=1), chain(40, seed=2)
    await store.put_many(blocks_of(kept), owner="keeper", lease_ttl_s=30)
    for item in blocks_of(others):
        await store.put(item, owner="w", lease_ttl_s=5)
        await store.release("w")
    stat = await store.stat()
    assert stat.evictions > 20
    assert stat.used_bytes <= stat.capacity_bytes
    assert await store.has(kept.blocks) == [True, True]
    assert await store.has(others.blocks[:4]) == [False] * 4


async def test_a_store_full_of_leased_objects_refuses_and_leaks_nothing(store: BlockStore) -> None:
    prompt = chain(40)
    with pytest.raises(OverloadedError) as caught:
        await store.put_many(blocks_of(prompt), owner="w", lease_ttl_s=30)
    assert caught.value.retry_after_s
    full = await store.stat()
    assert (full.reserved_bytes, full.open_puts, full.evictions) == (0, 0, 0)
    assert full.objects == full.leases > 5
    await store.release("w")
    assert await store.put(block(chain(1, seed=5), 0), owner="w2", lease_ttl_s=5)


async def test_a_rolling_state_replaces_its_predecessor(store: BlockStore) -> None:
    prompt = chain(1, tail=200)
    for position in (100, 200, 300):
        assert await store.put(state(prompt, position), owner="w", lease_ttl_s=5, rolling=True)
    held = [prompt.state_id(position) for position in (100, 200, 300)]
    assert await store.has(held) == [False, False, True]
    await store.release("w")
    assert await store.has(held) == [False, False, False]
    assert (await store.stat()).used_bytes == 0


async def test_a_rolling_state_that_others_need_stays(store: BlockStore) -> None:
    prompt = chain(1, tail=200)
    await store.put(state(prompt, 100), owner="w", lease_ttl_s=5, rolling=True)
    await store.put(state(prompt, 100), owner="w", lease_ttl_s=5)
    await store.put(state(prompt, 200), owner="w", lease_ttl_s=5, rolling=True)
    await store.lease([prompt.state_id(200)], owner="other", ttl_s=5)
    await store.put(state(prompt, 300), owner="w", lease_ttl_s=5, rolling=True)
    held = [prompt.state_id(position) for position in (100, 200, 300)]
    assert await store.has(held) == [True, True, True]


async def test_what_had_to_make_room_is_remembered_until_it_is_back(world: World) -> None:
    of, client = chain(4), world.client()
    items = blocks_of(of)
    await client.put_many(items, owner="w", lease_ttl_s=5)
    await client.release("w")
    assert await client.evicted([*of.blocks, b"?" * 32]) == [False] * 5
    world.node.evict([of.blocks[3], of.blocks[1]], size_bytes=0, memory=True, disk=True)
    assert await client.evicted([*of.blocks, b"?" * 32]) == [False, True, False, True, False]
    await client.put(items[3], owner="w", lease_ttl_s=5)
    assert await client.evicted(of.blocks) == [False, True, False, False]


async def test_bytes_of_another_fingerprint_or_layout_are_missing_and_counted(world: World) -> None:
    item = block(chain(1), 0)
    wider = CacheLayout(
        (Component("csa.0", ComponentKind.COMPRESSED, 4, 48), *LAYOUT.components[1:])
    )
    await world.client().put(item, owner="w", lease_ttl_s=5)
    for stranger in (world.client(b"\1" * 32), world.client(layout=wider)):
        assert await fetch(stranger, [item.id]) == [Missing(item.id)]
        assert stranger.integrity_failures == 1  # type: ignore[attr-defined]


async def test_a_payload_that_its_layout_does_not_allow_is_refused(store: BlockStore) -> None:
    item = block(chain(1), 0)
    short = StoreObject(item.kind, item.id, item.parent, item.index, item.payload[:-1])
    with pytest.raises(InvalidRequestError, match="payload bytes"):
        await store.put(short, owner="w", lease_ttl_s=5)
    nowhere = StoreObject(ObjectKind.STATE, item.id, item.parent, 0, b"")
    with pytest.raises(InvalidRequestError, match="at least 1"):
        await store.put(nowhere, owner="w", lease_ttl_s=5)
    assert (await store.stat()).reserved_bytes == 0


async def test_wrong_ids_and_owners_are_refused_in_a_sentence(store: BlockStore) -> None:
    with pytest.raises(InvalidRequestError, match="32 bytes"):
        await store.has([b"short"])
    with pytest.raises(InvalidRequestError, match="needs an owner"):
        await store.lease([b"\0" * 32], owner="", ttl_s=5)
    with pytest.raises(InvalidRequestError, match="at most 256"):
        await store.release("x" * 257)


async def test_a_closed_client_says_so(store: BlockStore) -> None:
    await store.close()
    await store.close()
    with pytest.raises(StoreUnavailableError):
        await store.has([b"\0" * 32])


async def until(true: object, within_s: float = 3.0) -> None:
    """Waits for `true()`; fails after `within_s`."""
    assert callable(true)
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)
