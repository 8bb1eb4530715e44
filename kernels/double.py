"""The reference device ops with every sum in float64, each result rounded once to its own type.

torch's products and reductions on a CPU (or with cuBLAS) may round a row differently when other
rows share the call. In float64 what remains of that is about 1e-16 of a value, and the one rounding
to fp32, bfloat16 or e4m3 afterwards hides it except by a chance of about 1e-8 a value: good enough
to stand in for fixed tiles in numerics class `exact`, slow, and no proof.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.device import ReferenceDeviceOps

_NARROW = (torch.float32, torch.bfloat16, torch.float16)
_FIRST, _SECOND, _SINGLE = 0, 1, None
"""Type of a result: that of the first or second argument, or fp32."""


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.dtype in _NARROW else value


def _doubled(op: Callable[..., Any], *kinds: int | None) -> Any:
    """`op` on float64 copies; `kinds` says for each result what it is rounded to."""

    def call(*args: Any, **kwargs: Any) -> Any:
        found = op(*map(_widened, args), **{name: _widened(v) for name, v in kwargs.items()})
        if found is None or not kinds:
            return found
        many = found if isinstance(found, tuple) else (found,)
        kept = tuple(
            x.to(torch.float32 if kind is None else args[kind].dtype)
            if x.dtype == torch.float64
            else x
            for x, kind in zip(many, kinds, strict=True)
        )
        return kept if isinstance(found, tuple) else kept[0]

    return staticmethod(call)


_Ops = ReferenceDeviceOps


class DoubleDeviceOps(ReferenceDeviceOps):
    """See the module. Ops that only move or encode single values are the reference's own."""

    name = "reference-double-1"

    hadamard = _doubled(_Ops.hadamard, _SINGLE)
    quantize_index = _doubled(_Ops.quantize_index)
    round_index = _doubled(_Ops.round_index)
    norm_rope = _doubled(_Ops.norm_rope)
    norm_rope_quantize = _doubled(_Ops.norm_rope_quantize)
    rms_norm = _doubled(_Ops.rms_norm)
    rope = _doubled(_Ops.rope)
    linear = _doubled(_Ops.linear)
    compress_kv = _doubled(_Ops.compress_kv)
    compress_index = _doubled(_Ops.compress_index)
    mhc_pre = _doubled(_Ops.mhc_pre, _FIRST, _SINGLE, _SINGLE)
    mhc_post = _doubled(_Ops.mhc_post, _FIRST)
    mhc_boundary = _doubled(_Ops.mhc_boundary, _FIRST, _FIRST, _SINGLE, _SINGLE)
    mhc_head = _doubled(_Ops.mhc_head, _FIRST)
    moe_route = _doubled(_Ops.moe_route)
    swiglu = _doubled(_Ops.swiglu)
    moe_up = _doubled(_Ops.moe_up, _FIRST)
    moe_down = _doubled(_Ops.moe_down, _FIRST)
    moe_combine = _doubled(_Ops.moe_combine, _SECOND)
    sparse_attention = _doubled(_Ops.sparse_attention, _FIRST)
    dense_compressed_attention = _doubled(_Ops.dense_compressed_attention, _FIRST)
    decode_attention = _doubled(_Ops.decode_attention, _FIRST)
    entry_masses = _doubled(_Ops.entry_masses, _SINGLE)
    indexer_logits = _doubled(_Ops.indexer_logits, _SINGLE, _SINGLE)
    indexer_logits_paged = _doubled(_Ops.indexer_logits_paged, _SINGLE, _SINGLE)
