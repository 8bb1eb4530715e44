"""Traps of deepseek-v4.md section 7 that parity on random weights could miss, by number.

T1-T9, T13, T14, T16 and T24 are held by test_parity.py: any of them moves the logits by far more
than its tolerance. T10, T21, T22 are in test_weights.py and test_config.py; T28 in tests/kernels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.reference import moe, rope
from model.engine import Segment
from model.load import load_engine
from model.torch_engine import TorchEngine
from tests.model import oracle
from tests.model.engine_contract import absorb, logits_of, snapshot

Models = Callable[[str], oracle.OracleModel]


@pytest.fixture
def engine(model: Models) -> TorchEngine:
    return load_engine(model("all_kinds").folder)


def test_t3_yarn_has_no_mscale() -> None:
    scaling = {"factor": 16.0, "original": 65536.0, "beta_fast": 32.0, "beta_slow": 1.0}
    cos, sin = rope.cos_sin(
        torch.arange(0, 1_000_000, 9973), rope.frequencies(64, 160000.0, scaling)
    )
    assert torch.allclose(cos * cos + sin * sin, torch.ones_like(cos), atol=1e-5)


def test_t2_yarn_keeps_pairs_to_15_and_divides_pairs_from_25() -> None:
    scaling = {"factor": 16.0, "original": 65536.0, "beta_fast": 32.0, "beta_slow": 1.0}
    plain = rope.frequencies(64, 160000.0, None)
    ratio = plain / rope.frequencies(64, 160000.0, scaling)
    assert torch.allclose(ratio[:16], torch.ones(16))
    assert torch.allclose(ratio[25:], torch.full((7,), 16.0))


def test_t9_router_scores_survive_both_ends_of_softplus() -> None:
    scores = moe.route_scores(torch.tensor([[-80.0, -20.0, 0.0, 90.0]]))
    assert torch.isfinite(scores).all()
    assert (scores > 0).all()
    dead = moe.route_weights(torch.zeros(1, 4), torch.tensor([[0, 1]]), scale=1.5)
    assert torch.isfinite(dead).all()


def test_t11_overlap_with_the_previous_window_comes_from_state(engine: TorchEngine) -> None:
    tokens = list(range(40))
    whole = snapshot(engine, absorb(engine, tokens, chunk=40))
    assert snapshot(engine, absorb(engine, tokens, chunk=4)) == whole


def test_t12_a_short_prompt_after_a_long_one_inherits_nothing(engine: TorchEngine) -> None:
    fresh = snapshot(engine, absorb(engine, [3, 1], chunk=2))
    long = absorb(engine, list(range(100)), chunk=100)
    engine.release(long)
    assert snapshot(engine, absorb(engine, [3, 1], chunk=2)) == fresh


@pytest.mark.parametrize("name", ["all_kinds", "heavy_last", "ledger_like"])
def test_t14_no_token_sees_the_future(name: str, model: Models) -> None:
    engine = load_engine(model(name).folder)
    tokens = model(name).tokens(300)
    other = tokens[:200] + [(t + 1) % 100 for t in tokens[200:]]
    states = []
    for line in (tokens, other):
        sequence = engine.open(300)
        states.append(engine.forward([Segment(sequence, line, tuple(range(180, 201)))])[0].states)
    assert states[0] == states[1]


def test_t14_a_block_is_visible_to_the_query_that_completes_it(model: Models) -> None:
    """The only selected entry of position 3 is block 0, and evidence names its tokens."""
    engine = load_engine(model("all_kinds").folder)
    seen = []
    for length in (3, 4):
        sequence = absorb(engine, [5, 6, 7, 8][:length], chunk=length)
        seen.append([(e.start, e.end) for e in engine.evidence(sequence)])
    assert seen == [[], [(0, 4)]]


def test_t15_dead_index_heads_tie_and_the_lowest_entries_win(model: Models, tmp_path: Path) -> None:
    """With all index weights zero every score ties at 0: entries 0..topk-1, on every path."""
    folder = Path(shutil.copytree(model("ledger_like").folder, tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["layers.3.attn.indexer.weights_proj.weight"].zero_()
    save_file(tensors, folder / "model.safetensors")
    engine = load_engine(folder)
    tokens = model("ledger_like").tokens(400)
    sequence = absorb(engine, tokens, chunk=400)
    starts = {e.start for e in engine.evidence(sequence)}
    assert starts <= {4 * entry for entry in range(16)}
    assert snapshot(engine, absorb(engine, tokens, chunk=37)) == snapshot(engine, sequence)


@pytest.mark.parametrize("missing", ["window", "carry", "index_carry"])
def test_t17_window_and_carries_are_part_of_the_state(missing: str, engine: TorchEngine) -> None:
    tokens = [t % 128 for t in range(7, 330)]
    sequence = engine.open(323)
    state = engine.forward([Segment(sequence, tokens, (301,))])[0].states[301]
    spoiled = bytearray(state)
    for section in engine.info.layout.state_sections(301):
        if section.component.name.endswith("." + missing):
            spoiled[section.offset : section.offset + section.size_bytes] = bytes(
                section.size_bytes
            )
    restored = engine.open(323)
    engine.load_block(restored, 0, engine.export_block(sequence, 0))
    engine.load_state(restored, 301, spoiled)
    engine.forward([Segment(restored, tokens[301:])])
    assert engine.export_state(restored) != engine.export_state(sequence)


def test_t18_the_state_after_k_drafts_is_the_serial_state(engine: TorchEngine) -> None:
    tokens = list(range(60))
    drafts = (46, 47, 48, 49, 50)
    sequence = absorb(engine, tokens[:45], chunk=45, capacity=60)
    states = engine.forward([Segment(sequence, tokens[45:50], drafts)])[0].states
    for position in drafts:
        serial = absorb(engine, tokens[:position], chunk=1)
        assert engine.export_state(serial) == states[position]


def test_t4_clamp_and_scale_come_from_the_config(model: Models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model("heavy_last").folder, tmp_path / "model"))
    tokens = model("heavy_last").tokens(20)
    seen = []
    for change in ({}, {"swiglu_limit": 10.0}, {"routed_scaling_factor": 2.0}):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        engine = load_engine(folder)
        seen.append(logits_of(engine, absorb(engine, tokens, chunk=20)))
    assert len(set(seen)) == 3
