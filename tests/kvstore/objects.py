"""A small model's layout and objects with recognisable bytes, for the store's tests."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kvstore.contracts import BlockStore, Missing, StoreObject
from penstock.blocks import CacheLayout, Component, ComponentKind, ObjectKind
from penstock.identity import Chain, fingerprint, namespace

LAYOUT = CacheLayout(
    (
        Component("csa.0", ComponentKind.COMPRESSED, 4, 40),
        Component("hca.1", ComponentKind.COMPRESSED, 128, 584),
        Component("window.0", ComponentKind.WINDOW, 128, 16),
        Component("carry.0", ComponentKind.CARRY_OVERLAP, 4, 8),
        Component("last", ComponentKind.LAST, 1, 32),
    )
)
FINGERPRINT = fingerprint({"model": "store-tests"})
NAMESPACE = namespace(b"key", "tenant")


def chain(blocks: int, seed: int = 0, tail: int = 0) -> Chain:
    tokens = [random.Random(seed).randrange(1 << 17) for _ in range(blocks * 256 + tail)]
    return Chain.start(FINGERPRINT, NAMESPACE).extend(tokens)


def block(of: Chain, index: int, *, layout: CacheLayout = LAYOUT) -> StoreObject:
    payload = random.Random(of.blocks[index]).randbytes(layout.block_bytes)
    return StoreObject(ObjectKind.BLOCK, of.blocks[index], of.parent(index), index, payload)


def state(of: Chain, position: int, *, layout: CacheLayout = LAYOUT) -> StoreObject:
    id_ = of.state_id(position)
    payload = random.Random(id_).randbytes(layout.state_bytes(position))
    return StoreObject(ObjectKind.STATE, id_, of.parent(position // 256), position, payload)


def blocks_of(of: Chain) -> list[StoreObject]:
    return [block(of, index) for index in range(len(of.blocks))]


async def fetch(
    store: BlockStore,
    ids: Sequence[bytes],
    *,
    owner: str = "reader",
    ttl_s: float = 10.0,
    wait_s: float = 0.0,
) -> list[StoreObject | Missing]:
    stream = store.get(ids, owner=owner, lease_ttl_s=ttl_s, wait_s=wait_s)
    return [item async for item in stream]


def same(left: StoreObject | Missing, right: StoreObject) -> bool:
    return (
        isinstance(left, StoreObject)
        and (left.kind, left.id, left.parent, left.index)
        == (right.kind, right.id, right.parent, right.index)
        and bytes(left.payload) == bytes(right.payload)
    )
