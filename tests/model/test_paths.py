"""Numerics class `exact`: bit for bit the same on every path (architecture.md, "Numerics
classes").
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from model.engine import Segment
from model.load import load_engine
from model.torch_engine import TorchEngine
from tests.model import oracle
from tests.model.engine_contract import absorb, snapshot

LENGTH = 1061
Models = Callable[[str], oracle.OracleModel]
FORMATS = [("fp8", "float32"), ("fp32", "float32"), ("fp8", "bfloat16")]
# Other models, formats, schedules and lengths up to 640: test_drawn_exact.py.
CASES = [(name, *FORMATS[0]) for name in ("all_kinds", "odd_window", "wide_window", "ledger_like")]
CASES += [("all_kinds", *FORMATS[1]), ("ledger_like", *FORMATS[2])]
# Multiples of 256, of 128, and positions with nothing to recommend them.
RESTORED_AT = (3, 128, 513, 1024, 1055)


def engine_of(model: Models, name: str, kv: str, dtype: str) -> tuple[TorchEngine, list[int]]:
    source = model(name)
    return load_engine(source.folder, kv_cache_dtype=kv, dtype=dtype), source.tokens(LENGTH)


@pytest.mark.parametrize(("name", "kv", "dtype"), CASES)
def test_every_chunking_and_restore_gives_the_same_bits(
    name: str, kv: str, dtype: str, model: Models
) -> None:
    engine, tokens = engine_of(model, name, kv, dtype)
    sequence = engine.open(LENGTH)
    states = engine.forward([Segment(sequence, tokens, RESTORED_AT)])[0].states
    whole = snapshot(engine, sequence)
    for chunk in (128, 391):
        assert snapshot(engine, absorb(engine, tokens, chunk=chunk)) == whole, f"chunk {chunk}"
    for position in RESTORED_AT:
        restored = engine.open(LENGTH)
        for index in range(position // 256):
            engine.load_block(restored, index, whole[index])
        engine.load_state(restored, position, states[position])
        engine.forward([Segment(restored, tokens[position:])])
        assert snapshot(engine, restored) == whole, f"restored at {position}"
    print(f"{name} {kv} {dtype}: 2 chunkings and {len(RESTORED_AT)} restores, same bits")


@pytest.mark.parametrize(("name", "kv"), [("all_kinds", "fp8"), ("ledger_like", "fp32")])
def test_token_by_token_gives_the_same_bits(name: str, kv: str, model: Models) -> None:
    engine, tokens = engine_of(model, name, kv, "float32")
    for start, end in ((0, 24), (240, 270)):
        whole = snapshot(engine, absorb(engine, tokens[:end], chunk=end))
        sequence = engine.open(end)
        engine.forward([Segment(sequence, tokens[:start])])
        for token in tokens[start:end]:
            engine.forward([Segment(sequence, [token])])
        assert snapshot(engine, sequence) == whole, (start, end)


@pytest.mark.parametrize(("name", "kv"), [("all_kinds", "fp8"), ("ledger_like", "fp32")])
def test_three_companions_change_no_bit(name: str, kv: str, model: Models) -> None:
    engine, tokens = engine_of(model, name, kv, "float32")
    alone = snapshot(engine, absorb(engine, tokens, chunk=LENGTH))
    others = [engine.open(LENGTH) for _ in range(3)]
    for i, other in enumerate(others):
        engine.forward([Segment(other, tokens[i : 100 * i + 5])])
    sequence = engine.open(LENGTH)
    sizes = [100, 1, 1, 300, 17, 64]
    done = turn = 0
    while done < LENGTH:
        size = min(sizes[turn % len(sizes)], LENGTH - done)
        side = [
            Segment(o, tokens[done : done + n]) for o, n in zip(others, (1, 3, 30), strict=True)
        ]
        engine.forward([side[0], Segment(sequence, tokens[done : done + size]), *side[1:]])
        done, turn = done + size, turn + 1
    assert snapshot(engine, sequence) == alone


def test_more_entries_than_one_tile_of_index_keys(tmp_path: Path) -> None:
    """4300 tokens are 1075 entries; a tile of keys holds 1024. One layer of each compressor."""
    changes = {"ratios": [4, 2], "hidden_size": 32, "head_dim": 64, "index_topk": 16}
    changes |= {"max_position_embeddings": 8192, "index_head_dim": 64}
    source = oracle.build_changed(changes, tmp_path)
    engine = load_engine(source.folder)
    length, cut = 4300, 4290
    tokens = source.tokens(length)
    sequence = engine.open(length)
    state = engine.forward([Segment(sequence, tokens, (cut,))])[0].states[cut]
    whole = snapshot(engine, sequence)
    chunked = engine.open(8192)
    for start in range(0, length, 2100):
        side = Segment(engine.open(50), tokens[start : start + 50])
        engine.forward([side, Segment(chunked, tokens[start : start + 2100])])
    assert snapshot(engine, chunked) == whole
    restored = engine.open(5000)
    for index in range(cut // 256):
        engine.load_block(restored, index, whole[index])
    engine.load_state(restored, cut, state)
    for token in tokens[cut:]:
        engine.forward([Segment(restored, [token])])
    assert snapshot(engine, restored) == whole


def test_fingerprint_tells_formats_types_and_weights_apart(model: Models) -> None:
    folder = model("all_kinds").folder
    prints = [
        load_engine(folder).info.fingerprint,
        load_engine(folder, kv_cache_dtype="fp32").info.fingerprint,
        load_engine(folder, dtype="bfloat16").info.fingerprint,
        load_engine(folder, numerics="fast").info.fingerprint,
        load_engine(model("heavy_last").folder).info.fingerprint,
    ]
    assert len(set(prints)) == len(prints)
    assert load_engine(folder, max_model_len=100).info.fingerprint == prints[0]
