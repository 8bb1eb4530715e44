"""Lightning indexer scores (deepseek-v4.md 2.4, T16).

Shape suffixes: R rows, H index heads, C channels, E entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.lanes import pad_rows

KEY_TILE = 1024


def index_scores(
    q_RHC: Tensor,
    weight_RH: Tensor,
    keys_EC: Tensor,
    visible_R: Tensor,
    *,
    key_tile: int = KEY_TILE,
) -> Tensor:
    """score[r, e] = sum over heads of weight * relu(q . k), -inf where e >= visible_R[r]; fp32.

    Keys are walked in tiles of fixed size (E is a multiple of the tile: zero rows at the end) and
    heads are added in order, so a score does not depend on how many keys or rows there are.
    """
    rows, heads, channels = q_RHC.shape
    entries = keys_EC.shape[0]
    q = pad_rows(q_RHC.transpose(0, 1).reshape(heads * rows, channels))
    weight = weight_RH.t().contiguous()[:, :, None]
    scores = q.new_empty((rows, entries))
    for start in range(0, entries, key_tile):
        product = torch.mm(q, keys_EC[start : start + key_tile].t())[: heads * rows]
        part = product.relu_().view(heads, rows, -1)
        part *= weight
        total = part[0]
        for head in range(1, heads):
            total += part[head]
        scores[:, start : start + key_tile] = total
    first_hidden = int(visible_R.min()) if rows else 0
    hidden = torch.arange(first_hidden, entries) >= visible_R[:, None]
    scores[:, first_hidden:].masked_fill_(hidden, float("-inf"))
    return scores
