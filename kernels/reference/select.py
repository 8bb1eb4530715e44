"""Top-k selection with one meaning everywhere: ties go to the lowest index (deepseek-v4.md 2.4,
T15).

Shape suffixes: R rows, E entries, K selected slots.
"""

from __future__ import annotations

import torch
from torch import Tensor


def topk_lowest(scores_RE: Tensor, k: int) -> Tensor:
    """Indices [R, k] of the k largest, ascending by index; equal scores: the lower index wins."""
    entries = scores_RE.shape[1]
    if k >= entries:
        return torch.arange(entries).expand(scores_RE.shape[0], entries)
    values, index = scores_RE.topk(k, dim=1, sorted=False)
    threshold = values.amin(1, keepdim=True)
    tied = (scores_RE >= threshold).sum(1) > k
    if bool(tied.any()):
        rows = tied.nonzero()[:, 0]
        index[rows] = _topk_tied(scores_RE[rows], threshold[rows], k)
    return index.sort(1).values


def _topk_tied(scores_RE: Tensor, threshold_R1: Tensor, k: int) -> Tensor:
    """Among scores equal to the threshold a lower index ranks higher; fp32 holds 2^24 ranks."""
    entries = scores_RE.shape[1]
    if entries >= 1 << 24:
        raise ValueError(f"top-k over {entries} entries: at most {(1 << 24) - 1}")
    lower_first = torch.arange(entries, 0, -1, dtype=torch.float32)
    rank = torch.where(scores_RE == threshold_R1, lower_first, 0.0)
    rank.masked_fill_(scores_RE > threshold_R1, float(1 << 24))
    return rank.topk(k, dim=1, sorted=False).indices


def select_visible(scores_RE: Tensor, visible_R: Tensor, k: int) -> Tensor:
    """Selected entries [R, k] ascending, -1 in unused slots.

    Row r may see entries 0 .. visible_R[r] - 1; if those are at most k, all are selected. Scores of
    invisible entries must be -inf or absent.
    """
    slots = torch.arange(k)
    first = torch.where(slots < visible_R[:, None], slots, -1)
    if scores_RE.shape[1] <= k:
        return first
    return torch.where(visible_R[:, None] <= k, first, topk_lowest(scores_RE, k))
