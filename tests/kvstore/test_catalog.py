"""The catalogue keeps its promises whatever the order of calls: a stateful property test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvstore.catalog import Catalog, Entry, Limits, Reservation
from kvstore.leases import LeaseTable
from kvstore.policy.choice import Eviction, open_policy
from penstock.blocks import ObjectKind
from penstock.errors import InvalidRequestError, OverloadedError

CAPACITY_BYTES = 100
IDS = [bytes([number]) * 32 for number in range(6)]
OWNERS = ["a", "b", "a/answer/0", "a/answer"]
LIMITS = Limits(
    capacity_bytes=CAPACITY_BYTES,
    max_object_bytes=60,
    max_objects=5,
    max_leases=1000,
    max_lease_ttl_s=20.0,
)


def new_catalog(clock: Callable[[], float], eviction: Eviction = Eviction.REUSE) -> Catalog:
    return Catalog(LIMITS, policy=open_policy(eviction, CAPACITY_BYTES), clock=clock)


class CatalogMachine(RuleBasedStateMachine):
    """Beside the catalogue runs a model that knows only the promises, not the mechanism."""

    eviction = Eviction.REUSE

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.catalog = new_catalog(lambda: self.now, self.eviction)
        self.sizes: dict[bytes, int] = {}
        self.leases: dict[tuple[str, bytes], float] = {}
        self.retained: set[bytes] = set()
        self.slots: dict[str, bytes] = {}
        self.writers: list[Reservation] = []
        self.readers: list[Entry] = []

    @rule(id_=st.sampled_from(IDS), size=st.integers(1, 60), kind=st.sampled_from(list(ObjectKind)))
    def reserve(self, id_: bytes, size: int, kind: ObjectKind) -> None:
        try:
            self.writers.append(self.catalog.reserve(id_, kind, size))
        except OverloadedError:
            assert not self.catalog.take_dropped(), "a refusal must not cost anybody an object"
            idle = [i for i in self.sizes if not self.is_held(i)]
            count = len(self.sizes) + len(self.writers) - len(idle)
            held = sum(self.sizes.values()) - sum(self.sizes[i] for i in idle)
            held += sum(writer.size_bytes for writer in self.writers)
            assert held + size > CAPACITY_BYTES or count + 1 > LIMITS.max_objects
        self.forget_dropped(None)

    @precondition(lambda self: self.writers)
    @rule(
        data=st.data(),
        owner=st.sampled_from(OWNERS),
        ttl=st.sampled_from([0.0, 5.0, 100.0]),
        rolling=st.booleans(),
        parent=st.sampled_from([b"", *IDS]),
        position=st.integers(0, 1 << 20),
    )
    def commit(
        self, data: Any, owner: str, ttl: float, rolling: bool, parent: bytes, position: int
    ) -> None:
        writer = self.take(self.writers, data)
        there = writer.id in self.sizes
        fresh = self.catalog.commit(
            writer,
            digest=b"",
            owner=owner,
            ttl_s=ttl,
            rolling=rolling,
            parent=parent,
            position=position,
        )
        assert fresh is not there
        if fresh:
            self.sizes[writer.id] = writer.size_bytes
        self.note_put(writer.id, owner, ttl, rolling)

    @rule(
        id_=st.sampled_from(IDS),
        owner=st.sampled_from(OWNERS),
        ttl=st.sampled_from([0.0, 5.0]),
        rolling=st.booleans(),
    )
    def adopt(self, id_: bytes, owner: str, ttl: float, rolling: bool) -> None:
        there = self.catalog.adopt(id_, owner=owner, ttl_s=ttl, rolling=rolling)
        assert there == (id_ in self.sizes)
        if there:
            self.note_put(id_, owner, ttl, rolling)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        writer = self.take(self.writers, data)
        self.catalog.abort(writer)
        self.catalog.abort(writer)

    @rule(
        ids=st.lists(st.sampled_from(IDS), max_size=4),
        owner=st.sampled_from(OWNERS),
        ttl=st.sampled_from([1.0, 15.0, 100.0]),
    )
    def lease(self, ids: list[bytes], owner: str, ttl: float) -> None:
        assert self.catalog.lease(owner, ids, ttl) == [id_ in self.sizes for id_ in ids]
        for id_ in ids:
            if id_ in self.sizes:
                self.note_lease(id_, owner, ttl)

    @rule(owner=st.sampled_from(OWNERS))
    def release(self, owner: str) -> None:
        self.catalog.release(owner)
        family = [name for name in OWNERS if name == owner or name.startswith(f"{owner}/")]
        self.leases = {key: end for key, end in self.leases.items() if key[0] not in family}
        for slot in [self.slots.pop(name, None) for name in family]:
            self.forget_dropped(slot)
            self.check_superseded(slot)

    @rule(id_=st.sampled_from(IDS))
    def open_read(self, id_: bytes) -> None:
        entry = self.catalog.open_read(id_)
        assert (entry is not None) == (id_ in self.sizes)
        if entry is not None:
            self.readers.append(entry)

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def close_read(self, data: Any) -> None:
        self.catalog.close_read(self.take(self.readers, data))

    @rule(seconds=st.sampled_from([0.5, 4.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        self.leases = {key: end for key, end in self.leases.items() if end > self.now}

    @invariant()
    def the_budget_holds_and_the_counts_are_true(self) -> None:
        usage = self.catalog.usage()
        self.forget_dropped(None)
        for id_ in self.sizes:
            self.check_superseded(id_)
        assert usage.used_bytes == sum(self.sizes.values())
        assert usage.reserved_bytes == sum(writer.size_bytes for writer in self.writers)
        assert usage.used_bytes + usage.reserved_bytes <= CAPACITY_BYTES
        assert usage.objects == len(self.sizes) <= LIMITS.max_objects
        assert usage.readers == len(self.readers)
        assert usage.leases == len(self.leases)
        assert usage.lease_owners == len({owner for owner, _ in self.leases})
        assert self.catalog.has(IDS) == [id_ in self.sizes for id_ in IDS]

    def teardown(self) -> None:
        for writer in self.writers:
            self.catalog.abort(writer)
        for entry in self.readers:
            self.catalog.close_read(entry)
        for owner in OWNERS:
            self.catalog.release(owner)
        usage = self.catalog.usage()
        assert (usage.reserved_bytes, usage.readers, usage.leases) == (0, 0, 0)
        full = self.catalog.reserve(b"z" * 32, ObjectKind.BLOCK, 60)
        self.catalog.abort(full)

    def take(self, items: list[Any], data: Any) -> Any:
        return items.pop(data.draw(st.integers(0, len(items) - 1)))

    def is_held(self, id_: bytes) -> bool:
        return any(id_ == held for _, held in self.leases) or any(
            entry.id == id_ for entry in self.readers
        )

    def note_lease(self, id_: bytes, owner: str, ttl: float) -> None:
        end = self.now + min(ttl, LIMITS.max_lease_ttl_s)
        if ttl:
            self.leases[owner, id_] = max(end, self.leases.get((owner, id_), 0.0))

    def note_put(self, id_: bytes, owner: str, ttl: float, rolling: bool) -> None:
        self.note_lease(id_, owner, ttl)
        before = None
        if not rolling:
            self.retained.add(id_)
        elif self.slots.get(owner) != id_:
            before = self.slots.get(owner)
            self.slots[owner] = id_
            if before is not None and before not in self.retained:
                self.leases.pop((owner, before), None)
        self.forget_dropped(before)
        self.check_superseded(before)

    def forget_dropped(self, superseded: bytes | None) -> None:
        for id_ in self.catalog.take_dropped():
            assert not self.is_held(id_), "leased or open objects never disappear"
            assert id_ in self.sizes
            del self.sizes[id_]
            self.retained.discard(id_)
            self.slots = {owner: slot for owner, slot in self.slots.items() if slot != id_}

    def check_superseded(self, id_: bytes | None) -> None:
        if id_ is None or id_ in self.retained or id_ in self.slots.values():
            return
        assert id_ not in self.sizes or self.is_held(id_), "a superseded rolling object goes"


class LruMachine(CatalogMachine):
    eviction = Eviction.LRU


class S3FifoMachine(CatalogMachine):
    eviction = Eviction.S3_FIFO


TestCatalog = CatalogMachine.TestCase
TestCatalog.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestCatalogWithLru = LruMachine.TestCase
TestCatalogWithLru.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
TestCatalogWithS3Fifo = S3FifoMachine.TestCase
TestCatalogWithS3Fifo.settings = TestCatalogWithLru.settings


def test_what_nobody_can_take_is_refused_for_good() -> None:
    catalog = new_catalog(lambda: 0.0)
    for size in (0, 61, 1000):
        with pytest.raises(InvalidRequestError):
            catalog.reserve(IDS[0], ObjectKind.BLOCK, size)


def test_a_released_prefix_is_evicted_from_its_leaf() -> None:
    catalog = new_catalog(lambda: 0.0)
    for id_ in IDS[:4]:
        reservation = catalog.reserve(id_, ObjectKind.BLOCK, 25)
        catalog.commit(reservation, digest=b"", owner="a", ttl_s=10, rolling=False)
    catalog.release("a")
    catalog.reserve(IDS[5], ObjectKind.BLOCK, 50)
    assert catalog.take_dropped() == [IDS[3], IDS[2]]


def test_renewing_a_lease_costs_no_memory() -> None:
    table = LeaseTable()
    for second in range(10_000):
        table.take("a", IDS[0], second + 30.0)
        table.expire(second)
    assert len(table._heap) == len(table) == 1
    for number in range(10_000):
        table.take(f"owner {number}", IDS[1], 1e9)
        table.drop_owner(f"owner {number}")
    assert len(table._heap) < 2000


def test_what_is_being_read_is_never_evicted() -> None:
    catalog = new_catalog(lambda: 0.0)
    reservation = catalog.reserve(IDS[0], ObjectKind.BLOCK, 60)
    catalog.commit(reservation, digest=b"", owner="", ttl_s=0, rolling=False)
    entry = catalog.open_read(IDS[0])
    assert entry is not None
    with pytest.raises(OverloadedError):
        catalog.reserve(IDS[1], ObjectKind.BLOCK, 60)
    catalog.close_read(entry)
    catalog.reserve(IDS[1], ObjectKind.BLOCK, 60)
    assert catalog.take_dropped() == [IDS[0]]


def test_a_rolling_object_put_twice_does_not_replace_itself() -> None:
    catalog = new_catalog(lambda: 0.0)
    reservation = catalog.reserve(IDS[0], ObjectKind.STATE, 10)
    catalog.commit(reservation, digest=b"", owner="a", ttl_s=5, rolling=True)
    assert catalog.adopt(IDS[0], owner="a", ttl_s=5, rolling=True)
    assert catalog.has(IDS[:1]) == [True]
    assert catalog.usage().leases == 1


def test_a_rolling_object_released_while_it_is_read_goes_with_its_reader() -> None:
    catalog = new_catalog(lambda: 0.0)
    reservation = catalog.reserve(IDS[0], ObjectKind.STATE, 10)
    catalog.commit(reservation, digest=b"", owner="a", ttl_s=5, rolling=True)
    read = catalog.open_read(IDS[0])
    assert read is not None
    catalog.release("a")
    assert catalog.has([IDS[0]]) == [True]
    catalog.close_read(read)
    assert catalog.has([IDS[0]]) == [False]
    assert catalog.take_dropped() == [IDS[0]]
