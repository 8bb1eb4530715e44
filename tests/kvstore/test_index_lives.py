"""Two nodes, their restarts and what late calls of earlier lives do: each index beside a model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from kvstore.contracts import Index, Location
from kvstore.index.embedded import EmbeddedIndex
from kvstore.index.redis import RedisIndex
from tests.kvstore.redis_server import RedisServer

IDS = [bytes([number]) * 32 for number in range(3)]
NODES = st.sampled_from(["node-1", "node-2"])
AGO = st.integers(min_value=0, max_value=2)
SOME = st.lists(st.sampled_from(IDS), min_size=1, max_size=4)


class _Lives(RuleBasedStateMachine):
    """The model: the latest entry of an id, with the largest epoch where the node is the same."""

    runner: asyncio.Runner
    index: Index
    redis: RedisServer | None

    def __init__(self) -> None:
        super().__init__()
        self.epochs = {"node-1": [1_000, 1_001], "node-2": [2_000, 2_256]}
        self.model: dict[bytes, Location] = {}
        self.runner.run(self.index.remove(IDS, node_id="node-1", epoch=2**64 - 1))
        self.runner.run(self.index.remove(IDS, node_id="node-2", epoch=2**64 - 1))
        self.look()

    def epoch(self, node: str, ago: int) -> int:
        return self.epochs[node][max(0, len(self.epochs[node]) - 1 - ago)]

    @rule(node=NODES, by=st.sampled_from([1, 255, 2**32, 2**53]))
    def restart(self, node: str, by: int) -> None:
        self.epochs[node].append(self.epochs[node][-1] + by)

    @rule(node=NODES, ago=AGO, ids=SOME, size=st.integers(min_value=0, max_value=2**40))
    def add(self, node: str, ago: int, ids: list[bytes], size: int) -> None:
        place = Location(node, self.epoch(node, ago), size)
        self.runner.run(self.index.add([(id_, place) for id_ in ids]))
        for id_ in ids:
            held = self.model.get(id_)
            if held is None or held.node_id != node or held.epoch <= place.epoch:
                self.model[id_] = place
        self.look()

    @rule(node=NODES, ago=AGO, ids=SOME)
    def remove(self, node: str, ago: int, ids: list[bytes]) -> None:
        epoch = self.epoch(node, ago)
        self.runner.run(self.index.remove(ids, node_id=node, epoch=epoch))
        for id_ in ids:
            held = self.model.get(id_)
            if held is not None and held.node_id == node and held.epoch <= epoch:
                del self.model[id_]
        self.look()

    @rule(everything=st.booleans())
    def redis_forgets(self, everything: bool) -> None:
        if self.redis is not None:
            self.redis.command(b"SCRIPT FLUSH")
            if everything:
                self.redis.command(b"FLUSHALL")
                self.model.clear()
        self.look()

    def look(self) -> None:
        found = self.runner.run(self.index.lookup(IDS))
        assert found == [self.model.get(id_) for id_ in IDS]


@pytest.fixture
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as made:
        yield made


@pytest.mark.parametrize("backend", ["embedded", "redis"])
def test_no_late_call_of_an_earlier_life_counts(
    backend: str, runner: asyncio.Runner, shared_redis: RedisServer
) -> None:
    async def opened() -> Index:
        if backend == "embedded":
            return EmbeddedIndex()
        return RedisIndex(shared_redis.url, lookup_timeout_s=5.0, write_timeout_s=5.0)

    class Lives(_Lives):
        pass

    shared_redis.command(b"FLUSHALL")
    Lives.runner, Lives.index = runner, runner.run(opened())
    Lives.redis = shared_redis if backend == "redis" else None
    run_state_machine_as_test(
        Lives,
        settings=settings(
            max_examples=120,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    runner.run(Lives.index.close())
