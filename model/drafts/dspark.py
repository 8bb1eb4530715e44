"""DSpark, the draft module of the 0731 and 0813 checkpoints (deepseek-v4.md 1.7, T21).

A context feature c_j is made of the backbone's hidden states at token j: the *mean over the
streams* of each target layer's output, concatenated, `main_proj`, `main_norm`. (The specification
leaves open what the hidden state of a layer of four streams is; three independent ports read the
released code as the mean of the layer's output.) Each stage keeps a window of the features' keys,
made by its own attention straight from c_j; nothing else of a sequence is kept.

A draft is one parallel pass over a block of `dspark_block_size` rows, at the positions of the
pending token and of those after it: the pending token's embedding, then the noise token's. Every
row sees the whole window before the block and all of the block. Row i predicts the token after its
position: the last stage's logits plus a bias that the Markov head gives to the token before,
drawn in order. The confidence head (fp32) judges each from the collapsed row and the Markov
embedding of the token before.

Shape suffixes: R rows, S streams, D model width, K Markov rank, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from model.config import DraftConfig
from model.drafts.drafter import Asked, Parts
from model.drafts.plan import DraftPlan
from model.rows import Rows, Span


class DsparkDrafter:
    """See `Drafter`."""

    def __init__(self, parts: Parts, config: DraftConfig, plan: DraftPlan) -> None:
        self._p, self._c, self._plan = parts, config, plan
        last = f"{config.stages - 1}."
        self._main_proj = parts.linear("0.main_proj.weight")
        self._main_norm_D = parts.vector("0.main_norm.weight")
        self._markov_in_VK = parts.vector(last + "markov_head.markov_w1.weight")
        self._markov_out = parts.linear(last + "markov_head.markov_w2.weight")
        self._confidence = parts.vector(last + "confidence_head.proj.weight")[0]

    @property
    def taps(self) -> frozenset[int]:
        return frozenset(self._c.target_layers)

    @property
    def tail(self) -> int:
        return self._p.window

    def absorb(self, rows: Rows, tapped: Mapping[int, Tensor], tokens_R: Tensor) -> None:
        p = self._p
        wide = torch.cat([_mean(tapped[layer]) for layer in self._c.target_layers], 1)
        x = self._main_proj(p.ops.pad_rows(wide))
        features = p.ops.rms_norm(x, self._main_norm_D, eps=p.norm_eps).to(x.dtype)
        for stage, block in enumerate(p.blocks):
            kv = block.context_rows(features, rows)
            for span in rows.spans:
                span.cache.layers[p.first_layer + stage].push(kv[span.rows])

    def draft(self, asked: Sequence[Asked]) -> list[list[int]]:
        p, size = self._p, self._c.block_size
        noise = [self._c.noise_token] * (size - 1)
        ids = torch.tensor([t for item in asked for t in (item.request.token, *noise)])
        spans = [
            Span(item.cache, row * size, size, item.cache.position)
            for row, item in enumerate(asked)
        ]
        rows = Rows(spans, window=p.window, ops=p.ops)
        streams = p.ops.pad_rows(p.embed(ids)[:, None, :].repeat(1, p.streams, 1))
        for stage, block in enumerate(p.blocks):
            caches = [item.cache.layers[p.first_layer + stage] for item in asked]
            streams = block.around(streams, rows, ids, caches)
        x = p.head.collapse(p.ops, streams)
        logits = p.logits(p.head.norm(p.ops, x)[: rows.count])
        return [
            self._speak(item, x[span.rows], logits[span.rows])
            for item, span in zip(asked, spans, strict=True)
        ]

    def _speak(self, item: Asked, x_RD: Tensor, logits_RV: Tensor) -> list[int]:
        """Draw in order, each token biased by the one before, until the head loses confidence."""
        drafts: list[int] = []
        token = item.request.token
        for index in range(item.request.count):
            markov_K = self._markov_in_VK[token]
            sure = torch.cat((x_RD[index].float(), markov_K)) @ self._confidence
            if float(torch.sigmoid(sure)) < self._plan.confidence:
                break
            bias_RV = self._markov_out(self._p.ops.pad_rows(markov_K[None]))
            token = item.draw(logits_RV[index] + bias_RV[0].float(), index)
            drafts.append(token)
        return drafts


def _mean(streams_RSD: Tensor) -> Tensor:
    """[R, D] mean over the streams in fp32, in order, rounded to their type."""
    total = streams_RSD[:, 0].float()
    for stream in streams_RSD.unbind(1)[1:]:
        total = total + stream.float()
    return (total / streams_RSD.shape[1]).to(streams_RSD.dtype)
