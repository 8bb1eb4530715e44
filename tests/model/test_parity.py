"""Logits against transformers 5.23.0 in fp32, on every path a prompt can take (deepseek-v4.md
12).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from model.engine import Segment
from model.load import load_engine
from model.torch_engine import TorchEngine
from penstock.blocks import BLOCK_TOKENS
from tests.model import oracle

LENGTHS = (1, 7, 130, 513, 1500)
RAGGED = (3, 1, 9, 2, 17, 5, 128, 391, 10**6)
TOLERANCE = 1e-4
Models = Callable[[str], oracle.OracleModel]


def row(engine: TorchEngine, sequence: object) -> torch.Tensor:
    return torch.frombuffer(bytearray(engine.logits([sequence]).row(0)), dtype=torch.float32)


def steps(start: int, length: int) -> list[tuple[int, int]]:
    found = []
    for step in RAGGED:
        end = min(start + step, length)
        if end > start:
            found.append((start, end))
        start = end
    return found


@pytest.mark.parametrize("name", list(oracle.MODELS))
def test_logits_agree_with_transformers_on_every_path(name: str, model: Models) -> None:
    source = model(name)
    engine = load_engine(source.folder, kv_cache_dtype="fp32", dtype="float32")
    worst = {"one chunk": 0.0, "ragged chunks": 0.0, "restored, then token by token": 0.0}

    def compare(path: str, sequence: object, wanted: torch.Tensor) -> None:
        worst[path] = max(worst[path], (row(engine, sequence) - wanted).abs().max().item())

    for length in LENGTHS:
        tokens = source.tokens(length)
        wanted = source.logits(tokens)
        whole = engine.open(length)
        cut = max(length - 40, length // 2)
        states = engine.forward([Segment(whole, tokens, (cut,) if cut else ())])[0].states
        compare("one chunk", whole, wanted[-1])

        ragged = engine.open(length)
        for start, end in steps(0, length):
            engine.forward([Segment(ragged, tokens[start:end])])
            compare("ragged chunks", ragged, wanted[end - 1])

        restored = engine.open(length)
        if cut:
            for index in range(cut // BLOCK_TOKENS):
                engine.load_block(restored, index, engine.export_block(whole, index))
            engine.load_state(restored, cut, states[cut])
        for position in range(cut, length):
            engine.forward([Segment(restored, [tokens[position]])])
            compare("restored, then token by token", restored, wanted[position])
        for sequence in (whole, ragged, restored):
            engine.release(sequence)
    print(f"\n{name}: worst difference {worst}, logits std {wanted.std():.2f}")
    assert max(worst.values()) <= TOLERANCE


def test_bfloat16_stays_near_float32(model: Models) -> None:
    source = model("ledger_like")
    tokens = source.tokens(200)
    rows = []
    for dtype in ("float32", "bfloat16"):
        engine = load_engine(source.folder, kv_cache_dtype="bf16", dtype=dtype)
        sequence = engine.open(200)
        engine.forward([Segment(sequence, tokens)])
        rows.append(row(engine, sequence))
    difference = (rows[0] - rows[1]).abs().mean().item()
    print(f"mean difference {difference:.3f}, std {rows[0].std():.2f}")
    assert difference < 0.15


@pytest.mark.parametrize("name", ["all_kinds", "ledger_like"])
def test_fp8_rows_move_the_logits_but_not_far(name: str, model: Models) -> None:
    source = model(name)
    tokens = source.tokens(300)
    rows = []
    for kv in ("fp32", "fp8"):
        engine = load_engine(source.folder, kv_cache_dtype=kv)
        sequence = engine.open(300)
        engine.forward([Segment(sequence, tokens)])
        rows.append(row(engine, sequence))
    difference = (rows[0] - rows[1]).abs().mean().item()
    print(f"mean difference {difference:.3f}, std {rows[0].std():.2f}")
    assert 1e-4 < difference < 0.6
