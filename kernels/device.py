"""The ops at the granularity that a GPU engine calls: one launch or a few, whole row formats.

`ReferenceDeviceOps` is their meaning in plain torch on any device (and in float64 where values are
not bytes); `kernels.triton.ops.TritonDeviceOps` overrides each with a kernel of the same name and
signature. The CPU engine's finer ops are in `kernels.ops`.
"""

from __future__ import annotations

from kernels.reference import compress, mhc_fused, mxfp4
from kernels.reference import decode_attention as decoding
from kernels.reference import entry_masses as evidence
from kernels.reference import hadamard as signs
from kernels.reference import indexer_logits as indexer
from kernels.reference import linear as products
from kernels.reference import moe_grouped as moe
from kernels.reference import moe_route as router
from kernels.reference import norm_rope as turning
from kernels.reference import quantize_kv as kv_rows
from kernels.reference import sample as sampling
from kernels.reference import sparse_attention as attention
from kernels.reference import topk_blocks as selection


class ReferenceDeviceOps:
    """Plain torch; `name` is part of the fingerprint."""

    name = "reference-1"
    captures = False
    """Whether a CUDA graph may record these ops: they must not look at their data."""

    quantize_kv = staticmethod(kv_rows.quantize_kv)
    dequantize_gather = staticmethod(kv_rows.dequantize_gather)
    hadamard = staticmethod(signs.hadamard)
    mxfp4_encode = staticmethod(mxfp4.mxfp4_encode)
    mxfp4_decode = staticmethod(mxfp4.mxfp4_decode)
    quantize_index = staticmethod(mxfp4.quantize_index)
    round_index = staticmethod(mxfp4.round_index)
    norm_rope = staticmethod(turning.norm_rope)
    norm_rope_quantize = staticmethod(turning.norm_rope_quantize)
    rms_norm = staticmethod(turning.rms_norm)
    rope = staticmethod(turning.rope)
    linear = staticmethod(products.linear)
    compress_kv = staticmethod(compress.compress_kv)
    compress_index = staticmethod(compress.compress_index)
    keep_carry = staticmethod(compress.keep_carry)
    mhc_pre = staticmethod(mhc_fused.mhc_pre)
    mhc_post = staticmethod(mhc_fused.mhc_post)
    mhc_boundary = staticmethod(mhc_fused.mhc_boundary)
    mhc_head = staticmethod(mhc_fused.mhc_head)
    moe_route = staticmethod(router.moe_route)
    swiglu = staticmethod(router.swiglu)
    moe_plan = staticmethod(moe.moe_plan)
    quantize_rows = staticmethod(moe.quantize_rows)
    round_rows = staticmethod(moe.round_rows)
    moe_up = staticmethod(moe.moe_up)
    moe_down = staticmethod(moe.moe_down)
    moe_combine = staticmethod(moe.moe_combine)
    sample = staticmethod(sampling.sample)
    sparse_attention = staticmethod(attention.sparse_attention)
    dense_compressed_attention = staticmethod(attention.dense_compressed_attention)
    decode_attention = staticmethod(decoding.decode_attention)
    entry_masses = staticmethod(evidence.entry_masses)
    gather_index = staticmethod(indexer.gather_index)
    indexer_logits = staticmethod(indexer.indexer_logits)
    indexer_logits_paged = staticmethod(indexer.indexer_logits_paged)
    topk_blocks = staticmethod(selection.topk_blocks)
