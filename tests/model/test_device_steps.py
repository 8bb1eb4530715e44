"""Decode steps in buckets: padding and neighbours change nothing, recorded steps follow their
inputs, and what was recorded is dropped when memory moves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from model.device.engine import DeviceEngine
from model.device.steps import MOST_ROWS, Bucket, Rerun
from model.engine import Segment
from model.load import load_device_engine
from penstock.blocks import BLOCK_TOKENS
from tests.model import oracle
from tests.model.engine_contract import absorb, snapshot

Models = Callable[[str], oracle.OracleModel]


def engine_of(folder: Path, recorder: Rerun | None = None) -> DeviceEngine:
    return load_device_engine(folder, device="cpu", backend="reference", recorder=recorder)


@given(rows=st.integers(1, 2 * MOST_ROWS), tokens=st.integers(1, 1 << 20))
def test_a_bucket_holds_its_rows_and_tokens_and_is_not_twice_as_large(
    rows: int, tokens: int
) -> None:
    bucket = Bucket.of(rows, tokens)
    assert rows <= bucket.rows < 2 * rows
    assert tokens <= bucket.pages * BLOCK_TOKENS
    assert bucket.pages == 4 or bucket.pages * BLOCK_TOKENS < 2 * (tokens + BLOCK_TOKENS)
    assert Bucket.of(bucket.rows, bucket.pages * BLOCK_TOKENS) == bucket


def test_recorded_steps_give_the_bits_of_unrecorded_ones(model: Models) -> None:
    """Sequences come and go and cross bucket borders: 1 to 3 rows are buckets 1, 2 and 4."""
    source = model("all_kinds")
    tokens = source.tokens(60)
    plain, recorded = engine_of(source.folder), engine_of(source.folder, Rerun())
    shots = []
    for engine in (plain, recorded):
        live = [absorb(engine, tokens[:n], chunk=n, capacity=80) for n in (5, 9, 30)]
        evidence = []
        for step in range(9):
            batch = live[: 1 + step % 3]
            segments = [Segment(s, [tokens[s.position]], all_logits=step == 4) for s in batch]
            results = engine.forward(segments)
            evidence.append([engine.evidence(s) for s in batch])
            assert (results[0].logits is not None) == (step == 4)
        # Evidence asked for later is that of the step, not what a replay has left there since.
        engine.forward([Segment(live[0], [1])])
        kept = [s.evidence for s in live[1:]]
        shots.append(([snapshot(engine, s) for s in live], evidence, kept))
    assert shots[0] == shots[1]
    assert [b.rows for b in recorded.steps.recorded] == [2, 4, 1]


def test_moved_memory_drops_what_was_recorded(model: Models) -> None:
    source = model("all_kinds")
    tokens = source.tokens(40)
    engine = engine_of(source.folder, Rerun())
    sequence = absorb(engine, tokens[:20], chunk=20, capacity=40)
    engine.forward([Segment(sequence, [tokens[20]])])
    before = len(engine.steps.recorded)
    others = [engine.open(2000) for _ in range(9)]
    for token in tokens[21:]:
        engine.forward([Segment(sequence, [token])])
    assert before == len(engine.steps.recorded) == 1
    assert snapshot(engine, sequence) == snapshot(engine, absorb(engine, tokens, chunk=40))
    for other in others:
        engine.release(other)


def test_more_sequences_than_a_step_holds_are_done_in_several(model: Models) -> None:
    source = model("window_only")
    engine = engine_of(source.folder)
    count = MOST_ROWS + 3
    sequences = [engine.open(4) for _ in range(count)]
    engine.forward([Segment(s, [i % 100]) for i, s in enumerate(sequences)])
    assert engine.steps.groups(sequences) == [MOST_ROWS, 3]
    rows = engine.logits(sequences)
    for i in (0, MOST_ROWS - 1, MOST_ROWS, count - 1):
        alone = absorb(engine, [i % 100], chunk=1)
        assert bytes(rows.row(i)) == bytes(engine.logits([alone]).row(0))
    longest = 1 << 20
    assert Bucket.of(1, longest).pages * BLOCK_TOKENS == longest
