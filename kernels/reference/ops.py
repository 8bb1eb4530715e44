"""`ReferenceOps`: every op of the CPU engine in plain torch, under one name.

A faster set subclasses it and overrides what it has; the reference is the meaning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.reference import (
    attend,
    attention,
    hadamard,
    indexer,
    lanes,
    mhc,
    moe,
    norm,
    pool,
    rope,
    rows,
    select,
)


class ReferenceOps:
    """Plain torch on any device that torch computes exactly on; `name` is part of the
    fingerprint.
    """

    name = "reference-2"
    row_multiple = lanes.ROW_MULTIPLE
    """Rows of a pass are padded to a multiple of this."""
    most_index_products = 1 << 18
    """Products of queries and a tile of index keys that `index_scores` may hold at a time."""

    pad_rows = staticmethod(lanes.pad_rows)
    rms_norm = staticmethod(norm.rms_norm)
    frequencies = staticmethod(rope.frequencies)
    cos_sin = staticmethod(rope.cos_sin)
    rotate = staticmethod(rope.rotate)
    pool_windows = staticmethod(pool.pool_windows)
    hadamard_matrix = staticmethod(hadamard.hadamard_matrix)
    hadamard = staticmethod(hadamard.hadamard)
    fp8_round = staticmethod(rows.fp8_round)
    fp8_encode = staticmethod(rows.fp8_encode)
    fp8_decode = staticmethod(rows.fp8_decode)
    fp4_round = staticmethod(rows.fp4_round)
    fp4_encode = staticmethod(rows.fp4_encode)
    fp4_decode = staticmethod(rows.fp4_decode)
    activation_round = staticmethod(rows.activation_round)
    bf16_round = staticmethod(rows.bf16_round)
    index_scores = staticmethod(indexer.index_scores)
    select_visible = staticmethod(select.select_visible)
    topk_lowest = staticmethod(select.topk_lowest)
    tile_part = staticmethod(attention.tile_part)
    dense_part = staticmethod(attention.dense_part)
    merge_parts = staticmethod(attention.merge_parts)
    entry_mass = staticmethod(attention.entry_mass)
    mixing = staticmethod(mhc.mixing)
    input_gates = staticmethod(mhc.input_gates)
    output_gates = staticmethod(mhc.output_gates)
    collapse = staticmethod(mhc.collapse)
    expand = staticmethod(mhc.expand)
    head_collapse = staticmethod(mhc.head_collapse)
    route_scores = staticmethod(moe.route_scores)
    pick_experts = staticmethod(moe.pick_experts)
    route_weights = staticmethod(moe.route_weights)
    swiglu = staticmethod(moe.swiglu)
    prepare_mhc = staticmethod(mhc.prepare)
    enter = staticmethod(mhc.enter)
    leave = staticmethod(mhc.leave)
    prepare_head = staticmethod(mhc.prepare_head)
    route = staticmethod(moe.route)
    add_experts = staticmethod(moe.add_experts)
    norm_rotate = staticmethod(rope.norm_rotate)
    index_round = staticmethod(rows.index_round)
    entry_masses = staticmethod(attend.entry_masses)

    def __init__(self) -> None:
        self._tiles: attend.Tiles | None = None

    def attend(
        self,
        q_RHC: Tensor,
        spans: Sequence[attend.AttendSpan],
        sink_H: Tensor,
        *,
        window: int,
        ratio: int,
        picked_RK: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `kernels.reference.attend`. The tiles of a pass are the same in every layer."""
        places = tuple((span.row, span.count, span.position) for span in spans)
        if self._tiles is None or self._tiles.key != (places, window):
            self._tiles = attend.Tiles(places, window=window)
        return attend.attend(
            q_RHC, spans, sink_H, self._tiles, ratio=ratio, picked_RK=picked_RK, scale=scale
        )

    def suits(self, dtype: torch.dtype, streams: int, channels: tuple[int, ...]) -> bool:
        """Can these ops serve a model of this activation type and these widths?"""
        return True

    def pack(self, weight_NK: Tensor) -> Any:
        """A weight in the form that `product` takes; None: this set multiplies plain weights."""
        return None

    def product(self, x_RK: Tensor, weight: Any, out_RN: Tensor | None = None) -> Tensor:
        """x W^T of a packed weight, fp32; into `out_RN`, whose rows may lie apart, if given."""
        raise NotImplementedError("this set of ops packs no weights")

    def stack_experts(self, experts: Sequence[Any], shared: Any, *, first: int, unit: int) -> Any:
        """Packed experts `first`, ... and the shared one, or parts of them; `unit` as in
        `moe.part_size`. None: this set has no such ops.
        """
        return None

    def experts(
        self,
        x_RD: Tensor,
        ids_RK: Tensor,
        weights_RK: Tensor,
        stack: Any,
        *,
        limit: float,
    ) -> Tensor:
        """[R, D]: routed experts as `moe.add_experts` adds them, then the shared one, of whole
        stacked weights.
        """
        raise NotImplementedError("this set of ops has no stacked experts")

    def experts_up(
        self,
        x_RD: Tensor,
        ids_RK: Tensor,
        weights_RK: Tensor,
        stack: Any,
        *,
        limit: float,
    ) -> tuple[Tensor, Tensor]:
        """Weighted inner channels [N, I] of this stack's slots, by expert and then by slot, and
        those of the shared expert [R, I].
        """
        raise NotImplementedError("this set of ops has no stacked experts")

    def experts_down(
        self, inner_NI: Tensor, shared_RI: Tensor, ids_RK: Tensor, stack: Any
    ) -> tuple[Tensor, Tensor]:
        """Outputs [R, D] of this stack's routed experts, added, and of the shared one; from all
        inner channels.
        """
        raise NotImplementedError("this set of ops has no stacked experts")
