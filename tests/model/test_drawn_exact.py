"""Class `exact`, by drawn schedules: whatever happens on the way, the bits are the same
(architecture.md, "Numerics classes"; issue 3, item 3).

A schedule is a list of steps of one sequence: absorb some tokens (beside companions at any position
of theirs, anywhere in the batch), absorb wrong ones behind them and take those back, or leave the
worker (blocks and state exported, everything released, loaded into a fresh sequence of another
capacity). After it every position's logits, all that the outside can see and the drafts that would
come next must be those of one undisturbed pass.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.tiny_checkpoint import write_checkpoint
from kernels.ops import BACKEND_VARIABLE
from model.engine import DraftRequest, Engine, Segment, Sequence
from model.load import load_engine
from model.open import open_engine
from model.torch_engine import TorchEngine
from penstock.blocks import BLOCK_TOKENS
from penstock.request import Sampling
from penstock.worker import ModelSpec
from tests.model import drawn, oracle
from tests.model.engine_contract import a_replay_is_exact_and_leaves_the_blocks_alone, snapshot

# Beyond one pass of 1024 rows only in the long profile; test_paths.py does it in every run.
MOST = 1500 if drawn.LONG else 640
SPARE = 16
SLACK = 2e-5
FORMATS = [(kv, dtype) for kv in ("fp8", "bf16", "fp32") for dtype in ("float32", "bfloat16")]
Models = Callable[[str], oracle.OracleModel]


@dataclass(frozen=True)
class Step:
    """Absorb `count` tokens beside `before` and `after` (companions' token counts), or, with count
    0, move to a fresh sequence. `wrong` tokens behind them are taken back.
    """

    count: int
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    wrong: int = 0


@st.composite
def schedules(draw: st.DrawFn) -> list[Step]:
    """Steps over 1..MOST tokens; a few single tokens at the end, as decode takes them."""
    length = draw(st.integers(1, MOST))
    companions = st.lists(st.sampled_from([1, 1, 2, 5, 17, 60, 130]), max_size=2).map(tuple)
    steps, start = [], 0
    for end in draw(drawn.cuts(length, most=5)):
        if start and draw(st.booleans()):
            steps.append(Step(0))
        steps.append(Step(end - start, draw(companions), draw(companions)))
        start = end
    for _ in range(draw(st.integers(0, 6))):
        kept = draw(st.sampled_from([1, 1, 2, 4, 9]))
        wrong = draw(st.sampled_from([0, 1, 3, 9]))
        steps.append(Step(kept, draw(companions), draw(companions), wrong))
    return steps


class Rows:
    """Logits bytes of every position of one sequence under a schedule."""

    def __init__(self, engine: Engine, tokens: list[int]) -> None:
        self.engine, self.tokens = engine, tokens
        self.rows: list[bytes] = []
        self.sequence = engine.open(len(tokens) + SPARE)
        self._others: list[Sequence] = []

    def run(self, steps: list[Step]) -> list[bytes]:
        """All rows, then blocks, state, last logits and next drafts of the final sequence."""
        for step in steps:
            if step.count:
                self._absorb(step)
            else:
                self._move()
        seen = [*self.rows, *snapshot(self.engine, self.sequence)]
        most = self.engine.info.draft_tokens
        if most:
            ask = DraftRequest(self.sequence, 3, most, Sampling(seed=5))
            seen.append(json.dumps(self.engine.draft([ask])[0]).encode())
        for sequence in (self.sequence, *self._others):
            self.engine.release(sequence)
        return seen

    def _absorb(self, step: Step) -> None:
        at = self.sequence.position
        wrong = [(at + 11 * i + 1) % 97 for i in range(step.wrong)]
        fed = [*self.tokens[at : at + step.count], *wrong]
        mine = Segment(self.sequence, fed, all_logits=True, seekable=bool(wrong))
        before = [self._beside(i, n) for i, n in enumerate(step.before)]
        after = [self._beside(2 + i, n) for i, n in enumerate(step.after)]
        found = self.engine.forward([*before, mine, *after])[len(before)].logits
        assert found is not None
        self.rows += [bytes(found.row(i)) for i in range(step.count)]
        if wrong:
            self.engine.seek(self.sequence, at + step.count)

    def _beside(self, which: int, count: int) -> Segment:
        """The next tokens of companion `which`; companions live on through the schedule."""
        while len(self._others) <= which:
            self._others.append(self.engine.open(2 * MOST))
        other = self._others[which]
        if other.position + count > other.capacity:
            self.engine.release(other)
            other = self._others[which] = self.engine.open(2 * MOST)
        at = other.position
        vocab = self.engine.info.vocab_size
        return Segment(other, [(7 * which + 3 * p) % vocab for p in range(at, at + count)])

    def _move(self) -> None:
        """As a hand-over does it; the next owner may have room for more."""
        old = self.sequence
        blocks = [self.engine.export_block(old, i) for i in range(old.position // BLOCK_TOKENS)]
        position, state = old.position, self.engine.export_state(old)
        self.engine.release(old)
        self.sequence = self.engine.open(len(self.tokens) + 1000)
        for index, block in enumerate(blocks):
            self.engine.load_block(self.sequence, index, block)
        self.engine.load_state(self.sequence, position, state)


def compare(engine: Engine, steps: list[Step], seed: int) -> None:
    length = sum(step.count for step in steps)
    vocab = engine.info.vocab_size
    tokens = [(seed + 31 * p * p + 7 * p) % vocab for p in range(length)]
    alone = Rows(engine, tokens).run([Step(length)])
    got = Rows(engine, tokens).run(steps)
    assert differing(got, alone) == []


def differing(got: list[bytes], wanted: list[bytes]) -> list[int]:
    """Positions (then blocks, state, logits) whose bytes differ."""
    assert len(got) == len(wanted)
    return [i for i, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b]


@contextmanager
def engine_of(config: dict[str, Any], seed: int, kv: str, dtype: str) -> Iterator[TorchEngine]:
    folder = Path(tempfile.mkdtemp())
    try:
        source = oracle.build_changed(config, folder, seed=seed)
        engine = load_engine(source.folder, kv_cache_dtype=kv, dtype=dtype)
        yield engine
        engine.close()
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize(("kv", "dtype"), FORMATS)
def test_a_drawn_schedule_changes_no_bit(kv: str, dtype: str, model: Models) -> None:
    engine = load_engine(model("all_kinds").folder, kv_cache_dtype=kv, dtype=dtype)

    @drawn.examples(2)
    @given(steps=schedules(), seed=st.integers(0, 99))
    def same_bits(steps: list[Step], seed: int) -> None:
        compare(engine, steps, seed)

    same_bits()


@pytest.mark.parametrize(
    ("draft", "rounding"), [("mtp", "auto"), ("dspark", "activations"), ("none", "index,scores")]
)
def test_a_drawn_schedule_changes_no_bit_of_a_quantised_checkpoint(
    draft: str, rounding: str, tmp_path: Path
) -> None:
    """FP8 and FP4 weights, the rounding points of the release, and its draft modules."""
    write_checkpoint(tmp_path, draft=draft)
    engine = load_engine(tmp_path, rounding=rounding, draft_tokens="auto")
    assert bool(engine.info.draft_tokens) == (draft != "none")

    @drawn.examples(2)
    @given(steps=schedules(), seed=st.integers(0, 99))
    def same_bits(steps: list[Step], seed: int) -> None:
        compare(engine, steps, seed)

    same_bits()
    engine.close()


@drawn.examples(5)
@given(
    config=drawn.configs(index_heads=(4, 32)),
    format_=st.sampled_from(FORMATS),
    steps=schedules(),
    seed=st.integers(0, 99),
)
def test_a_drawn_model_keeps_its_bits(
    config: dict[str, Any], format_: tuple[str, str], steps: list[Step], seed: int
) -> None:
    with engine_of(config, seed, *format_) as engine:
        compare(engine, steps, seed)


@drawn.examples(5)
@given(
    config=drawn.configs(index_heads=(4, 32)),
    format_=st.sampled_from(FORMATS),
    seed=st.integers(0, 99),
)
def test_a_drawn_model_s_replay_is_exact(
    config: dict[str, Any], format_: tuple[str, str], seed: int
) -> None:
    with engine_of(config, seed, *format_) as engine:
        a_replay_is_exact_and_leaves_the_blocks_alone(lambda: engine)


def test_a_replay_a_window_a_layer_is_enough_and_two_layers_less_is_not() -> None:
    """The bound is no habit: what is cut off it shows in the state."""
    changes = {"ratios": [4, 128, 4, 0], "sliding_window": 128}
    with engine_of(changes, 5, "fp32", "float32") as engine:
        count = engine.info.replay_tokens
        assert count == 4 * 128
        end, tokens = 1024, [(7 * i * i + i) % 128 for i in range(1024)]
        whole = engine.open(end)
        engine.forward([Segment(whole, tokens)])
        same = {}
        for replayed in (count, count - 256):
            sequence = engine.open(end)
            for index in range(end // BLOCK_TOKENS):
                engine.load_block(sequence, index, engine.export_block(whole, index))
            # Past the engine's own check, which refuses a replay that is too short.
            sequence.replay(end - replayed)
            engine.forward([Segment(sequence, tokens[end - replayed :])])
            same[replayed] = engine.export_state(sequence) == engine.export_state(whole)
    assert same == {count: True, count - 256: False}


@pytest.mark.parametrize("draft", ["mtp", "dspark"])
def test_a_replay_restores_the_draft_module_too(draft: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, draft=draft)
    engine = load_engine(tmp_path, draft_tokens="auto")
    assert engine.info.replay_tokens > 0
    a_replay_is_exact_and_leaves_the_blocks_alone(lambda: engine)
    engine.close()


def test_class_fast_offers_no_replay(model: Models) -> None:
    engine = load_engine(model("ledger_like").folder, numerics="fast")
    assert engine.info.replay_tokens == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_or_four_worker_threads_give_the_same_bits(dtype: str, model: Models) -> None:
    source = model("ledger_like")
    tokens = source.tokens(300)
    seen = []
    try:
        for threads in (1, 4):
            spec = ModelSpec(model=str(source.folder), dtype=dtype, torch_threads=threads)
            engine = open_engine(spec)
            seen.append(Rows(engine, tokens).run([Step(290), *[Step(1)] * 10]))
            engine.close()
    finally:
        torch.set_num_threads(1)
    assert differing(*seen) == []


def test_the_thread_that_drives_the_engine_changes_no_bit(model: Models) -> None:
    """A worker loads in one thread and steps in another, which may have used torch before."""
    source = model("ledger_like")
    tokens = source.tokens(300)
    alone = Rows(load_engine(source.folder), tokens).run([Step(300)])
    loaded, found = threading.Event(), list[list[bytes]]()

    def drive() -> None:
        torch.set_num_threads(4)
        torch.mm(torch.ones(512, 512), torch.ones(512, 512))
        ready.set()
        loaded.wait(60)
        found.append(Rows(engines[0], tokens).run([Step(290), *[Step(1)] * 10]))

    ready, engines = threading.Event(), list[TorchEngine]()
    thread = threading.Thread(target=drive)
    try:
        thread.start()
        ready.wait(60)
        engines.append(load_engine(source.folder))
        loaded.set()
        thread.join(60)
    finally:
        torch.set_num_threads(1)
    assert len(found) == 1
    assert differing(found[0], alone) == []


@pytest.mark.parametrize("backend", ["auto", "reference"])
@drawn.examples(3)
@given(config=drawn.configs(), length=st.integers(1, 400), seed=st.integers(0, 99))
def test_class_fast_stays_within_tolerance(
    backend: str, config: dict[str, Any], length: int, seed: int
) -> None:
    """In one pass and beside others; from the oracle's first near tie on, choices may differ."""
    folder = Path(tempfile.mkdtemp())
    before = os.environ.get(BACKEND_VARIABLE)
    os.environ[BACKEND_VARIABLE] = backend
    try:
        source = oracle.build_changed(config, folder, seed=seed)
        tokens = source.tokens(length, seed)
        ties = (source.watched(tokens).margin_L < SLACK).nonzero()
        until = int(ties[0]) if len(ties) else length
        engine = load_engine(folder, kv_cache_dtype="fp32", numerics="exact")
        wanted = numbers(Rows(engine, tokens).run([Step(length)])[:until])
        engine = load_engine(folder, kv_cache_dtype="fp32", numerics="fast")
        half = length // 2
        moved = [Step(half, (5,)), Step(0)] if half else []
        steps = [*moved, Step(length - half, (), (1, 60))]
        for way in ([Step(length)], steps):
            off = (numbers(Rows(engine, tokens).run(way)[:until]) - wanted).abs()
            assert not off.numel() or off.max() <= 1e-4, way
    finally:
        os.environ.pop(BACKEND_VARIABLE)
        if before is not None:
            os.environ[BACKEND_VARIABLE] = before
        torch.set_num_threads(1)
        shutil.rmtree(folder)


def numbers(rows: list[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(rows) or bytes(4)), dtype=torch.float32)
