"""Component tables from model shapes (deepseek-v4.md 3.1, 3.2)."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.layout import KvFormat, cache_layout, index_row_bytes, kv_row_bytes
from penstock.blocks import BLOCK_TOKENS, CacheLayout, ComponentKind
from tests.model.oracle import official_config

FLASH: dict[str, Any] = {
    "ratios": [0, 0, *[4, 128] * 20, 4],
    "hidden_size": 4096,
    "num_attention_heads": 64,
    "head_dim": 512,
    "o_groups": 8,
    "sliding_window": 128,
    "index_n_heads": 64,
    "index_topk": 512,
}
PRO: dict[str, Any] = {
    **FLASH,
    "ratios": [128, 128, *[4, 128] * 29, 4],
    "hidden_size": 7168,
    "num_attention_heads": 128,
}


def config(changes: dict[str, Any]) -> ModelConfig:
    return ModelConfig.parse(official_config(changes))


@pytest.mark.parametrize(("shape", "wanted"), [(FLASH, 3514), (PRO, 5031)])
def test_bytes_per_token_of_the_released_models(shape: dict[str, Any], wanted: int) -> None:
    layout = cache_layout(config(shape), KvFormat.FP8)
    print(f"{layout.bytes_per_token:.2f} bytes per token, {layout.block_bytes} per block")
    assert round(layout.bytes_per_token) == wanted


def test_rows_of_the_released_models_take_584_and_68_bytes() -> None:
    assert kv_row_bytes(config(FLASH), KvFormat.FP8) == 584
    assert index_row_bytes(config(FLASH), KvFormat.FP8) == 68
    assert kv_row_bytes(config(FLASH), KvFormat.BF16) == 1024


def test_components_come_in_layer_order_with_their_kinds() -> None:
    layout = cache_layout(config({"ratios": [0, 4, 128]}), KvFormat.FP8)
    kind = ComponentKind
    assert [(c.name, c.kind, c.ratio) for c in layout.components] == [
        ("layers.0.window", kind.WINDOW, 8),
        ("layers.1.kv", kind.COMPRESSED, 4),
        ("layers.1.index", kind.COMPRESSED, 4),
        ("layers.1.window", kind.WINDOW, 8),
        ("layers.1.carry", kind.CARRY_OVERLAP, 4),
        ("layers.1.index_carry", kind.CARRY_OVERLAP, 4),
        ("layers.2.kv", kind.COMPRESSED, 128),
        ("layers.2.window", kind.WINDOW, 8),
        ("layers.2.carry", kind.CARRY, 128),
        ("last.hidden", kind.LAST, 1),
        ("last.evidence", kind.LAST, 1),
    ]


def test_a_model_without_csa_has_no_evidence() -> None:
    names = [c.name for c in cache_layout(config({"ratios": [0, 8]}), KvFormat.FP8).components]
    assert "last.evidence" not in names


@given(
    ratios=st.lists(st.sampled_from([0, 4, 1, 2, 8, 16, 32, 64, 128]), min_size=1, max_size=6),
    kv=st.sampled_from(list(KvFormat)),
    position=st.integers(1, 5000),
)
def test_sections_tile_the_payload_and_the_table_round_trips(
    ratios: list[int], kv: KvFormat, position: int
) -> None:
    layout = cache_layout(config({"ratios": ratios}), kv)
    assert CacheLayout.from_json(layout.to_json()) == layout
    at = 0
    for section in layout.state_sections(position):
        assert section.offset == at
        at += section.size_bytes
    assert at == layout.state_bytes(position)
    assert all(BLOCK_TOKENS % c.ratio == 0 for c in layout.components if c.block_rows)


def test_config_and_layout_never_import_torch() -> None:
    code = "import sys, model.layout, model.config, model; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
