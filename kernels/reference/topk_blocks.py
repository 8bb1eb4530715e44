"""Exact selection of the k best entries of long score rows (deepseek-v4.md 2.4, T15).

The order is total: a larger score first, -0.0 equal to 0.0, nan below -inf, and among equals the
lower index. Exact ties are the normal case, since the scores of many entries are exactly 0.

Shape suffixes: R rows, E entries, N blocks of 32 entries, K selected slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_blocks(scores_RE: Tensor, maxima_RN: Tensor, visible_R: Tensor, k: int) -> Tensor:
    """Selected entries int32 [R, k], ascending, -1 in unused slots at the end.

    Row r may select entries below visible_R[r]; if those are at most k, all are selected. `maxima`
    are those of the scores' blocks of 32, nan passed over (`indexer_logits`): the k blocks that are
    best by (maximum, lower index) hold the k best entries, so a kernel reads no others.
    """
    del maxima_RN  # they shorten the way to the same answer
    entry = torch.arange(scores_RE.shape[1], device=scores_RE.device)
    # Three classes below the numbers: nan, then what may not be selected.
    unseen = (entry >= visible_R[:, None]).to(torch.int32) * 2
    worse = torch.maximum(unseen, scores_RE.isnan().to(torch.int32))
    value = torch.where(worse > 0, float("-inf"), scores_RE)
    order = value.sort(dim=1, descending=True, stable=True).indices
    best = order.gather(1, worse.gather(1, order).sort(dim=1, stable=True).indices)[:, :k]
    best = torch.where(best < visible_R[:, None], best, scores_RE.shape[1]).sort(1).values
    best = torch.where(best < scores_RE.shape[1], best, -1).to(torch.int32)
    return torch.nn.functional.pad(best, (0, k - best.shape[1]), value=-1)
