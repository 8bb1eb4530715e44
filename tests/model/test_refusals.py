"""What a user sees of a model folder that cannot be served: one sentence that says what and where,
and exit code 1 (issue 3, "Bad input"); and what only looks wrong, and works.

`penstock logits` runs in this process by its entry point; two cases go through `penstock serve`.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.cli.main import main
from cluster.launchers.common import free_port
from tests.model import oracle

Models = Callable[[str], oracle.OracleModel]
Change = Callable[[Path], object]


@pytest.fixture
def folder(model: Models, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model("odd_window").folder, tmp_path / "spoilt"))


def logits(folder: Path, tokens: list[int], *flags: str) -> tuple[int, Path]:
    """Exit code of `penstock logits`, and its output file."""
    given, out = folder.parent / "tokens.json", folder.parent / "out.safetensors"
    given.write_text(json.dumps(tokens))
    paths = ("--tokens", str(given), "--out", str(out))
    return main(["logits", str(folder), *paths, *flags]), out


def refused(folder: Path, capsys: pytest.CaptureFixture[str], *words: str, **kwargs: Any) -> None:
    code, out = logits(folder, kwargs.pop("tokens", [1, 2, 3]), *kwargs.pop("flags", ()))
    said = capsys.readouterr()
    print(said.err)
    assert code == 1
    assert said.out == ""
    assert said.err.startswith("penstock: ")
    assert said.err.count("\n") == 1
    assert len(said.err) < 2500
    assert "unexpected" not in said.err.split(":")[1], "not a sentence of ours"
    for word in words:
        assert word in said.err, word
    assert not out.exists()


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors")

    return apply


def config(**changes: Any) -> Change:
    def apply(folder: Path) -> None:
        given = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**given, **changes}))

    return apply


def cut_to(size: Callable[[int], int]) -> Change:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        os.truncate(file, size(file.stat().st_size))

    return apply


def header_of(size: int) -> Change:
    """A header that claims `size` bytes."""

    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(struct.pack("<Q", size) + file.read_bytes()[8:])

    return apply


def spoil(name: str, value: float) -> Change:
    return tensors(lambda held: held[name].view(-1)[-1:].fill_(value))


NAN, INF = float("nan"), float("inf")
FILE = "model.safetensors"
WQ, SINK = "layers.1.attn.wq_a.weight", "layers.0.attn.attn_sink"
EXPERT = "layers.1.ffn.experts.7.w2.weight"
V41 = "DeepseekV41ForConditionalGeneration"
FOLDERS: list[tuple[str, Change, tuple[str, ...]]] = [
    ("last byte missing", cut_to(lambda n: n - 1), (FILE,)),
    ("half the data missing", cut_to(lambda n: n // 2), (FILE,)),
    ("half the header missing", cut_to(lambda n: 1000), (FILE,)),
    ("empty file", cut_to(lambda n: 0), (FILE,)),
    ("header larger than the file", header_of(1 << 40), (FILE,)),
    ("header of no size", header_of(0), (FILE,)),
    ("a folder for a file", lambda f: ((f / FILE).unlink(), (f / FILE).mkdir()), ("spoilt",)),
    ("NaN in a bf16 weight", spoil(WQ, NAN), (WQ, "finite")),
    ("NaN in an fp32 weight", spoil(SINK, NAN), (SINK, "finite")),
    ("infinity in an expert", spoil(EXPERT, INF), (EXPERT, "finite")),
    ("NaN in the embedding", spoil("embed.weight", NAN), ("embed.weight", "finite")),
    ("too few ratios", config(compress_ratios=[4]), ("compress_ratios", "num_hidden_layers")),
    ("ratio 3", config(compress_ratios=[4, 3, 0]), ("compress ratio 3", "128")),
    ("ratio 256", config(compress_ratios=[4, 256, 0]), ("compress ratio 256",)),
    ("ratio true", config(compress_ratios=[4, True, 0]), ("compress ratio True",)),
    ("ratio 8.0", config(compress_ratios=[4, 8.0, 0]), ("compress ratio 8.0",)),
    ("no list of ratios", config(compress_ratios="4,8"), ("compress_ratios",)),
    ("ratios of another model", config(compress_ratios=[8, 4, 0]), ("layers.0.attn.",)),
    ("another architecture", config(model_type="llama", architectures=["Llama"]), ("llama",)),
    ("DeepSeek-V3", config(model_type="deepseek_v3"), ("deepseek_v3",)),
    ("V4.1 by type", config(model_type="deepseek_v41"), ("V4.1",)),
    ("V4.1 by name", config(architectures=[V41]), ("V4.1",)),
    ("NaN in the config", config(rms_norm_eps=NAN), ("rms_norm_eps",)),
    ("no layers", config(num_hidden_layers=0, compress_ratios=[]), ("num_hidden_layers",)),
    ("width of another model", config(moe_intermediate_size=96), ("w1.weight", "96")),
    ("config in another encoding", lambda f: (f / "config.json").write_bytes(b"\xff"), ("JSON",)),
    ("no config", lambda f: (f / "config.json").unlink(), ("config.json", "no model at")),
]


@pytest.mark.parametrize(("change", "words"), [f[1:] for f in FOLDERS], ids=[f[0] for f in FOLDERS])
def test_a_folder_that_cannot_be_served_is_refused(
    change: Change, words: tuple[str, ...], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder)
    refused(folder, capsys, *words)


def test_a_folder_that_does_not_exist_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(tmp_path / "nowhere", capsys, "nowhere")


def test_tokens_beyond_the_models_context_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config(max_position_embeddings=20)(folder)
    refused(folder, capsys, "tokens.json holds 21 tokens", "20", tokens=[1] * 21)


@pytest.mark.parametrize(
    "changes",
    [
        {"index_topk": 1500},
        {"sliding_window": 5000},
        {"max_position_embeddings": 3},
        {"architectures": None},
        {"eos_token_id": [1, 2]},
    ],
    ids=str,
)
def test_what_is_larger_than_the_context_works(changes: dict[str, Any], folder: Path) -> None:
    """A top-k or a window larger than any prompt selects everything."""
    config(**changes)(folder)
    code, out = logits(folder, [1, 2, 3])
    assert code == 0
    assert torch.isfinite(load_file(out)["logits"]).all()


def test_serve_refuses_a_context_longer_than_the_models(folder: Path) -> None:
    command = [sys.executable, "-m", "cluster.cli", "serve", str(folder)]
    done = subprocess.run(
        [*command, "--port", str(free_port()), "--launcher", "local", "--max-model-len", "4097"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    print(done.stderr)
    assert done.returncode == 1
    assert done.stderr.startswith("penstock: ")
    assert done.stderr.count("\n") == 1
    for word in ("4097", "4096", "max_position_embeddings"):
        assert word in done.stderr
