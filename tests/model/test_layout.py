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


# deepseek-v4.md 3.2, by its own arithmetic: (rows of 584 B or bf16, index rows of 68 B or bf16).
KIB, MIB = 1 << 10, 1 << 20
LAYERS = {"flash": (21, 20, 43), "pro": (30, 31, 61)}
# The table as printed: 4K and 128K in MiB, 1M in GiB.
TOTALS = {("flash", "fp8"): (28.4, 454, 3.45), ("pro", "fp8"): (41.8, 651, 4.94)}
TOTALS |= {("flash", "bf16"): (32, 865, 6.7), ("pro", "bf16"): (46, 1239, 9.6)}


def resident_bytes(layout: CacheLayout, tokens: int, *, states: bool) -> int:
    """A sequence of `tokens` as the specification counts it: growing rows, window, and with
    `states` every compressor's full state (overlap: two windows).
    """
    total = 0
    for part in layout.components:
        match part.kind:
            case ComponentKind.COMPRESSED:
                total += tokens // part.ratio * part.row_bytes
            case ComponentKind.WINDOW:
                total += part.ratio * part.row_bytes
            case ComponentKind.CARRY if states:
                total += part.ratio * part.row_bytes
            case ComponentKind.CARRY_OVERLAP if states:
                total += 2 * part.ratio * part.row_bytes
            case ComponentKind.LAST if states:
                total += part.row_bytes
    return total


@pytest.mark.parametrize(("name", "kv"), TOTALS)
def test_kv_memory_of_the_released_models(name: str, kv: str) -> None:
    """Within 0.1 % of the specification's formula, which gives the table as far as it prints.

    We store a little more: the last token's output row belongs to a state (architecture.md).
    """
    csa, hca, every = LAYERS[name]
    row, index = (584, 68) if kv == "fp8" else (1024, 256)
    per_token = csa * (row + index) / 4 + hca * row / 128
    fixed = every * 128 * row
    if kv == "fp8":
        fixed += (csa * (64 + 16) + hca * 512) * KIB
    layout = cache_layout(config({"flash": FLASH, "pro": PRO}[name]), KvFormat(kv))
    assert layout.bytes_per_token == per_token
    printed = TOTALS[name, kv]
    for tokens, unit, shown in zip((1 << 12, 1 << 17, 1 << 20), (1, 1, KIB), printed, strict=True):
        got = resident_bytes(layout, tokens, states=kv == "fp8")
        wanted = per_token * tokens + fixed
        digits = len(str(shown).partition(".")[2])
        print(f"{name} {kv} {tokens} tokens: {got / MIB:.2f} MiB, {got / wanted - 1:+.3%}")
        assert abs(got / wanted - 1) <= 1e-3
        assert round(wanted / MIB / unit, digits) == shown
        # What a hand-over carries is never more: part of the states is empty at a block's border.
        sent = tokens // BLOCK_TOKENS * layout.block_bytes + layout.state_bytes(tokens)
        assert sent <= resident_bytes(layout, tokens, states=True)


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
