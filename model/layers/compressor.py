"""Token compressor of CSA (overlapping, ratio 4) and HCA layers (deepseek-v4.md 2.3, 2.6).

Shape suffixes: R rows, N windows, S slots, C channels, X raw channels ([kv | score], both halves).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import ReferenceOps
from model.config import CSA_RATIO
from model.linear import Linear
from model.ranks.share import Share
from model.rows import Rows


@dataclass(frozen=True)
class NewEntries:
    """Entries that a pass completed: for span i, `counts[i]` rows from entry `firsts[i]` on."""

    values_NC: Tensor
    firsts: tuple[int, ...]
    counts: tuple[int, ...]
    ratio: int
    known: tuple[Tensor, ...]
    """Raw rows of each span: its carry before the pass, then the pass's own."""

    def store(
        self,
        rounded_NC: Tensor,
        targets: Sequence[Tensor],
        share: Share | None = None,
        *,
        attached: Sequence[int],
    ) -> None:
        """Write each span's (rounded) entries to its place in its cache; of a `share` those of all
        planes. Entries of the first `attached` tokens are there already and stay.
        """
        if share is not None:
            first, every = share.entries(rounded_NC, ratio=self.ratio)
            skip = min(max(attached[0] // self.ratio - first, 0), every.shape[0])
            targets[0][first + skip : first + every.shape[0]] = every[skip:]
            return
        at = 0
        spans = zip(targets, self.firsts, self.counts, attached, strict=True)
        for target, first, count, known in spans:
            skip = min(max(known // self.ratio - first, 0), count)
            target[first + skip : first + count] = rounded_NC[at + skip : at + count]
            at += count


class Compressor:
    """fp32 throughout. Carries are passed in and handed back, never kept."""

    def __init__(
        self,
        ops: ReferenceOps,
        *,
        ratio: int,
        project: Linear,
        ape: Tensor,
        norm_C: Tensor,
        freq_P: Tensor,
        norm_eps: float,
        dtype: torch.dtype,
    ) -> None:
        self._ops = ops
        self._ratio = ratio
        self._overlap = ratio == CSA_RATIO
        self._project = project
        self._norm_C, self._norm_eps = norm_C, norm_eps
        self._freq_P = freq_P
        self._dtype = dtype
        # The bias belongs to the score half only.
        self._bias_SX = torch.cat((torch.zeros_like(ape), ape), 1)

    def absorb(
        self, rows: Rows, x_RD: Tensor, carries: Sequence[Tensor]
    ) -> tuple[NewEntries, list[Tensor]]:
        """Entries of the windows that these rows complete, and the carries after them."""
        raw = self._project(x_RD.float())[: rows.count]
        raw = raw + self._bias_SX.index_select(0, rows.positions_R[: rows.count] % self._ratio)
        kv, score, kept, firsts, counts, known = [], [], [], [], [], []
        for span, carry in zip(rows.spans, carries, strict=True):
            first = span.position // self._ratio
            count = span.end // self._ratio - first
            before, after = carry, None
            if rows.share is not None:
                overlap = self._ratio if self._overlap else 0
                before, after = rows.share.carries(
                    carry, raw[span.rows], ratio=self._ratio, kept=overlap
                )
            every = torch.cat((before, raw[span.rows]))
            if count:
                slots = self._slots(every, count)
                kv.append(slots[0])
                score.append(slots[1])
            # A copy: a view would keep the whole chunk's rows alive.
            kept.append(every[count * self._ratio :].clone() if after is None else after)
            firsts.append(first)
            counts.append(count)
            known.append(every)
        values = self._finish(kv, score, firsts, counts)
        made = NewEntries(values, tuple(firsts), tuple(counts), self._ratio, tuple(known))
        return made, kept

    def _slots(self, every: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """kv and score [N, S, C] of `count` windows, slots in token order."""
        ratio, dim = self._ratio, self._norm_C.shape[0]
        length = count * ratio
        if not self._overlap:
            parts = every[:length].view(count, ratio, 2, dim)
            return parts[:, :, 0], parts[:, :, 1]
        # First half: the contribution to the next window's entry; second half: to its own.
        previous = every[:length].view(count, ratio, 2, 2, dim)[:, :, :, 0]
        current = every[ratio : ratio + length].view(count, ratio, 2, 2, dim)[:, :, :, 1]
        both = torch.cat((previous, current), 1)
        return both[:, :, 0], both[:, :, 1]

    def _finish(
        self, kv: list[Tensor], score: list[Tensor], firsts: list[int], counts: list[int]
    ) -> Tensor:
        """Pool, normalise and rotate to position entry * ratio (T13)."""
        total = sum(counts)
        if not total:
            return self._norm_C.new_zeros((0, self._norm_C.shape[0]))
        ops = self._ops
        pooled = ops.pool_windows(ops.pad_rows(torch.cat(kv)), ops.pad_rows(torch.cat(score)))
        entries = [torch.arange(first, first + n) for first, n in zip(firsts, counts, strict=True)]
        position = ops.pad_rows(torch.cat(entries)) * self._ratio
        cos_sin = ops.cos_sin(position, self._freq_P)
        return ops.norm_rotate(pooled.to(self._dtype), self._norm_C, *cos_sin, eps=self._norm_eps)
