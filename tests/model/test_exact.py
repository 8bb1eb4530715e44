"""The start-up check of class `exact`, and the fallback to fixed row tiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from model import exact
from model.linear import Linear
from penstock.errors import ModelLoadError


def test_this_machine_passes_for_common_shapes() -> None:
    exact.check_batches([(32, 128, 32), (4, 4, 128)])
    tile = exact.row_tile_for([(128, 512), (512, 24), (16, 4)], torch.float32)
    print("row tile", tile)
    assert tile in (None, 16)


def test_tiled_products_are_the_same_product() -> None:
    x, weight = torch.randn(80, 64), torch.randn(24, 64)
    assert torch.allclose(Linear(weight, 16)(x), Linear(weight)(x), atol=1e-5)
    assert torch.equal(Linear(weight, 16)(x)[32:64], Linear(weight, 16)(x[32:64]))


def test_a_machine_without_row_invariance_falls_back_then_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    product: Callable[..., torch.Tensor] = torch.nn.functional.linear

    def spoiled(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return product(x, weight) + (x.shape[0] > 16)

    monkeypatch.setattr(exact.F, "linear", spoiled)
    assert exact.row_tile_for([(32, 32)], torch.float32) == 16
    monkeypatch.setattr(exact.F, "linear", lambda x, w: product(x, w) + torch.randn(1))
    with pytest.raises(ModelLoadError, match="'exact' is not possible"):
        exact.row_tile_for([(32, 32)], torch.float32)
