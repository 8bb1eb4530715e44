"""Token compressor: the windows that a pass completes, pooled, normalised, rotated, rounded and
stored (deepseek-v4.md 2.3, 2.6).

Work is listed per completed window, not per token. The projections of earlier tokens come from a
carry: a ring over positions that already includes the positional bias in its score half.

Shape suffixes: T token rows, B windows, N sequences, S slots (ring positions), X raw channels
(kv | score, each with both halves if windows overlap), A channels of one of these, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.mxfp4 import quantize_index
from kernels.reference.pages import IndexPages, KvPages
from kernels.reference.quantize_kv import quantize_kv
from kernels.reference.wide import rms_scaled, rotated, wide


def compress(
    raw_TX: Tensor,
    carry_NSX: Tensor,
    windows_B4: Tensor,
    ape_SA: Tensor,
    norm_C: Tensor,
    cos_BP: Tensor,
    sin_BP: Tensor,
    *,
    eps: float,
) -> Tensor:
    """[B, C] entries before rounding to the row format; zeros for windows that are not there.

    `windows_B4` (int32) says for each window: the row of its last token in `raw_TX` (-1: nothing to
    do), how many rows before it belong to the same sequence, that token's position, and which carry
    is the sequence's. `ape_SA` is [ratio, A]; windows overlap if A is 2 C. `cos_BP` and `sin_BP`
    belong to the position of the window's own first token (T13). The pooled value is rounded to
    bfloat16 before the norm, as in the release.
    """
    ratio, channels = ape_SA.shape[0], norm_C.shape[0]
    half = ape_SA.shape[1]
    overlap = half == 2 * channels
    slots = ratio * 2 if overlap else ratio
    last, before, position, sequence = windows_B4.long().unbind(1)
    back = torch.arange(slots - 1, -1, -1, device=raw_TX.device)
    at = position[:, None] - back
    row = (last[:, None] - back).clamp_min(0)
    biased = wide(raw_TX).clone()[row]
    biased[..., half:] += ape_SA[at % ratio]
    kept = carry_NSX[sequence.clamp_min(0)[:, None], at % carry_NSX.shape[1]]
    every = torch.where((back <= before[:, None])[..., None], biased, kept.to(biased.dtype))
    kv, score = every[..., :half], every[..., half:]
    if overlap:
        kv = torch.cat((kv[:, :ratio, :channels], kv[:, ratio:, channels:]), 1)
        score = torch.cat((score[:, :ratio, :channels], score[:, ratio:, channels:]), 1)
    score = score.masked_fill((at < 0)[..., None], float("-inf"))
    pooled = (torch.softmax(score, 1) * kv.masked_fill((at < 0)[..., None], 0.0)).sum(1)
    normed = rms_scaled(pooled.to(torch.bfloat16).to(pooled.dtype), norm_C, eps=eps)
    return rotated(normed, cos_BP, sin_BP).masked_fill((last < 0)[:, None], 0.0)


def compress_kv(
    raw_TX: Tensor,
    carry_NSX: Tensor,
    windows_B4: Tensor,
    ape_SA: Tensor,
    norm_C: Tensor,
    cos_BP: Tensor,
    sin_BP: Tensor,
    slots_B: Tensor,
    pages_PB: Tensor,
    layout: KvPages,
    *,
    eps: float,
) -> None:
    """`compress`, rounded into attention pages; no window or slot -1: nothing."""
    entries = compress(raw_TX, carry_NSX, windows_B4, ape_SA, norm_C, cos_BP, sin_BP, eps=eps)
    slots = torch.where(windows_B4[:, 0] < 0, -1, slots_B)
    quantize_kv(entries, slots, pages_PB, layout)


def compress_index(
    raw_TX: Tensor,
    carry_NSX: Tensor,
    windows_B4: Tensor,
    ape_SA: Tensor,
    norm_C: Tensor,
    cos_BP: Tensor,
    sin_BP: Tensor,
    matrix_CC: Tensor,
    slots_B: Tensor,
    pages_PB: Tensor,
    layout: IndexPages,
    *,
    eps: float,
) -> None:
    """`compress`, then the Hadamard rotation and FP4 rounding into index pages."""
    entries = compress(raw_TX, carry_NSX, windows_B4, ape_SA, norm_C, cos_BP, sin_BP, eps=eps)
    slots = torch.where(windows_B4[:, 0] < 0, -1, slots_B)
    quantize_index(entries, matrix_CC, slots, pages_PB, layout)


def keep_carry(raw_TX: Tensor, carry_NSX: Tensor, spans_B4: Tensor, ape_SA: Tensor) -> None:
    """Write each sequence's newest rows into its ring, in place, after all of its windows.

    `spans_B4` (int32): first row in `raw_TX`, number of rows (0: none), the first row's position,
    and which carry is the sequence's: no two rows name one. Of more rows than the ring holds, the
    last are kept.
    """
    if not raw_TX.shape[0]:
        return
    ring, half = carry_NSX.shape[1], ape_SA.shape[1]
    slot = torch.arange(ring, device=raw_TX.device)
    first, count, start, carry = spans_B4.long().unbind(1)
    end = start + count
    # The newest position that falls on each slot of the ring.
    newest = end[:, None] - 1 - (end[:, None] - 1 - slot) % ring
    row = first[:, None] + newest - start[:, None]
    fresh = raw_TX[row.clamp(0, max(raw_TX.shape[0] - 1, 0))].clone()
    fresh[..., half:] += ape_SA[newest % ape_SA.shape[0]]
    known = ((newest >= start[:, None]) & (count > 0)[:, None])[..., None]
    carry_NSX[carry] = torch.where(known, fresh.to(carry_NSX.dtype), carry_NSX[carry])
