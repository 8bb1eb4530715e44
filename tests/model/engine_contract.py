"""What every `Engine` keeps to, written against the Protocol: run it on the fake and on the model.

Each function takes a factory of fresh engines. Call them from a test module:

    @pytest.mark.parametrize("clause", engine_contract.CLAUSES, ids=lambda c: c.__name__)
    def test_contract(clause): clause(make_engine)
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from model.engine import SEEKABLE_TOKENS, DraftRequest, Engine, Segment, Sequence
from penstock.blocks import BLOCK_TOKENS
from penstock.request import Sampling

Factory = Callable[[], Engine]
LENGTH = 2 * BLOCK_TOKENS + 85


def tokens_for(engine: Engine, length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(engine.info.vocab_size) for _ in range(length)]


def absorb(
    engine: Engine, tokens: list[int], *, chunk: int, capacity: int | None = None
) -> Sequence:
    sequence = engine.open(capacity or len(tokens))
    for start in range(0, len(tokens), chunk):
        engine.forward([Segment(sequence, tokens[start : start + chunk])])
    return sequence


def logits_of(engine: Engine, sequence: Sequence) -> bytes:
    return bytes(engine.logits([sequence]).row(0))


def snapshot(engine: Engine, sequence: Sequence) -> list[bytes]:
    """All that the outside can see of a sequence: blocks, state, logits."""
    blocks = [engine.export_block(sequence, i) for i in range(sequence.position // BLOCK_TOKENS)]
    return [*blocks, engine.export_state(sequence), logits_of(engine, sequence)]


def info_is_complete(make: Factory) -> None:
    info = make().info
    assert len(info.fingerprint) == 32
    assert info.vocab_size > 0
    assert info.max_model_len > 0
    assert info.eos_token_ids
    assert info.numerics in ("exact", "fast")
    assert make().info.fingerprint == info.fingerprint


def logits_are_float32_rows(make: Factory) -> None:
    engine = make()
    first = absorb(engine, tokens_for(engine, 5), chunk=5)
    second = absorb(engine, tokens_for(engine, 9, seed=1), chunk=9)
    rows = engine.logits([first, second])
    assert len(rows) == 2
    row = rows.row(1)
    assert (row.format, row.ndim, len(row), row.readonly) == ("f", 1, engine.info.vocab_size, True)
    assert bytes(row) == logits_of(engine, second)
    assert bytes(rows.row(0)) != bytes(row)


def payload_sizes_follow_the_layout(make: Factory) -> None:
    engine = make()
    layout = engine.info.layout
    for length in (1, 3, 130, BLOCK_TOKENS, LENGTH):
        sequence = absorb(engine, tokens_for(engine, length), chunk=length)
        assert sequence.position == length
        assert len(engine.export_state(sequence)) == layout.state_bytes(length)
        for index in range(length // BLOCK_TOKENS):
            assert len(engine.export_block(sequence, index)) == layout.block_bytes


def chunking_changes_nothing(make: Factory) -> None:
    engine = make()
    tokens = tokens_for(engine, LENGTH)
    whole = snapshot(engine, absorb(engine, tokens, chunk=LENGTH))
    for chunk in (128, 391):
        assert snapshot(engine, absorb(engine, tokens, chunk=chunk)) == whole, chunk
    # Small steps where windows, entries and blocks begin and end; the rest in large ones.
    for small in (1, 3):
        sequence = engine.open(LENGTH)
        while sequence.position < LENGTH:
            at = sequence.position
            border = at < 40 or 110 <= at < 150 or 480 <= at < 530
            step = small if border else next(p for p in (110, 480, LENGTH) if p > at) - at
            engine.forward([Segment(sequence, tokens[at : at + step])])
        assert snapshot(engine, sequence) == whole, small


def companions_change_nothing(make: Factory) -> None:
    engine = make()
    tokens = tokens_for(engine, LENGTH)
    alone = snapshot(engine, absorb(engine, tokens, chunk=LENGTH))
    sequence = engine.open(LENGTH)
    others = [engine.open(LENGTH) for _ in range(3)]
    for start in range(0, LENGTH, 200):
        part = tokens[start : start + 200]
        side = [Segment(o, tokens_for(engine, 1 + 7 * i, start + i)) for i, o in enumerate(others)]
        engine.forward([side[0], Segment(sequence, part), *side[1:]])
    assert snapshot(engine, sequence) == alone


def states_inside_a_segment_are_those_at_its_end(make: Factory) -> None:
    engine = make()
    tokens = tokens_for(engine, LENGTH)
    wanted = (1, 4, 127, 128, 256, 300, LENGTH)
    sequence = engine.open(LENGTH)
    states = engine.forward([Segment(sequence, tokens, wanted)])[0].states
    assert tuple(sorted(states)) == wanted
    for position in wanted:
        short = absorb(engine, tokens[:position], chunk=position)
        assert engine.export_state(short) == states[position], position


def a_restored_sequence_goes_on_alike(make: Factory) -> None:
    engine, other = make(), make()
    tokens = tokens_for(engine, LENGTH)
    wanted = (2, 5, 128, 255, 256, 300, 384, 512, LENGTH)
    sequence = engine.open(LENGTH)
    states = engine.forward([Segment(sequence, tokens, wanted)])[0].states
    whole = snapshot(engine, sequence)
    for position in wanted:
        restored = other.open(LENGTH)
        for index in range(position // BLOCK_TOKENS):
            other.load_block(restored, index, memoryview(whole[index]))
        other.load_state(restored, position, bytearray(states[position]))
        assert restored.position == position
        assert other.export_state(restored) == states[position], position
        if position < LENGTH:
            other.forward([Segment(restored, tokens[position:])])
        assert snapshot(other, restored) == whole, position


def a_replay_is_exact_and_leaves_the_blocks_alone(make: Factory) -> None:
    engine, other = make(), make()
    count = engine.info.replay_tokens
    if not count:
        return
    end = -(-(count + 40) // BLOCK_TOKENS) * BLOCK_TOKENS
    tokens = tokens_for(engine, end + 85)
    sequence = engine.open(len(tokens))
    (at_end,) = engine.forward([Segment(sequence, tokens, (end,))])
    whole = snapshot(engine, sequence)
    for start, chunk in ((end - count, 1 << 20), (end - count, 100), (0, 300)):
        replayed = other.open(len(tokens))
        for index in range(end // BLOCK_TOKENS):
            other.load_block(replayed, index, whole[index])
        other.replay(replayed, start)
        assert replayed.position == start
        for at in range(start, end, chunk):
            other.forward([Segment(replayed, tokens[at : min(at + chunk, end)])])
        assert other.export_state(replayed) == at_end.states[end], (start, chunk)
        other.forward([Segment(replayed, tokens[end:])])
        assert snapshot(other, replayed) == whole, (start, chunk)


def a_replay_that_could_not_be_exact_is_refused(make: Factory) -> None:
    engine = make()
    count = engine.info.replay_tokens
    tokens = tokens_for(engine, count + 2 * BLOCK_TOKENS)
    sequence = absorb(engine, tokens, chunk=len(tokens))
    blocks = (len(tokens) // BLOCK_TOKENS) * BLOCK_TOKENS
    with pytest.raises(ValueError):
        engine.replay(sequence, 0)
    fresh = engine.open(len(tokens))
    for index in range(blocks // BLOCK_TOKENS):
        engine.load_block(fresh, index, engine.export_block(sequence, index))
    for start in (-128, 1, blocks - count + 128 if count else 0, blocks + 128):
        with pytest.raises(ValueError):
            engine.replay(fresh, start)
    if count:
        engine.replay(fresh, 0)
        with pytest.raises(ValueError):
            engine.forward([Segment(fresh, tokens[:300], (128,))])


def other_tokens_give_other_results(make: Factory) -> None:
    engine = make()
    tokens = tokens_for(engine, 40)
    changed = [(tokens[0] + 1) % engine.info.vocab_size, *tokens[1:]]
    a, b = absorb(engine, tokens, chunk=40), absorb(engine, changed, chunk=40)
    assert engine.export_state(a) != engine.export_state(b)


def an_empty_segment_or_batch_does_nothing(make: Factory) -> None:
    engine = make()
    sequence = absorb(engine, tokens_for(engine, 10), chunk=10, capacity=20)
    before = snapshot(engine, sequence)
    assert engine.forward([]) == []
    assert engine.forward([Segment(sequence, [])])[0].states == {}
    assert len(engine.logits([])) == 0
    assert snapshot(engine, sequence) == before


def misuse_is_a_value_error(make: Factory) -> None:
    engine = make()
    tokens = tokens_for(engine, 300)
    sequence = absorb(engine, tokens, chunk=300)
    block, state = engine.export_block(sequence, 0), engine.export_state(sequence)
    with pytest.raises(ValueError, match="capacity"):
        engine.forward([Segment(sequence, [0])])
    with pytest.raises(ValueError, match="not complete"):
        engine.export_block(sequence, 1)
    with pytest.raises(ValueError, match="capacity"):
        engine.open(0)
    with pytest.raises(ValueError, match="capacity"):
        engine.open(engine.info.max_model_len + 1)
    fresh = engine.open(600)
    with pytest.raises(ValueError, match="vocabulary"):
        engine.forward([Segment(fresh, [engine.info.vocab_size])])
    fresh = engine.open(600)
    with pytest.raises(ValueError, match="empty"):
        engine.logits([fresh])
    with pytest.raises(ValueError, match="empty"):
        engine.export_state(fresh)
    with pytest.raises(ValueError, match="bytes"):
        engine.load_block(fresh, 0, block[:-1])
    with pytest.raises(ValueError, match="order"):
        engine.load_block(fresh, 1, block)
    with pytest.raises(ValueError, match="blocks first"):
        engine.load_state(fresh, 300, state)
    engine.load_block(fresh, 0, block)
    with pytest.raises(ValueError, match="bytes"):
        engine.load_state(fresh, 300, state + b"0")
    engine.load_state(fresh, 300, state)
    assert snapshot(engine, fresh) == snapshot(engine, sequence)


def a_released_sequence_is_refused(make: Factory) -> None:
    engine = make()
    sequence = absorb(engine, tokens_for(engine, 3), chunk=3)
    engine.release(sequence)
    engine.release(sequence)
    for use in (
        lambda: engine.forward([Segment(sequence, [0])]),
        lambda: engine.logits([sequence]),
        lambda: engine.export_state(sequence),
        lambda: engine.evidence(sequence),
    ):
        with pytest.raises(ValueError, match="released"):
            use()


def evidence_is_ordered_and_in_the_past(make: Factory) -> None:
    engine = make()
    sequence = absorb(engine, tokens_for(engine, LENGTH), chunk=LENGTH)
    found = engine.evidence(sequence)
    for span in found:
        assert 0 <= span.start < span.end <= LENGTH
        assert 0.0 < span.mass <= 1.0
    assert [e.mass for e in found] == sorted((e.mass for e in found), reverse=True)


def memory_is_priced_before_it_is_taken(make: Factory) -> None:
    engine = make()
    prices = [engine.bytes_for(n) for n in (1, 1000, 4000)]
    assert prices == sorted(prices)
    assert prices[0] > 0


def every_position_s_logits_are_those_of_its_prefix(make: Factory) -> None:
    engine = make()
    tokens = tokens_for(engine, 300)
    sequence = engine.open(300)
    asked = [Segment(sequence, tokens[:180], (128,), all_logits=True)]
    first = engine.forward([Segment(engine.open(9), tokens[:9]), *asked])[1]
    second = engine.forward([Segment(sequence, tokens[180:], all_logits=True)])[0]
    assert set(first.states) == {128}
    rows = [bytes(r.logits.row(i)) for r in (first, second) for i in range(len(r.logits))]
    assert len(rows) == 300
    for position in (1, 7, 128, 180, 181, 300):
        short = absorb(engine, tokens[:position], chunk=position)
        assert rows[position - 1] == logits_of(engine, short), position
    assert engine.forward([Segment(engine.open(3), tokens[:3])])[0].logits is None


def rejected_tokens_leave_no_trace(make: Factory) -> None:
    """T18: after every accepted prefix the sequence is what it would have been without the rest."""
    engine = make()
    tokens = tokens_for(engine, 400)
    plain = engine.open(400)
    sequence, other = engine.open(400), engine.open(400)
    start = 235
    engine.forward([Segment(s, tokens[:start]) for s in (plain, sequence)])
    rng, turn = random.Random(5), 0
    while sequence.position < start + 60:
        at, turn = sequence.position, turn + 1
        kept, lost = rng.randint(1, 6), rng.choice((0, 1, 3, 9))
        rejected = tokens_for(engine, lost, seed=turn)
        fed = [*tokens[at : at + kept], *rejected]
        # Beside a plain stream, as in a batch.
        side = Segment(other, tokens_for(engine, 1 + turn % 3, seed=turn))
        result = engine.forward([side, Segment(sequence, fed, all_logits=True, seekable=True)])[1]
        assert sequence.position == at + len(fed)
        assert result.logits is not None and len(result.logits) == len(fed)
        for there in rng.sample(range(1, len(fed) + 1), k=min(3, len(fed))):
            engine.seek(sequence, at + there)
            assert sequence.position == at + there
        engine.seek(sequence, at + kept)
        assert bytes(result.logits.row(kept - 1)) == logits_of(engine, sequence)
        engine.forward([Segment(plain, tokens[plain.position : at + kept])])
        assert engine.evidence(sequence) == engine.evidence(plain)
        assert snapshot(engine, sequence) == snapshot(engine, plain), (at, kept, lost)


def seek_outside_the_last_seekable_forward_is_refused(make: Factory) -> None:
    engine = make()
    tokens = tokens_for(engine, 60)
    sequence = engine.open(60)
    engine.forward([Segment(sequence, tokens[:20])])
    with pytest.raises(ValueError, match="seekable"):
        engine.seek(sequence, 15)
    engine.forward([Segment(sequence, tokens[20:25], seekable=True)])
    for position in (20, 26, -1):
        with pytest.raises(ValueError, match="seekable"):
            engine.seek(sequence, position)
    engine.seek(sequence, 23)
    engine.forward([Segment(sequence, tokens[23:30])])
    with pytest.raises(ValueError, match="seekable"):
        engine.seek(sequence, 24)
    whole = absorb(engine, tokens[:30], chunk=30)
    assert snapshot(engine, sequence) == snapshot(engine, whole)
    for bad in (
        Segment(engine.open(200), tokens_for(engine, SEEKABLE_TOKENS + 1), seekable=True),
        Segment(engine.open(60), tokens, (40,), seekable=True),
    ):
        with pytest.raises(ValueError, match="seekable"):
            engine.forward([bad])


def a_draft_changes_nothing_and_is_the_same_every_time(make: Factory) -> None:
    engine = make()
    most = engine.info.draft_tokens
    assert engine.draft([]) == []
    tokens = tokens_for(engine, 150)
    first = absorb(engine, tokens, chunk=150, capacity=200)
    second = absorb(engine, tokens[:70], chunk=70, capacity=200)
    if not most:
        with pytest.raises(ValueError, match="draft"):
            engine.draft([DraftRequest(first, 1, 1, Sampling())])
        return
    before = snapshot(engine, first)
    for sampling in (Sampling(temperature=0.0), Sampling(seed=3)):
        both = engine.draft(
            [DraftRequest(second, 5, most, sampling), DraftRequest(first, 3, most, sampling)]
        )
        assert all(len(tokens) <= most for tokens in both)
        assert all(0 <= t < engine.info.vocab_size for tokens in both for t in tokens)
        alone = engine.draft([DraftRequest(first, 3, most, sampling)])
        assert alone == [both[1]]
        banned = frozenset(both[1][:1])
        other = engine.draft([DraftRequest(first, 3, most, sampling, banned, 1)])[0]
        assert not (banned & set(other[:1]))
        assert engine.draft([DraftRequest(first, 3, 0, sampling)]) == [[]]
    assert snapshot(engine, first) == before
    with pytest.raises(ValueError, match="draft"):
        engine.draft([DraftRequest(first, 3, most + 1, Sampling())])
    with pytest.raises(ValueError, match="draft"):
        engine.draft([DraftRequest(engine.open(9), 3, most, Sampling())])


def a_draft_is_the_same_whichever_way_the_sequence_came(make: Factory) -> None:
    """The draft module's own cache is right after any chunking, seek and hand-over."""
    engine, other = make(), make()
    most = engine.info.draft_tokens
    if not most:
        return
    tokens = tokens_for(engine, 300)

    def drafts(on: Engine, sequence: Sequence) -> list[int]:
        sampling = Sampling(seed=9)
        return on.draft([DraftRequest(sequence, tokens[sequence.position], most, sampling)])[0]

    for position in (1, 2, 9, 17, 259):
        whole = absorb(engine, tokens[:position], chunk=position, capacity=300)
        want = drafts(engine, whole)
        for chunk in (1, 7, 20) if position < 20 else (128,):
            parts = absorb(engine, tokens[:position], chunk=chunk, capacity=300)
            assert drafts(engine, parts) == want, (position, chunk)
        restored = other.open(300)
        for index in range(position // BLOCK_TOKENS):
            other.load_block(restored, index, engine.export_block(whole, index))
        other.load_state(restored, position, engine.export_state(whole))
        assert drafts(other, restored) == want, position
        back = absorb(engine, tokens[: position - 1], chunk=128, capacity=300)
        tail = [tokens[position - 1], *tokens_for(engine, 5, seed=position)]
        engine.forward([Segment(back, tail, seekable=True)])
        engine.seek(back, position)
        assert drafts(engine, back) == want, position


def a_sequence_that_grows_is_one_that_was_large_from_the_start(make: Factory) -> None:
    engine = make()
    tokens = tokens_for(engine, LENGTH + 600)
    large = absorb(engine, tokens, chunk=97)
    small = engine.open(LENGTH)
    engine.forward([Segment(small, tokens[:LENGTH])])
    with pytest.raises(ValueError):
        engine.grow(small, LENGTH - 1)
    before = snapshot(engine, small)
    for capacity in (LENGTH, LENGTH + 1, LENGTH + 600):
        engine.grow(small, capacity)
        assert small.capacity == capacity
    assert snapshot(engine, small) == before
    for start in range(LENGTH, LENGTH + 600, 150):
        engine.forward([Segment(small, tokens[start : start + 150])])
    assert snapshot(engine, small) == snapshot(engine, large)
    with pytest.raises(ValueError):
        engine.grow(small, engine.info.max_model_len + 1)
    engine.release(small)
    with pytest.raises(ValueError):
        engine.grow(small, LENGTH + 700)


CLAUSES: tuple[Callable[[Factory], None], ...] = (
    info_is_complete,
    logits_are_float32_rows,
    payload_sizes_follow_the_layout,
    chunking_changes_nothing,
    companions_change_nothing,
    states_inside_a_segment_are_those_at_its_end,
    a_restored_sequence_goes_on_alike,
    a_replay_is_exact_and_leaves_the_blocks_alone,
    a_replay_that_could_not_be_exact_is_refused,
    other_tokens_give_other_results,
    an_empty_segment_or_batch_does_nothing,
    a_sequence_that_grows_is_one_that_was_large_from_the_start,
    misuse_is_a_value_error,
    a_released_sequence_is_refused,
    evidence_is_ordered_and_in_the_past,
    memory_is_priced_before_it_is_taken,
    every_position_s_logits_are_those_of_its_prefix,
    rejected_tokens_leave_no_trace,
    seek_outside_the_last_seekable_forward_is_refused,
    a_draft_changes_nothing_and_is_the_same_every_time,
    a_draft_is_the_same_whichever_way_the_sequence_came,
)

DRAFT_CLAUSES = (
    companions_change_nothing,
    a_restored_sequence_goes_on_alike,
    a_draft_changes_nothing_and_is_the_same_every_time,
    a_draft_is_the_same_whichever_way_the_sequence_came,
)
"""Those in which a draft module changes what an engine does."""
