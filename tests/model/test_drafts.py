"""MTP and DSpark against transformers' modules, and what of a checkpoint makes an engine draft."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.tiny_checkpoint import write_checkpoint
from model.config import ModelConfig
from model.drafts import drafter
from model.drafts.plan import plan_drafts
from model.engine import DraftRequest, Segment
from model.layout import KvFormat, cache_layout
from model.load import load_engine
from model.torch_engine import TorchEngine
from penstock.errors import ModelLoadError
from penstock.request import Sampling
from tests.model import drafted, oracle
from tests.model.draft_oracle import DraftOracle
from tests.model.engine_contract import logits_of, snapshot

Models = Callable[[str], oracle.OracleModel]
TOLERANCE = 1e-4
# Shorter and longer than the window of 8, and in two chunks.
POSITIONS = (1, 2, 5, 8, 9, 30, 77)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[npt.NDArray[np.float32]]:
    """The logits that drafts are drawn from, in order."""
    seen: list[npt.NDArray[np.float32]] = []

    def record(row: npt.NDArray[np.float32], *args: object, **kwargs: object) -> int:
        seen.append(np.array(row))
        return real(row, *args, **kwargs)  # type: ignore[arg-type]

    real = drafter.sample
    monkeypatch.setattr(drafter, "sample", record)
    return seen


def folder_of(model: Models, kind: str, name: str = "all_kinds") -> Path:
    source = model(name)
    return drafted.folder_of(source.folder.parent, source, kind)


def opened(folder: Path, tokens: int) -> TorchEngine:
    return load_engine(folder, kv_cache_dtype="fp32", dtype="float32", draft_tokens=tokens)


@pytest.mark.parametrize("kind", ["mtp", "dspark"])
def test_draft_logits_are_the_oracles(
    kind: str, model: Models, rows: list[npt.NDArray[np.float32]]
) -> None:
    folder, count = folder_of(model, kind), 4
    engine, truth = opened(folder, count), DraftOracle(model("all_kinds"), folder)
    worst = 0.0
    for position in POSITIONS:
        tokens = model("all_kinds").tokens(position + 1, seed=position)
        sequence = engine.open(200)
        for part in (tokens[: position // 2], tokens[position // 2 : position]):
            engine.forward([Segment(sequence, part)])
        rows.clear()
        asked = DraftRequest(sequence, tokens[position], count, Sampling(seed=position))
        drafts = engine.draft([asked])[0]
        assert len(drafts) == count
        if kind == "mtp":
            want = truth.mtp(tokens, drafts)
        else:
            want, _ = truth.dspark(tokens, drafts)
        difference = float((want - torch.from_numpy(np.stack(rows))).abs().max())
        assert want.std() > 0.3, "logits this flat show nothing"
        worst = max(worst, difference)
        assert difference <= TOLERANCE, (position, difference)
    print(f"{kind}: {len(POSITIONS)} contexts, {count} drafts: largest difference {worst:.1e}")


def test_the_confidence_head_cuts_a_draft(model: Models) -> None:
    folder = folder_of(model, "dspark")
    whole, truth = opened(folder, 5), DraftOracle(model("all_kinds"), folder)
    tokens = model("all_kinds").tokens(40)
    lengths = set()
    for threshold in (0.45, 0.6):
        cut = load_engine(
            folder,
            kv_cache_dtype="fp32",
            dtype="float32",
            draft_tokens="auto",
            draft_confidence=threshold,
        )
        for position in range(20, 30):
            drafts = []
            for engine in (whole, cut):
                sequence = engine.open(50)
                engine.forward([Segment(sequence, tokens[:position])])
                asked = DraftRequest(sequence, tokens[position], 5, Sampling(temperature=0))
                drafts += engine.draft([asked])
                engine.release(sequence)
            _, sure = truth.dspark(tokens[: position + 1], drafts[0])
            below = [i for i, s in enumerate(sure.tolist()) if s < threshold]
            want = below[0] if below else 5
            assert drafts[1] == drafts[0][:want]
            lengths.add(want)
    assert len(lengths) > 2, "the threshold never cut in the middle"


def test_T21_dspark_is_told_by_its_own_keys(model: Models) -> None:
    for kind, tokens in (("mtp", 1), ("dspark", 5)):
        config = ModelConfig.load(folder_of(model, kind))
        plan = plan_drafts(config, "auto")
        assert plan is not None
        assert (plan.kind.value, plan.tokens) == (kind, tokens)
        engine = load_engine(folder_of(model, kind), draft_tokens="auto")
        assert engine.info.draft_tokens == tokens
        assert plan_drafts(config, 0) is None


def test_drafts_that_a_checkpoint_cannot_give_are_refused_in_one_sentence(model: Models) -> None:
    with pytest.raises(ModelLoadError, match="num_nextn_predict_layers"):
        load_engine(model("all_kinds").folder, draft_tokens=2)
    with pytest.raises(ModelLoadError, match="dspark_block_size is 5"):
        load_engine(folder_of(model, "dspark"), draft_tokens=6)
    assert load_engine(model("all_kinds").folder, draft_tokens="auto").info.draft_tokens == 0


def test_drafts_add_their_windows_to_the_state_and_nothing_to_a_block(model: Models) -> None:
    for kind, stages in (("mtp", 1), ("dspark", 3)):
        config = ModelConfig.load(folder_of(model, kind))
        plain = cache_layout(config, KvFormat.FP8)
        ours = cache_layout(config, KvFormat.FP8, plan_drafts(config, "auto"))
        assert ours.block_bytes == plain.block_bytes
        names = {c.name for c in ours.components} - {c.name for c in plain.components}
        want = {f"layers.{config.layers + i}.window" for i in range(stages)}
        assert names == want | ({"last.streams"} if kind == "mtp" else set())


def test_workers_with_and_without_drafts_share_no_blocks(model: Models) -> None:
    folder = folder_of(model, "mtp")
    prints = [load_engine(folder, draft_tokens=n).info.fingerprint for n in (0, 1, 3)]
    assert prints[0] != prints[1] == prints[2]


@pytest.mark.parametrize("kind", ["mtp", "dspark"])
def test_a_draft_module_changes_no_answer_of_the_backbone(kind: str, model: Models) -> None:
    tokens = model("all_kinds").tokens(300)
    found = []
    for count in (0, 4):
        engine = load_engine(folder_of(model, kind), draft_tokens=count)
        sequence = engine.open(300)
        engine.forward([Segment(sequence, tokens)])
        found.append((bytes(engine.logits([sequence]).row(0)), engine.export_block(sequence, 0)))
    assert found[0] == found[1]


PATTERNS = st.lists(
    st.tuples(st.integers(1, 7), st.lists(st.integers(0, 127), max_size=8)), min_size=1, max_size=6
)


@pytest.fixture(scope="module")
def engines(model: Models) -> dict[str, TorchEngine]:
    """Without drafts the backbone's own rollback; released formats with and without."""
    root = model("all_kinds").folder.parent
    found = {"plain": load_engine(model("all_kinds").folder)}
    for kind in drafted.KINDS:
        found[kind] = load_engine(folder_of(model, kind), draft_tokens=3)
        folder = write_checkpoint(root / f"released-{kind}", draft=kind)
        found[f"released {kind}"] = load_engine(folder, draft_tokens="auto")
    return found


