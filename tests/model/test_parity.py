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

# Random models and lengths up to 700: test_drawn_parity.py.
LENGTHS = dict.fromkeys(oracle.MODELS, (130, 513)) | dict.fromkeys(
    ("all_kinds", "pro_like", "ledger_like"), (1, 1500)
)
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

    for length in LENGTHS[name]:
        tokens = source.tokens(length)
        wanted = source.logits(tokens)
        whole = engine.open(length)
        cut = max(length - 20, length // 2)
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
