"""A run survives: resumed it is the same run to the last bit, and bad input loses nothing."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import random
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from cluster.cli import main  # noqa: E402
from penstock.errors import UsageError  # noqa: E402
from training import checkpoint, loop, losses, vocabulary  # noqa: E402
from training.config import NetworkConfig, Shape, Stage, TrainingConfig  # noqa: E402
from training.errors import CheckpointError, TrainingError  # noqa: E402
from training.network import Network  # noqa: E402

TINY = NetworkConfig(
    hidden_size=32, q_lora_rank=32, o_lora_rank=32, head_dim=64, index_head_dim=32,
    moe_intermediate_size=32, hc_mult=2,
)  # fmt: skip


def stage(name: str, **more: Any) -> Stage:
    settings: dict[str, Any] = {
        "steps": 4, "lr_muon": (0.02, 0.002), "lr_adamw": (5e-3, 1e-3), "dense_steps": 2,
        "bank_entries": 64, "quantized": 0.5, "gapless": 0.3, "full_question": 0.0,
    }  # fmt: skip
    shapes = (
        Shape(tokens=144, rows=2, facts=2, questions=2),
        Shape(tokens=160, rows=1, facts=2, questions=3),
    )
    return Stage(name=name, shapes=shapes, **(settings | more))


def config(**more: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "stages": (stage("A"), stage("B")), "log_every": 3, "sinkhorn_iters": 2, "network": TINY,
        "checkpoint_every_steps": 3,
    }  # fmt: skip
    return TrainingConfig(**(settings | more))


def run(
    cfg: TrainingConfig, out: pathlib.Path, **more: Any
) -> tuple[list[tuple[int, float]], list[dict[str, Any]], Network]:
    out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(cfg.seed)
    network, told = Network(cfg.network), []
    curve = loop.train(
        cfg, network, vocabulary.tokenizer(), out, say=lambda line: None,
        on_step=lambda step, loss: told.append((step, loss)), **more,
    )  # fmt: skip
    for line in curve:
        line.pop("seconds")
    return told, curve, network


class Killed(Exception):
    """As if the process had ended there."""


@pytest.mark.parametrize("at", [3, 7])
def test_resumed_from_any_checkpoint_every_later_loss_is_the_same(
    tmp_path: pathlib.Path, at: int
) -> None:
    cfg = config()
    whole, curve, network = run(cfg, tmp_path / "whole")
    assert len(whole) == 8 and len({loss for _, loss in whole}) == 8

    def kill(step: int) -> None:
        if step == at + 1:
            raise Killed

    out = tmp_path / "cut"
    out.mkdir()
    torch.manual_seed(cfg.seed)
    with pytest.raises(Killed):
        loop.train(
            cfg, Network(cfg.network), vocabulary.tokenizer(), out, say=lambda line: None,
            on_step=lambda step, loss: kill(step),
        )  # fmt: skip
    torch.manual_seed(999)
    random.seed(999)
    last = checkpoint.known(out)[-1]
    taken = checkpoint.load(last, cfg.digest()).step
    assert taken == (3 if at == 3 else 6)
    again, resumed, same = run(cfg, out, resume=last)
    assert again == whole[taken:]
    assert resumed == curve
    for name, value in network.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
    assert json.loads((out / "curve.json").read_text())


def saved(tmp_path: pathlib.Path) -> tuple[TrainingConfig, pathlib.Path]:
    cfg = config(stages=(stage("A", steps=2),), checkpoint_every_steps=1)
    run(cfg, tmp_path)
    return cfg, checkpoint.known(tmp_path)[-1]


def test_another_configuration_and_damage_are_refused(tmp_path: pathlib.Path) -> None:
    cfg, last = saved(tmp_path)
    assert len(checkpoint.known(tmp_path)) == checkpoint.KEPT
    other = cfg.model_copy(update={"seed": 2})
    with pytest.raises(CheckpointError, match="another configuration"):
        run(other, tmp_path, resume=last)
    # How often it saves decides nothing.
    rarer = cfg.model_copy(update={"checkpoint_every_steps": 50})
    assert checkpoint.load(last, rarer.digest()).step == 2
    data = bytearray(last.read_bytes())
    for at in (20, 60, len(data) // 2, len(data) - 1):
        bad = bytearray(data)
        bad[at] ^= 1
        last.write_bytes(bad)
        with pytest.raises(CheckpointError, match=r"damaged.*checkpoint-00000001"):
            checkpoint.load(last, cfg.digest())
    for cut in (0, 5, 40, len(data) - 9):
        last.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=r"damaged|no checkpoint"):
            checkpoint.load(last, cfg.digest())
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.load(tmp_path / "none", cfg.digest())


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, real, calls = config(checkpoint_every_steps=1), losses.compute, []

    def poisoned(*args: Any) -> losses.Outcome:
        outcome = real(*args)
        calls.append(1)
        if len(calls) == 6:
            return losses.Outcome(**(vars(outcome) | {"loss": outcome.loss * float("nan")}))
        return outcome

    monkeypatch.setattr(losses, "compute", poisoned)
    with pytest.raises(TrainingError, match=r"stage B, step 2 \(6 of the run\).*00000005"):
        run(cfg, tmp_path)
    monkeypatch.setattr(losses, "compute", real)
    last = checkpoint.known(tmp_path)[-1]
    state = checkpoint.load(last, cfg.digest())
    assert state.step == 5
    assert all(torch.isfinite(v).all() for n, v in state.tensors.items() if "network" in n)
    told, _, _ = run(cfg, tmp_path, resume=last)
    assert [step for step, _ in told] == [6, 7, 8]


def test_a_full_disk_keeps_what_was_there(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, last = saved(tmp_path)
    before = last.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    state = checkpoint.load(last, cfg.digest())
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(TrainingError, match=r"No space left.*checkpoint-00000002.train is kept"):
        checkpoint.save(tmp_path, checkpoint.Checkpoint(3, cfg.digest(), state.tensors, {}))
    assert checkpoint.known(tmp_path)[-1] == last and last.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


YAML = """
seed: 1
log_every: 2
network: {hidden_size: 32, q_lora_rank: 32, o_lora_rank: 32, head_dim: 64, index_head_dim: 32}
stages:
  - {name: A, shapes: [{tokens: 144, rows: 2, facts: 2, questions: 2}], steps: 2,
     lr_muon: [0.02, 0.02], lr_adamw: [0.005, 0.005]}
