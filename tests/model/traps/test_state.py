"""Traps of state, routing, config and batches (deepseek-v4.md section 7), by number."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.reference import moe, rope
from model.cache import cache_bytes
from model.config import ModelConfig
from model.engine import Segment
from model.layout import KvFormat, cache_layout
from model.load import load_engine
from model.torch_engine import TorchEngine
from penstock.errors import ModelLoadError
from tests.model import oracle
from tests.model.engine_contract import absorb, logits_of, snapshot
from tests.model.traps import mistakes

Models = Callable[[str], oracle.OracleModel]


@pytest.fixture
def engine(model: Models) -> TorchEngine:
    return load_engine(model("all_kinds").folder)


def all_rows(engine: TorchEngine, tokens: list[int]) -> torch.Tensor:
    """[L, V]: logits after every token, from one pass."""
    found = engine.forward([Segment(engine.open(len(tokens)), tokens, all_logits=True)])[0].logits
    assert found is not None
    rows = [found.row(i) for i in range(len(found))]
    return torch.stack([torch.frombuffer(bytearray(row), dtype=torch.float32) for row in rows])


def test_t03_yarn_has_no_mscale() -> None:
    scaling = {"factor": 16.0, "original": 65536.0, "beta_fast": 32.0, "beta_slow": 1.0}
    cos, sin = rope.cos_sin(
        torch.arange(0, 1_000_000, 9973), rope.frequencies(64, 160000.0, scaling)
    )
    assert torch.allclose(cos * cos + sin * sin, torch.ones_like(cos), atol=1e-5)


def test_t02_yarn_keeps_pairs_to_15_and_divides_pairs_from_25() -> None:
    scaling = {"factor": 16.0, "original": 65536.0, "beta_fast": 32.0, "beta_slow": 1.0}
    plain = rope.frequencies(64, 160000.0, None)
    ratio = plain / rope.frequencies(64, 160000.0, scaling)
    assert torch.allclose(ratio[:16], torch.ones(16))
    assert torch.allclose(ratio[25:], torch.full((7,), 16.0))


def test_t09_router_scores_survive_both_ends_of_softplus() -> None:
    scores = moe.route_scores(torch.tensor([[-80.0, -20.0, 0.0, 90.0]]))
    assert torch.isfinite(scores).all()
    assert (scores > 0).all()
    dead = moe.route_weights(torch.zeros(1, 4), torch.tensor([[0, 1]]), scale=1.5)
    assert torch.isfinite(dead).all()


def test_t11_overlap_with_the_previous_window_comes_from_state(engine: TorchEngine) -> None:
    tokens = list(range(40))
    whole = snapshot(engine, absorb(engine, tokens, chunk=40))
    assert snapshot(engine, absorb(engine, tokens, chunk=4)) == whole


@pytest.mark.parametrize("length", [1, 3, 4, 9])
def test_t12_a_short_prompt_after_a_long_one_inherits_nothing(
    length: int, engine: TorchEngine
) -> None:
    fresh = snapshot(engine, absorb(engine, list(range(length)), chunk=length, capacity=100))
    long = absorb(engine, list(range(100)), chunk=100)
    engine.release(long)
    again = absorb(engine, list(range(length)), chunk=length, capacity=100)
    assert snapshot(engine, again) == fresh


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
        serial = absorb(engine, tokens[:41], chunk=41, capacity=60)
        for token in tokens[41:position]:
            engine.forward([Segment(serial, [token])])
        assert engine.export_state(serial) == states[position]


def test_t04_clamp_and_scale_come_from_the_config(model: Models, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(model("heavy_last").folder, tmp_path / "model"))
    tokens = model("heavy_last").tokens(20)
    given = json.loads((folder / "config.json").read_text())
    seen = []
    for change in (
        {},
        {"swiglu_limit": 10.0},
        {"routed_scaling_factor": 2.0},
        {"compress_rope_theta": 40000.0},
        {"rope_scaling": None},
    ):
        (folder / "config.json").write_text(json.dumps({**given, **change}))
        engine = load_engine(folder)
        seen.append(logits_of(engine, absorb(engine, tokens, chunk=20)))
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize(
    "key", ["compress_rope_theta", "rope_theta", "swiglu_limit", "routed_scaling_factor", "hc_eps"]
)
def test_t04_a_missing_key_has_no_default(key: str) -> None:
    config = oracle.official_config({"ratios": [0, 4, 8]})
    del config[key]
    with pytest.raises(ModelLoadError, match=f"config.json lacks {key}"):
        ModelConfig.parse(config)


@pytest.mark.parametrize("hash_layers", [0, 1])
def test_t09_extreme_router_logits_keep_their_weights(hash_layers: int, tmp_path: Path) -> None:
    """Router logits of hundreds, both signs: naive log(1 + exp) overflows or is 0, and a hash
    layer's chosen scores are tiny or all 0 for some tokens. One layer, so that every row is its
    own.
    """
    source = oracle.build_changed({"ratios": [0], "num_hash_layers": hash_layers}, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    gate, seen = source.reference.model.layers[0].mlp.gate, []
    with torch.no_grad():
        gate.weight *= 128
        tensors["layers.0.ffn.gate.weight"] *= 128
    save_file(tensors, tmp_path / "model.safetensors")
    gate.register_forward_hook(lambda *args: seen.append(args[2]))
    tokens = source.tokens(200)
    with mistakes.made(mistakes.weights_without_an_epsilon, source.reference):
        wanted = source.logits(tokens)
    with mistakes.made(mistakes.naive_softplus, source.reference):
        naive = source.logits(tokens)
    logits, _, ids = seen[0]
    assert logits.max() > 89
    if hash_layers:
        best = logits.gather(1, ids).amax(1)
        assert (best < -104).any()
        assert ((best > -102) & (best < -93)).any()
    engine = load_engine(tmp_path, kv_cache_dtype="fp32", dtype="float32")
    got = all_rows(engine, tokens)
    assert torch.isfinite(got).all()
    assert (got - wanted).abs().max() <= 1e-4
    assert not torch.isfinite(naive).all() or (got - naive).abs().max() > 0.02


def test_t11_an_oracle_that_loses_the_overlap_is_far_away(model: Models) -> None:
    """Steps of one window each: right beside the whole prompt, and far from a cache that forgets
    the previous window between two steps.
    """
    source = model("all_kinds")
    tokens = source.tokens(60)
    engine = load_engine(source.folder, kv_cache_dtype="fp32", dtype="float32")
    sequence, cache = engine.open(60), None
    for start in range(0, 60, 4):
        step = tokens[start : start + 4]
        engine.forward([Segment(sequence, step)])
        with torch.no_grad():
            out = source.reference(torch.tensor([step]), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        for layer in cache.layers:
            for forgotten in ("overlap_kv", "overlap_gate"):
                if hasattr(layer, forgotten):
                    setattr(layer, forgotten, {"compressor": None, "indexer": None})
    got = torch.frombuffer(bytearray(engine.logits([sequence]).row(0)), dtype=torch.float32)
    assert (got - source.logits(tokens)[-1]).abs().max() <= 1e-4
    assert (got - out.logits[0, -1]).abs().max() > 0.02


def test_t23_one_kv_head_whatever_the_query_heads() -> None:
    """The cache is shared by all heads: ranks that cut heads must each hold all of it."""
    few, many = (
        ModelConfig.parse(oracle.official_config({"ratios": [0, 4, 8], "num_attention_heads": n}))
        for n in (4, 32)
    )
    assert cache_layout(few, KvFormat.FP8) == cache_layout(many, KvFormat.FP8)
    assert cache_bytes(few, 5000) == cache_bytes(many, 5000)


def test_t25_the_cache_formats_really_round(model: Models) -> None:
    """A format whose rounding is the identity gives the logits of fp32."""
    source = model("all_kinds")
    tokens = source.tokens(120)
    rows = {
        kv: all_rows(load_engine(source.folder, kv_cache_dtype=kv), tokens)
        for kv in ("fp8", "bf16", "fp32")
    }
    off = {kv: (rows[kv] - rows["fp32"]).abs().mean().item() for kv in ("fp8", "bf16")}
    print(f"mean difference to fp32 rows: {off}")
    assert 0 < off["bf16"] < off["fp8"] < 0.6
    assert off["fp8"] > 1e-3


def test_t27_rows_of_unequal_length_are_never_padded_into_each_other(model: Models) -> None:
    """Three prompts in one forward are what they are alone; the oracle's left-padded batch is not.

    An attention mask does not help it: its compressors pool the padding.
    """
    source = model("all_kinds")
    engine = load_engine(source.folder, kv_cache_dtype="fp32", dtype="float32")
    prompts = [source.tokens(n, seed=n) for n in (5, 63, 130)]
    sequences = [engine.open(130) for _ in prompts]
    found = engine.forward([Segment(s, p) for s, p in zip(sequences, prompts, strict=True)])
    assert len(found) == 3
    for sequence, prompt in zip(sequences, prompts, strict=True):
        alone = absorb(engine, prompt, chunk=len(prompt))
        assert logits_of(engine, sequence) == logits_of(engine, alone)
    padded = torch.tensor([[0] * (130 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (130 - len(p)) + [1] * len(p) for p in prompts])
    with torch.no_grad():
        theirs = source.reference(padded, attention_mask=mask, use_cache=False).logits[0, -1]
    got = torch.frombuffer(bytearray(logits_of(engine, sequences[0])), dtype=torch.float32)
    assert (got - source.logits(prompts[0])[-1]).abs().max() <= 1e-4
    assert (got - theirs).abs().max() > 0.02
