"""`UnpaddedOps`: the reference without the shapes that class `exact` pays for.

Rows are not padded to 16, and a single token's window is not a tile of 16 queries. A row's last
bits may then depend on its company, which class `fast` allows.

Shape suffixes: R rows, H heads, C channels, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.reference.attend import AttendSpan
from kernels.reference.lanes import pad_rows
from kernels.reference.ops import ReferenceOps


class UnpaddedOps(ReferenceOps):
    """See the module."""

    name = "unpadded-2"
    row_multiple = 1

    def pad_rows(self, x: Tensor, *, multiple: int = 1) -> Tensor:
        return pad_rows(x, multiple=multiple)

    def attend(
        self,
        q_RHC: Tensor,
        spans: Sequence[AttendSpan],
        sink_H: Tensor,
        *,
        window: int,
        ratio: int,
        picked_RK: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As the reference's; spans of one token each are one small product apiece."""
        if any(span.count > 1 for span in spans):
            return super().attend(
                q_RHC,
                spans,
                sink_H,
                window=window,
                ratio=ratio,
                picked_RK=picked_RK,
                scale=scale,
            )
        found = [
            _attend_one(q_RHC[span.row], _keys(span, window, ratio, picked_RK), sink_H, scale)
            for span in spans
        ]
        out, top, norm = (torch.stack(parts) for parts in zip(*found, strict=True))
        return out, top, norm


def _keys(span: AttendSpan, window: int, ratio: int, picked_RK: Tensor | None) -> Tensor:
    """[K, C]: all that one token sees, window first."""
    known = span.history_NC[-min(window, span.position + 1) :]
    if picked_RK is not None:
        picked = picked_RK[span.row]
        return torch.cat((known, span.entries_EC.index_select(0, picked[picked >= 0])))
    if ratio:
        return torch.cat((known, span.entries_EC[: (span.position + 1) // ratio]))
    return known


def _attend_one(
    q_HC: Tensor, keys_KC: Tensor, sink_H: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output [H, C], maximum [H] and denominator [H] of one token's softmax with the sink."""
    score = torch.mm(q_HC, keys_KC.t()).mul_(scale)
    top = torch.maximum(score.amax(-1), sink_H)
    weight = torch.exp(score - top[:, None])
    norm = weight.sum(-1) + torch.exp(sink_H - top)
    return torch.mm(weight, keys_KC) / norm[:, None], top, norm