"""


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (YAML + "warmth: 3\n", "warmth: no such setting"),
        (YAML.replace("steps: 2", "steps: 2, stepz: 3"), "stages.0.stepz: no such setting"),
        (YAML.replace("hidden_size", "hiden_size"), "network.hiden_size: no such setting"),
        (YAML.replace("steps: 2", "steps: 0"), "stages.0.steps"),
        ("stages: [", "is not YAML"),
        ("", "the file"),
    ],
)
def test_a_wrong_configuration_names_its_key(
    tmp_path: pathlib.Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        TrainingConfig.read(path)
    assert main(["train", str(path), "--out", str(tmp_path / "out")]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_command_trains_exports_and_refuses_to_write_over_a_run(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "config.yaml", tmp_path / "out"
    path.write_text(YAML)
    arguments = ["train", str(path), "--out", str(out), "--eager", "--questions", "0"]
    assert main(arguments) == 0
    names = {each.name for each in out.iterdir()}
    assert {"model.safetensors", "config.json", "training.json", "curve.json"} <= names
    assert main(arguments) == 1
    assert "--resume latest" in capsys.readouterr().err
    assert main([*arguments, "--resume", "latest"]) == 0
    assert main([*arguments, "--resume", "latest", "--stage", "A"]) == 2
    assert main([*arguments, "--weights", str(out), "--stage", "Z", "--resume", "latest"]) == 2
