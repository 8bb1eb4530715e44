"""The tensor table against the published counts (deepseek-v4.md 1.1, 1.7, 6), and its cut over
ranks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.config import DraftKind, ModelConfig
from model.grid import Grid
from model.rounding import rounded_inputs
from model.tensors import (
    BASE,
    PLAIN,
    RELEASED,
    Expected,
    Kind,
    check_grid,
    expected_tensors,
    local_experts,
    parameters,
    stored_parts,
)
from penstock.errors import ModelLoadError
from tests.model.oracle import official_config

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
TINY: dict[str, Any] = {
    "ratios": [0, 4, 128],
    "num_attention_heads": 8,
    "o_groups": 4,
    "n_routed_experts": 8,
    "vocab_size": 130,
    "num_nextn_predict_layers": 1,
}


def real(name: str) -> ModelConfig:
    return ModelConfig.parse(json.loads((CONFIGS / f"{name}.json").read_text()))


def files(table: dict[str, Expected]) -> dict[str, tuple[int, ...]]:
    return {
        name: stored.shape
        for weight, expected in table.items()
        for name, stored in stored_parts(weight, expected).items()
    }


@pytest.mark.parametrize(
    ("name", "tensors", "billions"),
    [("flash", 69_187, 284.33), ("flash_0731", 72_317, 284.33), ("pro", 145_116, 1573.0)],
)
def test_the_released_checkpoints_have_the_published_counts(
    name: str, tensors: int, billions: float
) -> None:
    config = real(name)
    stored = files(expected_tensors(config, RELEASED, drafts=True))
    backbone = expected_tensors(config, RELEASED)
    total = parameters(backbone)
    print(f"{name}: {len(stored)} tensors, backbone {total / 1e9:.3f} B parameters")
    assert len(stored) == tensors
    assert round(total / 1e9, 2 if billions < 1000 else 1) == billions
    assert not any(part.startswith("mtp.") for part in backbone)


def test_the_pro_scale_shapes_are_those_of_the_release() -> None:
    stored = files(expected_tensors(real("pro"), RELEASED, drafts=True))
    wanted = {
        "layers.0.attn.wq_b.scale": (512, 12),
        "layers.0.attn.wkv.scale": (4, 56),
        "layers.0.attn.wo_a.scale": (128, 32),
        "layers.0.attn.wo_b.scale": (56, 128),
        "layers.0.ffn.shared_experts.w1.scale": (24, 56),
        "layers.0.ffn.experts.383.w1.weight": (3072, 3584),
        "layers.0.ffn.experts.383.w1.scale": (3072, 224),
        "layers.0.ffn.experts.383.w2.scale": (7168, 96),
        "layers.3.attn.compressor.ape": (128, 512),
        "layers.2.attn.compressor.ape": (4, 1024),
        "layers.2.attn.indexer.compressor.wkv.weight": (256, 7168),
    }
    assert {name: stored[name] for name in wanted} == wanted


def test_the_flash_table_makes_modules_of_the_right_size_on_the_meta_device() -> None:
    """284 B numbers without memory: what a rank would allocate, and how little of it is not
    experts.
    """
    table = expected_tensors(real("flash"))
    with torch.device("meta"):
        tensors = {name: torch.empty(weight.shape) for name, weight in table.items()}
    total = sum(t.numel() for name, t in tensors.items() if "tid2eid" not in name)
    experts = sum(t.numel() for name, t in tensors.items() if ".experts." in name)
    print(f"{total / 1e9:.2f} B, experts {experts / 1e9:.2f} B")
    assert total == parameters(table)
    assert experts == 43 * 256 * 3 * 2048 * 4096


def test_t21_dspark_is_found_by_its_keys() -> None:
    preview, refreshed = real("flash").draft, real("flash_0731").draft
    assert preview is not None and preview.kind is DraftKind.MTP and preview.stages == 1
    assert refreshed is not None and refreshed.kind is DraftKind.DSPARK
    assert (refreshed.stages, refreshed.target_layers) == (3, (40, 41, 42))
    table = expected_tensors(real("flash_0731"), RELEASED, drafts=True)
    assert table["mtp.0.main_proj.weight"].shape == (4096, 3 * 4096)
    assert table["mtp.2.markov_head.markov_w2.weight"].shape == (129280, 256)
    assert table["mtp.2.confidence_head.proj.weight"].shape == (1, 4096 + 256)
    assert "mtp.0.e_proj.weight" not in table
    assert "mtp.1.norm.weight" not in table


def test_base_checkpoints_have_fp8_experts() -> None:
    table = expected_tensors(real("flash"), BASE)
    assert table["layers.0.ffn.experts.0.w1.weight"].kind is Kind.FP8
    assert not any(weight.kind.scaled for weight in expected_tensors(real("flash")).values())


GRIDS = [(tp, ep, cp) for tp in (1, 2, 4) for ep in (1, 2, 4) for cp in (1, 2) if tp * ep <= 4]


@given(shape=st.sampled_from(GRIDS), precision=st.sampled_from([PLAIN, RELEASED]))
def test_the_ranks_of_a_plane_cover_every_tensor_without_overlap(
    shape: tuple[int, int, int], precision: Any
) -> None:
    config = ModelConfig.parse(official_config(TINY))
    tp, ep, cp = shape
    grids = [Grid(tp, ep, cp, rank) for rank in range(tp * ep)]
    check_grid(config, grids[0])
    for name, weight in expected_tensors(config, precision, drafts=True).items():
        held = torch.zeros(weight.shape, dtype=torch.int32)
        for grid in grids:
            part = weight.slices(grid)
            if part is not None:
                held[part] += 1
                assert held[part].shape == weight.local_shape(grid)
        # Every number the same times: once, or by every rank that shares the tensor.
        copies = int(held.max())
        assert bool((held == copies).all()), name
        assert copies in (1, tp * ep), name
        for other in range(1, cp):
            again = Grid(tp, ep, cp, other * tp * ep)
            assert weight.slices(again) == weight.slices(grids[0])


def test_heads_groups_and_experts_of_a_rank_belong_together() -> None:
    config = ModelConfig.parse(official_config(TINY))
    table = expected_tensors(config)
    grid = Grid(tp=2, ep=2, rank=3)
    wq_b = table["layers.1.attn.wq_b.weight"].slices(grid)
    wo_a = table["layers.1.attn.wo_a.weight"].slices(grid)
    wo_b = table["layers.1.attn.wo_b.weight"].slices(grid)
    sink = table["layers.1.attn.attn_sink"].slices(grid)
    assert wq_b and wo_a and wo_b and sink
    assert sink == (slice(6, 8),)
    assert wq_b[0] == slice(6 * 128, 8 * 128)
    assert wo_a == (slice(3 * 16, 4 * 16), slice(0, 256))
    assert wo_b == (slice(3 * 16, 4 * 16), slice(0, 64))
    assert local_experts(8, grid) == range(4, 8)
    assert table["layers.1.ffn.experts.3.w1.weight"].slices(grid) is None
    assert table["layers.1.ffn.experts.4.w2.weight"].slices(grid) == (slice(32, 64), slice(0, 64))


@pytest.mark.parametrize(
    ("changes", "grid", "words"),
    [
        ({}, Grid(tp=3), "8 heads in 4 output groups"),
        ({}, Grid(ep=16), "8 routed experts"),
        ({"moe_intermediate_size": 62}, Grid(tp=4), "expert width 62"),
        ({"hidden_size": 68}, Grid(tp=8), "model width 68"),
        ({"o_lora_rank": 15}, Grid(tp=8), "15 outputs of a group"),
    ],
)
def test_a_grid_that_does_not_divide_the_model_is_refused_with_the_numbers(
    changes: dict[str, Any], grid: Grid, words: str
) -> None:
    config = ModelConfig.parse({**official_config(TINY), **changes})
    with pytest.raises(ModelLoadError, match=words) as caught:
        check_grid(config, grid)
    print(caught.value.message)
    assert "\n" not in caught.value.message


def test_t4_rope_bases_and_limits_are_the_configs_not_code_defaults() -> None:
    for name, scale in (("flash", 1.5), ("pro", 2.5)):
        config = real(name)
        assert (config.compress_rope_theta, config.swiglu_limit) == (160000.0, 10.0)
        assert config.route_scale == scale
    raw = json.loads((CONFIGS / "flash.json").read_text())
    for key in ("compress_rope_theta", "swiglu_limit", "routed_scaling_factor"):
        with pytest.raises(ModelLoadError, match=f"lacks {key}"):
            ModelConfig.parse({name: value for name, value in raw.items() if name != key})


def test_t10_router_compressors_and_head_are_never_quantised() -> None:
    for name, weight in expected_tensors(real("pro"), RELEASED, drafts=True).items():
        kept = ("gate.", "compressor.", "weights_proj", "norm", "hc_", "embed", "head", "attn_sink")
        assert weight.kind.scaled != any(part in name for part in kept), name


def test_t20_activations_are_rounded_before_every_quantised_linear_but_wo_a() -> None:
    table = expected_tensors(real("flash_0731"), RELEASED, drafts=True)
    rounded = rounded_inputs(table)
    scaled = {name for name, weight in table.items() if weight.kind.scaled}
    left = {name for name in scaled if name not in rounded}
    assert left == {name for name in table if name.endswith("attn.wo_a.weight")}
    assert {"layers.5.attn.wq_b.weight", "mtp.0.main_proj.weight"} <= rounded
    assert not rounded_inputs(expected_tensors(real("flash")))


def test_t23_the_one_kv_head_is_on_every_rank() -> None:
    table = expected_tensors(real("flash"), RELEASED)
    for name, weight in table.items():
        if "attn.wkv" in name or "compressor" in name or "kv_norm" in name:
            assert weight.local_shape(Grid(tp=8, rank=5)) == weight.shape, name
