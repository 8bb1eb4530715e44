"""How much attention each key of a list gets: the evidence behind a prediction.

Shape suffixes: R rows (tokens), H heads, C channels, N rows of a buffer, K list slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.wide import wide


def entry_masses(
    q_RHC: Tensor, kv_NC: Tensor, index_RK: Tensor, sink_H: Tensor, *, scale: float
) -> Tensor:
    """[R, K] fp32: attention probability of each slot of a list, averaged over the heads; 0 for -1.

    The softmax is that of `sparse_attention` with the same arguments, its sink included.
    """
    q = wide(q_RHC)
    kv = wide(kv_NC[index_RK.clamp_min(0).long()]).to(q.dtype)
    hidden = index_RK < 0
    score = torch.einsum("rhc,rkc->rhk", q, kv) * scale
    score = score.masked_fill(hidden[:, None, :], float("-inf"))
    sink = sink_H.to(q.dtype)[None, :, None].expand(q.shape[0], -1, 1)
    weight = torch.softmax(torch.cat((score, sink), 2), 2)[:, :, :-1]
    return weight.mean(1).to(torch.float32)
