"""Muon, the losses' bookkeeping, and a smoke train that must find the evidence."""

from __future__ import annotations

import pathlib
import random

import pytest

torch = pytest.importorskip("torch")

from training import batches, checkpoint, documents, export, loop, losses, vocabulary  # noqa: E402
from training.config import NetworkConfig, Shape, Stage, TrainingConfig  # noqa: E402
from training.muon import orthogonalize  # noqa: E402
from training.network import Network  # noqa: E402
from training.rounding import round_fp4, round_fp8  # noqa: E402

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 32, 128), (1, 96, 24)])
def test_muon_makes_the_update_orthogonal(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = orthogonalize(torch.randn(shape, generator=generator))
    gram = x @ x.mT if shape[1] <= shape[2] else x.mT @ x
    worst = (gram - torch.eye(gram.shape[-1])).abs().max()
    assert worst < 0.02


def test_gold_entries_hold_the_digit_that_must_be_written() -> None:
    tok = vocabulary.tokenizer()
    shape = Shape(tokens=320, rows=3, facts=6, questions=6)
    task = batches.draw(random.Random(4), tok, shape, full=0.5, unanswerable=0.3, gapless=False)
    tokens = task.batch.tokens_BS.flatten()
    assert (tokens[task.batch.rows_R + 1] == task.targets_R).all()
    entries = shape.tokens // 4
    checked = 0
    for target, (block, following) in zip(task.targets_R, task.gold_R2.tolist(), strict=True):
        if block < 0:
            continue
        row, j = divmod(block, entries)
        assert following == block + 1
        own_window = task.batch.tokens_BS[row, 4 * j : 4 * j + 4]
        assert target in own_window
        checked += 1
    assert checked >= 12
    assert (task.batch.positions_BS[torch.arange(3), task.batch.document_end_B - 1] == 0).all()


def test_no_name_of_a_training_batch_is_held_out() -> None:
    tok = vocabulary.tokenizer()
    shape = Shape(tokens=320, rows=4, facts=6, questions=6)
    task = batches.draw(random.Random(9), tok, shape, full=1.0, unanswerable=0.4, gapless=True)
    for row in task.batch.tokens_BS:
        text = tok.decode(row.tolist())
        for part in text.split("what is the code of ")[1:]:
            assert not documents.held_out(part.split("?")[0])


def test_rounding_follows_the_report() -> None:
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(1)) * 3
    rounded = round_fp8(x, 32)
    assert (rounded[:, -32:] == x[:, -32:].bfloat16().float()).all()
    assert ((rounded - x).abs() <= x.abs() / 16 + 0.02).all()
    rotated = round_fp4(x[:, :64])
    assert rotated.unflatten(-1, (2, 32)).abs().unique().numel() < 200


def test_export_and_load_give_the_same_network(tmp_path: pathlib.Path) -> None:
    network = Network(NetworkConfig())
    export.export(network, tmp_path)
    again = export.load(tmp_path)
    for name, value in again.state_dict().items():
        want = network.state_dict()[name].float()
        assert (value.float() - want).abs().max() <= want.abs().max() / 128
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size <= 8_000_000


def test_the_shipped_schedule_parses() -> None:
    cfg = TrainingConfig.read(ROOT / "training" / "configs" / "ledger.yaml")
    assert cfg.stages[0].dense_steps > 0


def test_a_short_training_finds_the_evidence(tmp_path: pathlib.Path) -> None:
    """Gold attention mass at least doubles; exact match comes only later, so it is no gate."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    stage = Stage(
        name="smoke",
        shapes=(Shape(tokens=144, rows=8, facts=3, questions=4),),
        steps=45,
        lr_muon=(0.02, 0.02),
        lr_adamw=(5e-3, 5e-3),
        warmup_steps=5,
        dense_steps=45,
        full_question=0.0,
    )
    small = NetworkConfig(hidden_size=64, q_lora_rank=64, o_lora_rank=64, moe_intermediate_size=32)
    cfg = TrainingConfig(stages=(stage,), log_every=15, sinkhorn_iters=4, network=small)
    curve = loop.train(
        cfg, Network(cfg.network), vocabulary.tokenizer(), tmp_path, say=lambda line: None
    )
    masses = [line["gold_mass"] for line in curve]
    print("gold mass per 15 steps:", masses)
    assert masses[-1] > 2 * masses[0] and masses[-1] > 0.06
    assert checkpoint.path_of(tmp_path, stage.steps).exists()


def test_a_batch_without_a_single_answer_still_has_a_loss() -> None:
    torch.manual_seed(3)
    small = NetworkConfig(hidden_size=32, q_lora_rank=32, o_lora_rank=32, moe_intermediate_size=32)
    network = Network(small)
    shape = Shape(tokens=144, rows=1, facts=2, questions=3)
    task = batches.draw(
        random.Random(1), vocabulary.tokenizer(), shape, full=0.0, unanswerable=1.0, gapless=True
    )
    assert (task.gold_R2 < 0).all()
    logits, evidence = network(task.batch)
    stage = Stage(name="A", shapes=(shape,), steps=1, lr_muon=(0, 0), lr_adamw=(0, 0))
    outcome = losses.compute(logits, evidence, task, stage)
    outcome.loss.backward()
    assert torch.isfinite(outcome.loss) and outcome.gold_mass == outcome.recall == 0.0
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)
