"""The device engine on a CPU: against the CPU engine and transformers, through each other's blocks
and states, in Triton's interpreter, and what it refuses.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import penstock
from examples.tiny_checkpoint import write_checkpoint
from model.device.check import check_model, device_ops
from model.device.engine import DeviceEngine
from model.device.weights import decode_tiles, encode_tiles
from model.engine import Engine, Segment, Sequence
from model.grid import Grid
from model.load import load_device_engine, load_engine
from model.open import open_engine
from penstock.blocks import BLOCK_TOKENS
from penstock.errors import ModelLoadError
from penstock.worker import ModelSpec
from tests.kernels.triton import shim
from tests.model import oracle
from tests.model.engine_contract import absorb, snapshot
from training.batches import question_block

Models = Callable[[str], oracle.OracleModel]
LEDGER = Path(penstock.__file__).parent / "shipped" / "ledger"
LENGTH = 300


def on_cpu(folder: Path, **kwargs: Any) -> DeviceEngine:
    return load_device_engine(folder, device="cpu", **{"backend": "reference", **kwargs})


def every_row(engine: Engine, tokens: list[int]) -> tuple[Sequence, torch.Tensor]:
    sequence = engine.open(len(tokens) + 40)
    found = engine.forward([Segment(sequence, tokens, all_logits=True)])[0].logits
    assert found is not None
    rows = [
        torch.frombuffer(bytearray(found.row(i)), dtype=torch.float32) for i in range(len(found))
    ]
    return sequence, torch.stack(rows)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().mean().item()


@pytest.fixture
def sure(tmp_path: Path) -> Callable[[str], oracle.OracleModel]:
    """Models in which no choice can flip: hash routing, and a top-k that covers every block."""

    def build(name: str) -> oracle.OracleModel:
        changes = dict(oracle.MODELS[name])
        changes |= {"index_topk": 512, "num_hash_layers": len(changes["ratios"])}
        return oracle.build_changed(changes, tmp_path / name)

    return build


# Mean difference of logits (their deviation is about 1.2) from the CPU engine in fp32: only pooled
# entries, which the device rounds to bfloat16 as the release does, may take a neighbouring e4m3.
CASES = [("window_only", 1e-4), ("wide_window", 4e-3), ("all_kinds", 0.02), ("pro_like", 0.05)]


@pytest.mark.parametrize(("name", "limit"), CASES)
def test_it_computes_what_the_cpu_engine_and_transformers_compute(
    name: str, limit: float, sure: Models
) -> None:
    source = sure(name)
    tokens = source.tokens(LENGTH)
    exact = source.logits(tokens)
    for dtype, bound in (("float32", limit), ("bfloat16", 0.05)):
        theirs = every_row(load_engine(source.folder, dtype=dtype), tokens)[1]
        ours = every_row(on_cpu(source.folder, dtype=dtype), tokens)[1]
        errors = error(ours, theirs), error(ours, exact), error(theirs, exact)
        print(f"{name} {dtype}: from the CPU engine {errors[0]:.4f}, both from the oracle", errors)
        assert errors[0] < bound
        assert errors[1] < 1.1 * errors[2]


@pytest.mark.parametrize("base", [False, True], ids=["fp4 experts", "fp8 experts"])
def test_released_formats_stay_in_their_format(base: bool, tmp_path: Path) -> None:
    changes = {"index_topk": 512, "num_hash_layers": 5}
    folder = write_checkpoint(tmp_path / "tiny", base=base, changes=changes)
    tokens = [(37 * i + 11 * i * i) % 320 for i in range(150)]
    engine = on_cpu(folder)
    assert f"experts {'e4m3' if base else 'mxfp4'}" in engine.info.description
    ours = every_row(engine, tokens)[1]
    theirs = every_row(load_engine(folder), tokens)[1]
    noise = error(theirs, every_row(load_engine(folder, dtype="float32"), tokens)[1])
    print(f"from the CPU engine {error(ours, theirs):.3f}; its own bfloat16 error {noise:.3f}")
    assert error(ours, theirs) < noise


def test_fp8_tiles_are_encoded_again_without_loss() -> None:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 256, (200, 300), generator=generator).to(torch.uint8)
    codes[(codes & 127) == 127] = 0
    codes[:128, :128] &= 0x8F  # a tile of small codes, some subnormal: its scale will be another
    scales = torch.randint(100, 130, (2, 3), generator=generator).to(torch.uint8)
    values = decode_tiles(codes.view(torch.float8_e4m3fn), scales)
    again = encode_tiles(values)
    assert torch.equal(decode_tiles(*again), values)
    assert not torch.equal(again[1], scales)


def test_blocks_and_states_pass_between_the_engines(sure: Models) -> None:
    """Prefill here, decode there, and the other way round; in class `fast` they share a
    fingerprint, in `exact` they do not.
    """
    source = sure("all_kinds")
    tokens = source.tokens(LENGTH)
    kinds: list[Callable[..., Engine]] = [
        lambda **kw: load_engine(source.folder, dtype="bfloat16", **kw),
        lambda **kw: on_cpu(source.folder, **kw),
    ]
    for numerics, same in (("fast", True), ("exact", False)):
        prints = {make(numerics=numerics).info.fingerprint for make in kinds}
        assert (len(prints) == 1) == same
    engines = [make() for make in kinds]
    assert engines[0].info.layout.to_json() == engines[1].info.layout.to_json()
    whole = [every_row(engine, tokens) for engine in engines]
    cut = 270
    for here, there in ((0, 1), (1, 0)):
        prefill, decode = engines[here], engines[there]
        part = absorb(prefill, tokens[:cut], chunk=cut)
        moved = decode.open(LENGTH)
        for index in range(cut // BLOCK_TOKENS):
            decode.load_block(moved, index, prefill.export_block(part, index))
        state = prefill.export_state(part)
        decode.load_state(moved, cut, state)
        assert decode.evidence(moved) == prefill.evidence(part)
        again = decode.export_state(moved)
        assert len(again) == len(state)
        for token in tokens[cut:]:
            decode.forward([Segment(moved, [token])])
        last = torch.frombuffer(bytearray(decode.logits([moved]).row(0)), dtype=torch.float32)
        gap = error(last, whole[there][1][-1])
        print(f"engine {here} -> {there}: mean difference from a prompt of its own {gap:.4f}")
        assert gap < 0.05


def test_class_fast_takes_other_kernels_and_stays_close(sure: Models) -> None:
    """A prompt long enough for the dense form of heavy layers, then steps over the pages."""
    source = sure("wide_window")
    tokens = source.tokens(LENGTH)
    found = []
    for numerics in ("exact", "fast"):
        engine = on_cpu(source.folder, numerics=numerics)
        sequence = absorb(engine, tokens[: LENGTH - 3], chunk=100, capacity=LENGTH)
        for token in tokens[LENGTH - 3 :]:
            engine.forward([Segment(sequence, [token])])
        row = bytearray(engine.logits([sequence]).row(0))
        found.append(torch.frombuffer(row, dtype=torch.float32))
    print(f"fast from exact: {error(*found):.4f}")
    assert 0 < error(*found) < 0.05


@pytest.mark.skipif(not (LEDGER / "model.safetensors").exists(), reason="no shipped ledger")
def test_ledger_answers_from_another_engine_s_prefill() -> None:
    """Prefill on one device engine, decode on another through blocks and a state; the evidence
    covers the fact.
    """
    from tokenizers import Tokenizer

    from training import documents

    tok = Tokenizer.from_file(str(LEDGER / "tokenizer.json"))
    document = documents.make_document(
        4, tokens_at_least=1500, facts=12, count=lambda text: len(tok.encode(text).ids)
    )
    question = documents.make_questions(document, 4, 1, 0)[0]
    block, at = question_block(random.Random(0), [(question.name, question.answer)], full=1.0)
    encoded = tok.encode(document.text + block)
    first = encoded.char_to_token(len(document.text) + at[0])
    gold = encoded.char_to_token(document.digits_at[question.name])
    assert first is not None and gold is not None
    prefill, decode = on_cpu(LEDGER), on_cpu(LEDGER)
    part = absorb(prefill, encoded.ids[:first], chunk=512)
    moved = decode.open(first + 20)
    for index in range(first // BLOCK_TOKENS):
        decode.load_block(moved, index, prefill.export_block(part, index))
    decode.load_state(moved, first, prefill.export_state(part))
    heaviest = decode.evidence(moved)[0]
    ids: list[int] = []
    while len(ids) < len(question.answer):
        row = torch.frombuffer(bytearray(decode.logits([moved]).row(0)), dtype=torch.float32)
        ids.append(int(row.argmax()))
        decode.forward([Segment(moved, ids[-1:])])
    said = tok.decode(ids)
    print(f"{first} tokens: {question.text} -> {said}; evidence {heaviest}, fact at {gold}")
    assert said == question.answer
    assert heaviest.start <= gold < heaviest.end


def test_a_payload_that_went_through_the_device_is_the_same_bytes(model: Models) -> None:
    engine = on_cpu(model("ledger_like").folder)
    tokens = model("ledger_like").tokens(700)
    sequence = absorb(engine, tokens, chunk=700)
    before = snapshot(engine, sequence)
    moved = engine.open(700)
    for index in range(2):
        engine.load_block(moved, index, before[index])
    engine.load_state(moved, 700, before[2])
    assert snapshot(engine, moved) == before


def test_memory_is_used_again_and_what_lay_there_does_not_shine_through(model: Models) -> None:
    engine = on_cpu(model("all_kinds").folder)
    tokens = model("all_kinds").tokens(400)
    first = snapshot(engine, absorb(engine, tokens, chunk=400))
    for sequence in [absorb(engine, tokens[::-1], chunk=130) for _ in range(3)]:
        engine.release(sequence)
    assert snapshot(engine, absorb(engine, tokens, chunk=399)) == first


@pytest.mark.slow
def test_the_kernels_give_the_same_bits_on_every_path(tmp_path: Path) -> None:
    """Class `exact` with Triton's kernels, interpreted: whole, in chunks beside another sequence,
    restored, token by token. `index_topk` 2: the indexer scores from the twelfth token on.
    """
    shim.install()
    changes = {
        "ratios": [4, 8],
        "head_dim": 64,
        "qk_rope_head_dim": 16,
        "index_head_dim": 64,
        "index_topk": 2,
        "num_attention_heads": 2,
        "hc_sinkhorn_iters": 2,
        "n_routed_experts": 4,
    }
    source = oracle.build_changed(changes, tmp_path)
    engine = on_cpu(source.folder, backend="triton")
    assert "triton-1" in engine.info.description
    tokens = source.tokens(20)
    sequence = engine.open(20)
    engine.forward([Segment(sequence, tokens[:17])])
    cut = engine.export_state(sequence)
    for token in tokens[17:]:
        engine.forward([Segment(sequence, [token])])
    stepped = snapshot(engine, sequence)
    other, restored = engine.open(20), engine.open(20)
    engine.load_state(restored, 17, cut)
    engine.forward([Segment(other, tokens[:9]), Segment(restored, tokens[17:])])
    assert snapshot(engine, restored) == stepped
    plain = on_cpu(source.folder)
    wanted = snapshot(plain, absorb(plain, tokens, chunk=20))
    rows = [torch.frombuffer(bytearray(s[-1]), dtype=torch.float32) for s in (stepped, wanted)]
    print(f"kernels from the reference: {error(*rows):.4f}; deviation {rows[1].std():.2f}")
    assert error(*rows) < 0.15 * rows[1].std()


def test_a_device_that_is_not_there_is_one_sentence(model: Models) -> None:
    folder = str(model("all_kinds").folder)
    with pytest.raises(ModelLoadError, match="CUDA") as caught:
        open_engine(ModelSpec(model=folder, device="cuda"))
    assert "--device cpu" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ModelLoadError, match="must be auto, cpu or cuda"):
        open_engine(ModelSpec(model=folder, device="toaster"))
    auto = open_engine(ModelSpec(model=folder, device="auto"))
    assert ("cpu" in auto.info.description) == (not torch.cuda.is_available())


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"kv_cache_dtype": "bf16"}, "--kv-cache-dtype fp8"),
        ({"rounding": "none"}, "rounding with index"),
        ({"draft_tokens": 2}, "--num-speculative-tokens 0"),
        ({"grid": Grid(tp=2)}, "one rank"),
        ({"backend": "triton", "dtype": "float32"}, "compute in bfloat16"),
        ({"backend": "native"}, "native"),
    ],
)
def test_what_it_does_not_serve_is_refused(
    choice: dict[str, Any], words: str, model: Models
) -> None:
    with pytest.raises(ModelLoadError, match=words):
        on_cpu(model("all_kinds").folder, **choice)


def test_shapes_that_kernels_do_not_take_are_refused(model: Models) -> None:
    with pytest.raises(ModelLoadError, match="head_dim, not 96"):
        on_cpu(model("pro_like").folder, backend="triton")
    assert check_model.__doc__ and device_ops(torch.device("cpu"), exact=False).name
