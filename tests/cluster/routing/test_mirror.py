"""The mirror finds what a store with the same objects would resume, without asking it."""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cluster.policy import NOTHING
from cluster.routing.mirror import Came, Mirror
from cluster.routing.routed import InFlight, Seen
from penstock.blocks import BLOCK_TOKENS, STATE_ALIGN_TOKENS, ObjectKind
from penstock.identity import Chain
from prefill.planner import resume_candidates
from tests.prefill.oracle import best_resume

ROOT = Chain.start(b"f" * 32, b"n" * 32)
NODES = ("a", "b", "c")


def prompt(letters: str, tail: int = 0) -> Chain:
    """A block a letter, then `tail` tokens."""
    tokens = [ord(letter) for letter in letters for _ in range(BLOCK_TOKENS)]
    return ROOT.extend([*tokens, *range(tail)])


def block(chain: Chain, index: int) -> Came:
    position = (index + 1) * BLOCK_TOKENS
    return Came(chain.blocks[index], chain.parent(index), ObjectKind.BLOCK, position, 1000 + index)


def state(chain: Chain, position: int) -> Came:
    id_, parent = chain.state_id(position), chain.parent(position // BLOCK_TOKENS)
    return Came(id_, parent, ObjectKind.STATE, position, 7)


LETTERS = ("a", "ab", "abc", "abd", "xbc")
PROMPTS = [prompt(letters, tail) for letters in LETTERS for tail in (0, 200)]
OBJECTS = sorted(
    {
        item.id: item
        for chain in PROMPTS
        for item in (
            *(block(chain, i) for i in range(len(chain.blocks))),
            *(state(chain, p) for p in range(256, len(chain.tokens) + 1, STATE_ALIGN_TOKENS)),
            state(chain, len(chain.tokens)),
        )
    }.values(),
    key=lambda item: item.id,
)


class MirrorMachine(RuleBasedStateMachine):
    """Any order of comings and goings, told twice or never; the oracle is restore's own."""

    def __init__(self) -> None:
        super().__init__()
        self.mirror = Mirror()
        self.held: dict[str, set[bytes]] = {node: set() for node in NODES}

    @rule(node=st.sampled_from(NODES), items=st.lists(st.sampled_from(OBJECTS), max_size=12))
    def came(self, node: str, items: list[Came]) -> None:
        self.mirror.came(node, items)
        self.held[node].update(item.id for item in items)

    @rule(node=st.sampled_from(NODES), items=st.lists(st.sampled_from(OBJECTS), max_size=6))
    def went(self, node: str, items: list[Came]) -> None:
        self.mirror.went(node, [item.id for item in items])
        self.held[node].difference_update(item.id for item in items)

    @rule(node=st.sampled_from(NODES))
    def lost(self, node: str) -> None:
        self.mirror.lost(node)
        self.held[node].clear()

    @invariant()
    def finds_what_prefill_would_restore(self) -> None:
        there = set().union(*self.held.values())
        assert len(self.mirror) == len(there)
        sizes = {item.id: item.size_bytes for item in OBJECTS}
        for chain in PROMPTS:
            candidates = resume_candidates(len(chain.tokens))
            wanted = best_resume(
                candidates,
                states_present=[chain.state_id(c) in there for c in candidates],
                blocks_present=[id_ in there for id_ in chain.blocks],
            )
            # Below the first block border nothing is looked for.
            wanted = wanted if wanted >= BLOCK_TOKENS else 0
            found = self.mirror.resident(chain)
            assert found.resumable_tokens == wanted
            ids = (
                [*chain.blocks[: wanted // BLOCK_TOKENS], chain.state_id(wanted)] if wanted else []
            )
            assert found.fetch_bytes == sum(sizes[id_] for id_ in ids)
            run = next((i for i, id_ in enumerate(chain.blocks) if id_ not in there), None)
            count = len(chain.blocks) if run is None else run
            assert found.overlap_tokens == count * BLOCK_TOKENS


TestMirror = MirrorMachine.TestCase
TestMirror.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)


def test_a_state_of_another_prompt_on_the_same_block_is_not_taken_for_ours() -> None:
    """Both stand at 384 tokens on the same block; only the tail's tokens differ."""
    ours, theirs = prompt("a", 128), ROOT.extend([ord("a")] * 256 + [9] * 128)
    mirror = Mirror()
    mirror.came("n", [block(ours, 0), state(theirs, 384)])
    assert mirror.resident(ours).resumable_tokens == 0
    assert mirror.resident(theirs).resumable_tokens == 384


def test_the_mirror_is_bounded_and_says_what_it_passed_over() -> None:
    mirror, chain = Mirror(most_objects=2), prompt("abcd")
    mirror.came("n", [block(chain, i) for i in range(4)])
    assert (len(mirror), mirror.passed_over) == (2, 2)
    mirror.went("n", [chain.blocks[0], chain.blocks[3], b"unknown"])
    assert len(mirror) == 1
    assert mirror.resident(chain) == NOTHING
    mirror.lost("n")
    assert (len(mirror), mirror.nodes()) == (0, {})


@dataclass(frozen=True)
class Ids:
    """A prompt that may not be hashed."""

    blocks: tuple[bytes, ...]
    tokens: tuple[int, ...] = field(default=(0,) * BLOCK_TOKENS * 4096)

    def state_id(self, position: int) -> bytes:
        raise AssertionError("a look-up at block borders hashes nothing")


def test_a_million_tokens_are_looked_up_without_hashing() -> None:
    blocks = tuple(sha256(str(i).encode()).digest() for i in range(4096))
    mirror = Mirror()
    made = [
        Came(id_, blocks[i - 1] if i else b"", ObjectKind.BLOCK, (i + 1) * BLOCK_TOKENS, 10)
        for i, id_ in enumerate(blocks)
    ]
    mirror.came("n", made)
    mirror.came("n", [Came(b"s", blocks[31], ObjectKind.STATE, 32 * BLOCK_TOKENS, 5)])
    found = mirror.resident(Ids(blocks))
    assert (found.resumable_tokens, found.fetch_bytes) == (8_192, 325)
    assert found.overlap_tokens == 1 << 20


@given(st.lists(st.sampled_from(PROMPTS), max_size=6), st.sampled_from(PROMPTS))
def test_in_flight_prompts_are_near_as_far_as_both_share_blocks(
    flying: list[Chain], asked: Chain
) -> None:
    inflight = InFlight()
    readings = [inflight.begin(f"p{i}", chain.blocks) for i, chain in enumerate(flying)]
    wanted: dict[str, int] = {}
    for i, chain in enumerate(flying):
        shared = 0
        while shared < min(len(chain.blocks), len(asked.blocks)) and (
            chain.blocks[shared] == asked.blocks[shared]
        ):
            shared += 1
        if shared:
            wanted[f"p{i}"] = shared * BLOCK_TOKENS
    assert inflight.near(asked.blocks) == wanted
    for reading in readings:
        inflight.end(reading)
        inflight.end(reading)
    assert len(inflight) == 0


def test_what_was_routed_longest_ago_is_forgotten_first() -> None:
    seen = Seen(most_blocks=3)
    seen.note("p0", prompt("ab").blocks)
    seen.note("p1", prompt("abc").blocks)
    assert seen.seen(prompt("abc").blocks) == {"p0": 512, "p1": 768}
    seen.note("p2", prompt("x").blocks)
    assert len(seen) == 3
    assert seen.seen(prompt("abc").blocks) == {"p0": 512, "p1": 512}, "the prompt's end went first"
