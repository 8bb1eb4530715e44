"""One dispatch for all ops: `load(backend)` returns the set that the model calls.

A faster backend subclasses `ReferenceOps` and overrides what it has; the reference is the meaning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from kernels.reference import (
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

BACKEND_VARIABLE = "PENSTOCK_KERNELS__BACKEND"
_BACKENDS = ("auto", "triton", "reference")


class BackendError(ValueError):
    """The asked-for kernel backend cannot be used here. One sentence."""


class ReferenceOps:
    """Plain torch on any device that torch computes exactly on; `name` is part of the
    fingerprint.
    """

    name = "reference-1"

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


def asked_backend(backend: str | None, environ: Mapping[str, str]) -> str:
    """The name that was asked for, checked. Raises BackendError."""
    asked = backend or environ.get(BACKEND_VARIABLE, "auto")
    if asked not in _BACKENDS:
        raise BackendError(
            f"{BACKEND_VARIABLE} is {asked!r}; it must be one of {', '.join(_BACKENDS)}"
        )
    return asked


def load(backend: str | None = None, *, environ: Mapping[str, str] = os.environ) -> ReferenceOps:
    """The CPU engine's ops of `backend` (default: `PENSTOCK_KERNELS__BACKEND`, else `auto`).

    Triton's ops are coarser (`kernels.dispatch.load_device`). Raises BackendError.
    """
    if asked_backend(backend, environ) == "triton":
        raise BackendError(
            "kernel backend 'triton' has no ops for the engine on a CPU; set "
            f"{BACKEND_VARIABLE} to 'auto' or 'reference'"
        )
    return ReferenceOps()
