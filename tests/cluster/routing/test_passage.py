"""What one request leaves behind: nothing on the board, and something learnt of its workers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.policy import DECODE, NOTHING, PREFILL, Resident, Shape
from cluster.routing.board import Board
from cluster.routing.cost import CostPolicy
from cluster.routing.fit import Fit
from cluster.routing.learnt import Learnt
from cluster.routing.passage import Books, Passage, Prompt
from cluster.routing.routed import InFlight
from cluster.routing.told import Decisions, Told
from penstock.errors import UsageError
from penstock.identity import Chain
from tests.cluster.routing.pools import worker

BLOCKS = (b"a" * 32, b"b" * 32)


class Road:
    """A router's books with a clock that stands still unless told."""

    def __init__(self) -> None:
        self.now = 0.0
        self.board = Board()
        self.board.show(
            [worker("p0", PREFILL, bytes_per_token=1e3), worker("d0", DECODE, capacity_bytes=10**9)]
        )
        self.fits: dict[str, Fit] = {}
        self.flying = InFlight()
        self.books = Books(self.board, self.flying, self.fits, Learnt(), lambda: self.now)

    def enter(
        self,
        tokens: int = 10_000,
        resident: Resident = NOTHING,
        prompt: Prompt | None = None,
    ) -> Passage:
        decision = CostPolicy().choose(self.board, Shape(tokens, 100), resident)
        reading = self.flying.begin("p0", BLOCKS)
        return Passage(self.books, decision.route, decision.shape, resident, reading, prompt)


def test_a_whole_request_teaches_compute_fetch_step_and_stay() -> None:
    road = Road()
    passage = road.enter()
    road.now = 1.0
    passage.granted()
    road.now = 1.5
    passage.read(4_000, 4_000)
    assert road.board.load("p0").tokens == 6_000
    passage.read(10_000, 4_000)
    passage.computed(4_000, 0.6)
    assert len(road.flying) == 0
    for index in range(51):
        road.now = 2.0 + 0.02 * index
        passage.drew(1)
        assert road.board.load("p0").prompts == 0
    passage.close()
    assert road.board.charged == {}
    prefill, decode = road.fits["p0"], road.fits["d0"]
    assert (prefill.prompts.count, prefill.fetch.count) == (1, 1)
    assert (decode.steps.count, decode.stay.count) == (1, 1)
    # 4 MB in half a second, 20 ms a step: both between what was expected and what was seen.
    assert 8e6 < prefill.fetch.value < 500e6
    assert 0.011 < decode.steps.predict(1, 1) < 0.02


def test_a_fetch_behind_others_or_of_few_bytes_is_not_timed() -> None:
    road = Road()
    first, second = road.enter(), road.enter()
    for passage in (second, first):
        passage.granted()
        road.now += 60
    second.read(9_000, 9_000)
    first.read(10, 10)
    assert road.fits == {}


def test_a_prompt_that_was_read_is_expected_and_one_that_restored_less_corrects_it() -> None:
    road = Road()
    chain = Chain.start(b"f" * 32, b"n" * 32).extend(range(10_000))
    first = road.enter(prompt=Prompt(chain))
    first.granted()
    first.read(0, 0)
    first.computed(0, 1.0)
    known = road.books.learnt.resident(chain)
    # The last multiple of 128 in the prompt, where prefill keeps a state.
    assert known.resumable_tokens == 9_984
    assert known.fetch_bytes == 39 * 256 * 1000 + 1_024_000
    branch = Chain.start(b"f" * 32, b"n" * 32).extend([*range(9_000), *range(5_000)])
    assert road.books.learnt.resident(branch).resumable_tokens == 35 * 256
    second = road.enter(resident=known, prompt=Prompt(chain))
    second.granted()
    second.read(8_192, 8_192)
    assert road.books.learnt.resident(chain).resumable_tokens == 8_192


def test_what_was_learnt_is_bounded_and_the_oldest_goes_first() -> None:
    learnt, start = Learnt(most_objects=100), Chain.start(b"f" * 32, b"n" * 32)
    chains = [start.extend([number] * 2_560) for number in range(30)]
    for chain in chains:
        learnt.read(chain, (), 1.0)
        assert len(learnt) <= 100
    assert learnt.resident(chains[-1]).resumable_tokens == 2_560
    assert learnt.resident(chains[0]) == NOTHING


events = st.lists(st.sampled_from(["granted", "read", "computed", "drew", "close"]), max_size=12)


@given(st.lists(events, min_size=1, max_size=4))
def test_in_whatever_order_events_come_nothing_stays(plans: list[list[str]]) -> None:
    road = Road()
    passages = [road.enter() for _ in plans]
    for passage, plan in zip(passages, plans, strict=True):
        for name in plan:
            road.now += 0.01
            match name:
                case "granted":
                    passage.granted()
                case "read":
                    passage.read(5_000, 2_000)
                case "computed":
                    passage.computed(2_000, 0.1)
                case "drew":
                    passage.drew(3)
                case _:
                    passage.close()
    for passage in passages:
        passage.close()
        passage.close()
        passage.drew(1)
        passage.read(1, 1)
    assert road.board.charged == {}
    assert len(road.flying) == 0


def test_decisions_are_bounded_private_and_survive_json() -> None:
    road, decisions = Road(), Decisions(most=3, most_rows=1_000)
    for number in range(5):
        decision = CostPolicy().choose(road.board, Shape(100 + number, 1 << 40), NOTHING)
        decisions.keep(
            f"r{number}", decision, tenant=b"mine", at=1.5, mirror_age_s=float("inf"), rows=2
        )
    assert len(decisions) == 3
    assert decisions.told("r1", tenant=b"mine") is None
    assert decisions.told("r4", tenant=b"another") is None
    told = decisions.told("r4", tenant=b"mine")
    assert told is not None
    assert told.facts["prompt_tokens"] == 104
    assert told.facts["mirror_age_s"] == -1
    # An answer that no worker could ever hold costs infinity, which JSON does not have.
    assert next(row for row in told.rows if row.role == DECODE).total == float("inf")
    assert Told.from_json(told.to_json(), "here") == told
    with pytest.raises(UsageError, match="holds no route"):
        Told.from_json({"request_id": 1}, "here")
    large = Decisions(most=100, most_rows=10)
    for number in range(9):
        large.keep(f"r{number}", decision, tenant=b"", at=0, mirror_age_s=0, rows=5)
    assert len(large) == 2
