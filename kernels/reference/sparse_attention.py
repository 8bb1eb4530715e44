"""Attention of prompt tokens over gathered rows: the window with selected entries (CSA), and the
window with all entries (HCA) (deepseek-v4.md 2.5, T12).

The keys of a token form one list: its window (slot i is position t - window + 1 + i, absent before
position 0), then its entries, ascending. A row is both key and value. The sink adds exp(sink) to
the denominator and has no value. The output's last 2 P channels are rotated back by the token's
angles (2.1), since rotated rows were summed.

Shape suffixes: R rows (tokens), H heads, C channels, N rows of a buffer, K list slots, P
rotated pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.wide import rotated, wide

# Keys of one list that are folded into one running softmax; longer lists are folded chunk by chunk
# and the chunks joined in order. It is part of the numbers: the window and 1,024 entries.
CHUNK = 1152


def attend(
    q_RHC: Tensor,
    kv_RKC: Tensor,
    hidden_RK: Tensor,
    sink_H: Tensor,
    cos_RP: Tensor,
    sin_RP: Tensor,
    *,
    scale: float,
) -> Tensor:
    """[R, H, C] in the precision of `wide(q)`: one softmax of each row over its own keys."""
    q, kv = wide(q_RHC), wide(kv_RKC).to(wide(q_RHC).dtype)
    kv = kv.masked_fill(hidden_RK[:, :, None], 0.0)
    score = torch.einsum("rhc,rkc->rhk", q, kv) * scale
    score = score.masked_fill(hidden_RK[:, None, :], float("-inf"))
    sink = sink_H.to(q.dtype)[None, :, None].expand(q.shape[0], -1, 1)
    weight = torch.softmax(torch.cat((score, sink), 2), 2)[:, :, :-1]
    return rotated(torch.einsum("rhk,rkc->rhc", weight, kv), cos_RP, sin_RP, inverse=True)


def sparse_attention(
    q_RHC: Tensor,
    kv_NC: Tensor,
    index_RK: Tensor,
    sink_H: Tensor,
    cos_RP: Tensor,
    sin_RP: Tensor,
    *,
    scale: float,
) -> Tensor:
    """[R, H, C] in q's dtype: row r attends to the rows index_RK[r] of `kv`; -1 means none.

    q and kv have one dtype: float16 (e4m3 rows of normed values fit it) or bfloat16. `index` is
    int32, `sink` and the angles are fp32. A row without any key is 0.
    """
    kv = kv_NC[index_RK.clamp_min(0).long()]
    out = attend(q_RHC, kv, index_RK < 0, sink_H, cos_RP, sin_RP, scale=scale)
    return out.to(q_RHC.dtype)


def dense_compressed_attention(
    q_RHC: Tensor,
    kv_NC: Tensor,
    sink_H: Tensor,
    cos_RP: Tensor,
    sin_RP: Tensor,
    *,
    position: int,
    entries_at: int,
    window: int,
    ratio: int,
    scale: float,
    chunk: int = CHUNK,
) -> Tensor:
    """[R, H, C] in q's dtype for R consecutive tokens of one sequence, the first at `position`.

    `kv_NC` holds window rows of consecutive positions, the last (position + R - 1) in row
    `entries_at` - 1, and then the sequence's entries. The token at t sees positions
    max(0, t - window + 1) to t and entries j < (t + 1) // ratio. `chunk` (a multiple of 64, not
    less than `window`) sets the order of summation, not the meaning.
    """
    rows = q_RHC.shape[0]
    t_R = position + torch.arange(rows, device=q_RHC.device)
    place_RK = t_R[:, None] - window + 1 + torch.arange(window, device=q_RHC.device)
    row_RK = (place_RK - (position + rows) + entries_at).clamp_min(0)
    entry = torch.arange(int((position + rows) // ratio), device=q_RHC.device)
    hidden = torch.cat((place_RK < 0, entry >= ((t_R + 1) // ratio)[:, None]), 1)
    own = kv_NC[row_RK]
    heavy = kv_NC[entries_at + entry].expand(rows, -1, -1)
    kv = torch.cat((own, heavy), 1)
    out = attend(q_RHC, kv, hidden, sink_H, cos_RP, sin_RP, scale=scale)
    return out.to(q_RHC.dtype)
