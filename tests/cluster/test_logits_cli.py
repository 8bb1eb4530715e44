"""`penstock logits`, the parity tool, against the independent oracle (transformers, fp32, all
rounding off).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.model import oracle

TOLERANCE = 1e-4
LENGTHS = (1, 7, 130, 513, 1500)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], oracle.OracleModel]:
    root = tmp_path_factory.mktemp("oracle")
    return lambda name: oracle.build(name, root / name)


def logits(folder: Path, tokens: list[int], *flags: str, dtype: str = "fp32") -> torch.Tensor:
    work = folder / "work"
    work.mkdir(exist_ok=True)
    (work / "tokens.json").write_text(json.dumps(tokens))
    (work / "beside.json").write_text(json.dumps(tokens[::-1]))
    command = [
        *(sys.executable, "-m", "cluster.cli", "logits", str(folder)),
        *("--tokens", str(work / "tokens.json"), "--out", str(work / "out.safetensors")),
        *("--kv-cache-dtype", dtype, "--dtype", "float32"),
        *(f.replace("BESIDE", str(work / "beside.json")) for f in flags),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return load_file(work / "out.safetensors")["logits"]


def test_every_position_agrees_with_transformers_by_every_path(
    model: Callable[[str], oracle.OracleModel],
) -> None:
    source = model("all_kinds")
    for length in LENGTHS:
        tokens = source.tokens(length)
        wanted = source.logits(tokens)
        ways: dict[str, tuple[str, ...]] = {"one chunk": ("--chunk-tokens", "4096")}
        if length > 1:
            split = str(max(1, length - 40))
            ways["ragged chunks, store, decode beside another"] = (
                *("--chunk-tokens", "37", "--prefill-tokens", split),
                *("--batch-with", "BESIDE"),
            )
        for way, flags in ways.items():
            got = logits(source.folder, tokens, *flags)
            assert got.shape == wanted.shape
            worst = (got - wanted).abs().max().item()
            print(f"{length} tokens, {way}: worst difference {worst:.1e}")
            assert worst <= TOLERANCE, (length, way)


def test_paths_are_bitwise_equal_with_the_real_cache_format(
    model: Callable[[str], oracle.OracleModel],
) -> None:
    source = model("ledger_like")
    tokens = source.tokens(700)
    whole = logits(source.folder, tokens, "--chunk-tokens", "4096", dtype="fp8")
    for flags in (
        ("--chunk-tokens", "128"),
        ("--chunk-tokens", "391", "--prefill-tokens", "650"),
        ("--prefill-tokens", "640", "--batch-with", "BESIDE"),
    ):
        assert torch.equal(whole, logits(source.folder, tokens, *flags, dtype="fp8")), flags


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("[]", "at least one token"),
        ("[1, -2]", "entry 1"),
        ("{", "cannot read"),
        ("[true]", "0 is True"),
    ],
)
def test_bad_token_files_are_named(
    content: str, cause: str, model: Callable[[str], oracle.OracleModel], tmp_path: Path
) -> None:
    (tmp_path / "tokens.json").write_text(content)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "cluster.cli", "logits", "ledger"),
            *("--tokens", str(tmp_path / "tokens.json"), "--out", str(tmp_path / "x.safetensors")),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (1, 2) and cause in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
