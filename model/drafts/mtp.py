"""The MTP block of the preview and base checkpoints (deepseek-v4.md 1.6).

Row j reads the backbone's streams X_j and the embedding of token j + 1, stands at position j, and
predicts token j + 2. So after p tokens the block's window holds the rows up to p - 2: the row p - 1
needs the token that is drawn next, and is the first row of a draft. A further draft token comes
from the same block, fed with its own output streams in the place of X.

In the cache the block's window is like any other, one row earlier: the slot of token i holds row
i - 1, and that of token 0 is empty (zeros, never visible). With it goes X of the last token.

Shape suffixes: R rows, S streams, D model width, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model.cache import LayerCache
from model.drafts.drafter import Asked, Parts
from model.rows import Rows, Span


class MtpDrafter:
    """See `Drafter`."""

    def __init__(self, parts: Parts) -> None:
        self._p, self._block = parts, parts.blocks[0]
        self._e_proj = parts.linear("0.e_proj.weight")
        self._h_proj = parts.linear("0.h_proj.weight")
        self._enorm_D = parts.vector("0.enorm.weight")
        self._hnorm_D = parts.vector("0.hnorm.weight")

    @property
    def taps(self) -> frozenset[int]:
        return frozenset({self._p.first_layer - 1})

    @property
    def tail(self) -> int:
        # A whole window, and the streams that its oldest row reads.
        return self._p.window + 1

    def absorb(self, rows: Rows, tapped: Mapping[int, Tensor], tokens_R: Tensor) -> None:
        p = self._p
        (streams,) = tapped.values()
        inputs, spans, following, row = [], [], [], 0
        for span in rows.spans:
            own, cache = streams[span.rows], span.cache
            first = span.position
            if 0 < first == cache.position:
                first -= 1
                assert cache.streams_SD is not None
                own = torch.cat((cache.streams_SD[None].to(own.dtype), own))
            count = own.shape[0] - 1
            inputs.append(own[:count])
            following.append(tokens_R[span.row + span.count - count : span.row + span.count])
            if count:
                spans.append(Span(cache, row, count, first))
            row += count
        kv = streams.new_zeros((0, 0))
        if row:
            mixed = self._mix(torch.cat(inputs), torch.cat(following))
            kv = self._block.window_rows(mixed, Rows(spans, window=p.window, ops=p.ops))
        self._store(rows, streams, [part.shape[0] for part in inputs], kv)

    def _store(self, rows: Rows, streams: Tensor, counts: Sequence[int], kv_RC: Tensor) -> None:
        """New window rows and last streams to the caches."""
        row = 0
        for span, count in zip(rows.spans, counts, strict=True):
            cache, new = span.cache, kv_RC[row : row + count]
            layer = cache.layers[self._p.first_layer]
            if not cache.position and span.position == 0:
                empty = layer.window_WC.new_zeros((1, layer.window_WC.shape[1]))
                new = torch.cat((empty, new)) if count else empty
            layer.push(new)
            cache.streams_SD = streams[span.row + span.count - 1].clone()
            if cache.trail is not None:
                cache.trail.streams_RSD = streams[span.rows]
            row += count

    def draft(self, asked: Sequence[Asked]) -> list[list[int]]:
        p = self._p
        drafts: list[list[int]] = [[] for _ in asked]
        caches = [item.cache.layers[p.first_layer].fork() for item in asked]
        tokens = [item.request.token for item in asked]
        kept = [item.cache.streams_SD for item in asked]
        streams = torch.stack([x.to(p.dtype) for x in kept if x is not None])
        active = list(range(len(asked)))
        while active:
            out = self._step(
                streams[: len(active)],
                [tokens[i] for i in active],
                [asked[i].cache.position - 1 + len(drafts[i]) for i in active],
                [caches[i] for i in active],
                [asked[i] for i in active],
            )
            logits = p.logits(p.head(p.ops, out)[: len(active)])
            for row, i in enumerate(active):
                tokens[i] = asked[i].draw(logits[row], len(drafts[i]))
                drafts[i].append(tokens[i])
            left = [r for r, i in enumerate(active) if len(drafts[i]) < asked[i].request.count]
            active = [active[row] for row in left]
            streams = out[left]
        return drafts

    def _step(
        self,
        streams_RSD: Tensor,
        tokens: Sequence[int],
        positions: Sequence[int],
        caches: Sequence[LayerCache],
        asked: Sequence[Asked],
    ) -> Tensor:
        """One row for each; the block's output streams [R, S, D], padded."""
        ids = torch.tensor(tokens)
        spans = [
            Span(item.cache, row, 1, position)
            for row, (item, position) in enumerate(zip(asked, positions, strict=True))
        ]
        out, _ = self._block(
            self._mix(streams_RSD, ids),
            Rows(spans, window=self._p.window, ops=self._p.ops),
            ids,
            caches=caches,
        )
        return out

    def _mix(self, streams_RSD: Tensor, tokens_R: Tensor) -> Tensor:
        """X' of 1.6: the token's embedding and each stream, both normalised and projected."""
        p = self._p
        width = streams_RSD.shape[2]
        e = p.ops.pad_rows(self._norm(p.embed(tokens_R), self._enorm_D))
        x = p.ops.pad_rows(streams_RSD).reshape(-1, width)
        h = self._h_proj(self._norm(x, self._hnorm_D)).view(-1, p.streams, width)
        return self._e_proj(e)[:, None, :] + h

    def _norm(self, x_RD: Tensor, weight_D: Tensor) -> Tensor:
        return self._p.ops.rms_norm(x_RD, weight_D, eps=self._p.norm_eps).to(x_RD.dtype)
