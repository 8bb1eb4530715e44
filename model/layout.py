"""The cache layout of a model: its component table for one KV format. Torch-free.

Row sizes follow architecture.md ("Row format") and deepseek-v4.md 3.1; at Flash and Pro shapes they
give 3514 and 5031 bytes per token (3.2).
"""

from __future__ import annotations

from enum import StrEnum

from model.config import CSA_RATIO, ModelConfig
from model.drafts.plan import DraftPlan
from penstock.blocks import CacheLayout, Component, ComponentKind

LAYOUT_VERSION = 2
EVIDENCE_PAIRS = 8
_FP8_GROUP = 64
_FP4_GROUP = 32


class KvFormat(StrEnum):
    FP8 = "fp8"
    """Attention rows e4m3 + bf16 rope, index rows e2m1: the release's rounding points (5.4)."""
    BF16 = "bf16"
    FP32 = "fp32"
    """Every cache and activation rounding off."""


def kv_row_bytes(config: ModelConfig, kv: KvFormat) -> int:
    """One window or compressed attention row."""
    match kv:
        case KvFormat.FP8:
            scales = -(-config.nope_dim // _FP8_GROUP)
            size = config.nope_dim + 2 * config.rope_dim + scales
            return -(-size // 8) * 8
        case KvFormat.BF16:
            return 2 * config.head_dim
        case KvFormat.FP32:
            return 4 * config.head_dim


def index_row_bytes(config: ModelConfig, kv: KvFormat) -> int:
    """One indexer key."""
    match kv:
        case KvFormat.FP8:
            return config.index_dim // 2 + config.index_dim // _FP4_GROUP
        case KvFormat.BF16:
            return 2 * config.index_dim
        case KvFormat.FP32:
            return 4 * config.index_dim


def carry_channels(ratio: int, dim: int) -> int:
    """fp32 numbers in one raw compressor row: [kv | score], twice as wide with overlap (2.3)."""
    return 2 * dim * (2 if ratio == CSA_RATIO else 1)


def cache_layout(
    config: ModelConfig,
    kv: KvFormat,
    drafts: DraftPlan | None = None,
    *,
    index: KvFormat | None = None,
) -> CacheLayout:
    """With drafts a state has their windows too, so that a decode worker drafts from its first
    step on. `index`: format of index keys, if it is not that of the other rows.
    """
    kind = ComponentKind
    table: list[Component] = []
    row, index_row = kv_row_bytes(config, kv), index_row_bytes(config, index or kv)
    for layer, ratio in enumerate(config.ratios):
        name = f"layers.{layer}."
        if ratio:
            table.append(Component(name + "kv", kind.COMPRESSED, ratio, row))
        if ratio == CSA_RATIO:
            table.append(Component(name + "index", kind.COMPRESSED, ratio, index_row))
        table.append(Component(name + "window", kind.WINDOW, config.window, row))
        if ratio:
            carry = kind.CARRY_OVERLAP if ratio == CSA_RATIO else kind.CARRY
            raw = 4 * carry_channels(ratio, config.head_dim)
            table.append(Component(name + "carry", carry, ratio, raw))
        if ratio == CSA_RATIO:
            raw = 4 * carry_channels(ratio, config.index_dim)
            table.append(Component(name + "index_carry", kind.CARRY_OVERLAP, ratio, raw))
    for stage in range(drafts.stages if drafts else 0):
        name = f"layers.{config.layers + stage}.window"
        table.append(Component(name, kind.WINDOW, config.window, row))
    if drafts is not None and drafts.keeps_streams:
        size = 4 * config.streams * config.hidden
        table.append(Component("last.streams", kind.LAST, 1, size))
    table.append(Component("last.hidden", kind.LAST, 1, 4 * config.hidden))
    if config.last_csa_layer is not None:
        table.append(Component("last.evidence", kind.LAST, 1, 8 * EVIDENCE_PAIRS))
    return CacheLayout(tuple(table))
