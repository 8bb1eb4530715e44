"""Attention of generated tokens straight over the paged FP8 cache (deepseek-v4.md 2.5, 3.1).

Shape suffixes: R rows (tokens), H heads, C channels, P pages or rotated pairs, B bytes of a page,
W and K list slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.pages import KvPages
from kernels.reference.quantize_kv import dequantize_gather
from kernels.reference.sparse_attention import CHUNK, attend
from kernels.reference.wide import wide


def decode_attention(
    q_RHC: Tensor,
    window_PB: Tensor,
    window_slots_RW: Tensor,
    window_layout: KvPages,
    entries_PB: Tensor,
    entry_slots_RK: Tensor,
    entry_layout: KvPages,
    sink_H: Tensor,
    cos_RP: Tensor,
    sin_RP: Tensor,
    *,
    scale: float,
    chunk: int = CHUNK,
    tile_heads: int | None = None,
) -> Tensor:
    """[R, H, C] in q's dtype: row r attends to its window slots and then its entry slots.

    Slots are int32 physical rows of the two caches, -1 for none; W and K are multiples of 64 (K may
    be 0), so the lists of a bucket have one width. Rows and products are in q's dtype, float16 or
    bfloat16. `chunk` keys are one unit of work and of summation: a smaller one is faster for few
    tokens. `tile_heads` (16 or 32; default: the heads, at most 32) are one unit's heads. Both set
    the order of summation alone. Who must repeat a prompt's sums bit for bit gathers the rows
    (`dequantize_gather`) and calls `sparse_attention`, and so shares its tile.
    """
    del chunk, tile_heads  # they set the order of summation, not the meaning
    q = wide(q_RHC)
    slots = torch.cat((window_slots_RW, entry_slots_RK), 1)
    lists = (
        (window_PB, window_slots_RW, window_layout),
        (entries_PB, entry_slots_RK, entry_layout),
    )
    kv = [
        dequantize_gather(pages, each.reshape(-1), layout, dtype=q.dtype).view(*each.shape, -1)
        for pages, each, layout in lists
        if each.shape[1]
    ]
    out = attend(q, torch.cat(kv, 1), slots < 0, sink_H, cos_RP, sin_RP, scale=scale)
    return out.to(q_RHC.dtype)
