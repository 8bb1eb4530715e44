"""Reading controls in process: the shipped model needs its index; entries drawn by chance or by age
give nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from cluster.cli import main  # noqa: E402
from kernels.reference import rows  # noqa: E402
from kernels.reference.hadamard import hadamard, hadamard_matrix  # noqa: E402
from training.rounding import SERVED, Cache  # noqa: E402


def test_selection_and_cache_formats_side_by_side(tmp_path: Path) -> None:
    report = tmp_path / "inside.json"
    flags = f"--in-process --lengths 2k --questions 11 --seed 5 --json {report}"
    assert main(["eval", "needle", "ledger", *flags.split()]) == 0
    table = json.loads(report.read_text())["tables"]["2k"]
    got = {row["variant"]: row for row in table}
    print({name: (row["exact"], row["answerable"], row["recall16"]) for name, row in got.items()})
    for name in ("index top-k, fp32 cache", "fp8 cache, fp4 index (served)", "bf16 cache"):
        assert got[name]["exact"] >= 10 and got[name]["recall16"] == 1.0
    for name in ("random top-k", "latest k"):
        assert got[name]["exact"] <= 2
    served = got["fp8 cache, fp4 index (served)"]["loss_per_digit"]
    assert served <= got["index top-k, fp32 cache"]["loss_per_digit"] + 0.05


def test_training_rounds_as_serving_does_and_lets_gradients_through() -> None:
    generator = torch.Generator().manual_seed(2)
    x = (torch.randn(7, 128, generator=generator) * 3).requires_grad_()
    row = SERVED.row(x, 32)
    assert torch.equal(row, rows.fp8_round(x.detach(), 96))
    keys = x[:, :64]
    key = SERVED.key(keys)
    want = rows.index_round(keys.detach().contiguous(), hadamard_matrix(64))
    assert torch.equal(key, want)
    weight = torch.randn(7, 128, generator=generator)
    (row * weight).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, weight)
    x.grad = None
    turned = torch.randn(7, 64, generator=generator)
    (SERVED.key(x[:, :64]) * turned).sum().backward()
    back = hadamard(turned, hadamard_matrix(64))
    assert x.grad is not None and torch.allclose(x.grad[:, :64], back, atol=1e-5)
    assert torch.equal(Cache("bf16").row(x, 32), rows.bf16_round(x.detach()))
    coarse = Cache("fp4").row(x, 32)
    assert torch.equal(coarse[:, 96:], rows.bf16_round(x.detach()[:, 96:]))
    assert torch.equal(coarse[:, :96], rows.fp4_round(x.detach()[:, :96].contiguous()))