@pytest.mark.parametrize("name", ["plain", "mtp", "dspark", "released mtp", "released dspark"])
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(start=st.integers(0, 140), pattern=PATTERNS, data=st.data())
def test_T18_after_every_accept_pattern_the_bytes_are_those_of_the_serial_run(
    name: str,
    engines: dict[str, TorchEngine],
    start: int,
    pattern: list[tuple[int, list[int]]],
    data: st.DataObject,
) -> None:
    """Some tokens stand, some are rejected, again and again; then plain steps go on."""
    engine = engines[name]
    # Near a block's border as well as near the beginning.
    start += 110 * (start > 70)
    kept: list[int] = [(7 * i * i + i) % 128 for i in range(start)]
    sequence = engine.open(400)
    engine.forward([Segment(sequence, kept)])
    for count, rejected in pattern:
        stands = data.draw(st.lists(st.integers(0, 127), min_size=count, max_size=count))
        result = engine.forward(
            [Segment(sequence, [*stands, *rejected], all_logits=True, seekable=True)]
        )[0]
        kept += stands
        engine.seek(sequence, len(kept))
        assert result.logits is not None
        assert bytes(result.logits.row(count - 1)) == logits_of(engine, sequence)
    kept += [1, 2, 3]
    engine.forward([Segment(sequence, kept[-3:])])
    serial = engine.open(400)
    engine.forward([Segment(serial, kept)])
    assert snapshot(engine, sequence) == snapshot(engine, serial)
    assert engine.evidence(sequence) == engine.evidence(serial)
    most = engine.info.draft_tokens
    if most:
        asked = [DraftRequest(s, 5, most, Sampling(seed=2)) for s in (sequence, serial)]
        one, other = engine.draft(asked)
        assert one == other
    for done in (sequence, serial):
        engine.release(done)


def test_a_plan_keeps_the_asked_number(model: Models) -> None:
    config = ModelConfig.load(folder_of(model, "dspark"))
    plan = plan_drafts(config, 3, confidence=0.5)
    assert plan is not None
    assert (plan.tokens, plan.confidence, plan.stages) == (3, 0.5, 3)
    assert plan_drafts(replace(config, draft=None), "auto") is None
