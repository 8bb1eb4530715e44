"""The network on one rank: embedding, blocks, head (deepseek-v4.md 1.3), built from checked
weights.

Shape suffixes: R rows, S streams, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.ops import ReferenceOps
from model.codec import RowCodec
from model.config import CSA_RATIO, ModelConfig
from model.layers.attention import Attention, AttentionWeights
from model.layers.block import Block, HyperConnection, Wanted
from model.layers.compressor import Compressor
from model.layers.indexer import Indexer
from model.layers.moe import Expert, Moe, Router
from model.linear import Linear
from model.rows import Rows, Span


@dataclass(frozen=True)
class Chunk:
    """Consecutive tokens of one sequence, as a span of rows."""

    span: Span
    tokens: Sequence[int]


class Network:
    """Forward over the rows of several sequences; caches are updated in place."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: dict[str, Tensor],
        *,
        ops: ReferenceOps,
        codec: RowCodec,
        dtype: torch.dtype,
        row_tile: int | None,
    ) -> None:
        self._config, self._ops, self._codec, self._dtype = config, ops, codec, dtype
        self._tensors, self._row_tile = tensors, row_tile
        self._embed_VD = tensors["embed.weight"].to(dtype)
        self._head = Linear(tensors["head.weight"].float(), row_tile)
        self._norm_D = tensors["norm.weight"].float()
        self._hc_head = [tensors[f"hc_head_{part}"].float() for part in ("fn", "scale", "base")]
        self._freqs: dict[bool, Tensor] = {}
        self._blocks = [self._block(layer) for layer in range(config.layers)]
        self._tensors = {}

    def forward(self, chunks: Sequence[Chunk], *, every: bool = False) -> Tensor:
        """Absorb one pass. Afterwards every sequence's position, last row and evidence are set.

        Returns collapsed and normalised rows fp32: of each chunk's last token, or of every token
        (which a sequence that leaves a trail needs).
        """
        c = self._config
        rows = Rows([chunk.span for chunk in chunks], window=c.window)
        tokens = torch.tensor([token for chunk in chunks for token in chunk.tokens])
        index, last = rows.last_of_each()
        wanted = Wanted(index, last)
        embedded = self._embed_VD.index_select(0, tokens)
        streams = self._ops.pad_rows(embedded[:, None, :].repeat(1, c.streams, 1))
        for layer, block in enumerate(self._blocks):
            streams, attended = block(
                streams,
                rows,
                tokens,
                wanted=None if every or layer < c.layers - 1 else wanted,
                evidence_rows=_evidence_rows(rows) if layer == c.last_csa_layer else None,
            )
            if attended.evidence is not None:
                _hand_evidence(rows, attended.evidence)
        hidden = self._collapse(streams)
        lasts = index.tolist() if every else range(len(rows.spans))
        for row, span in zip(lasts, rows.spans, strict=True):
            span.cache.hidden_D = hidden[row].clone()
            span.cache.position = span.end
            if span.cache.trail is not None:
                span.cache.trail.hidden_RD = hidden[span.rows]
        return hidden

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] fp32 of collapsed and normalised rows."""
        return self._head(self._ops.pad_rows(hidden_RD))[: hidden_RD.shape[0]]

    def _collapse(self, streams_RSD: Tensor) -> Tensor:
        """Head collapse (4.4) and final norm; rounded to the activation type, kept as fp32."""
        c, (fn, scale, base) = self._config, self._hc_head
        x = self._ops.head_collapse(
            streams_RSD, fn, scale, base, norm_eps=c.norm_eps, eps=c.hc_eps
        ).to(self._dtype)
        normed = self._ops.rms_norm(x, self._norm_D, eps=c.norm_eps)
        return normed.to(self._dtype).float()

    def _linear(self, *names: str, dtype: torch.dtype | None = None) -> Linear:
        """Several weights stacked along their outputs make one product."""
        parts = [self._tensors[name].to(dtype or self._dtype) for name in names]
        return Linear(torch.cat(parts).contiguous(), self._row_tile)

    def _vector(self, name: str) -> Tensor:
        return self._tensors[name].float()

    def _freq(self, layer: int) -> Tensor:
        """One table per kind of layer: rows cache their angles by table."""
        compressed = self._config.ratios[layer] > 0
        if compressed not in self._freqs:
            yarn = self._config.yarn_of(layer)
            scaling = None if yarn is None else vars(yarn)
            self._freqs[compressed] = self._ops.frequencies(
                self._config.rope_dim, self._config.theta(layer), scaling
            )
        return self._freqs[compressed]

    def _block(self, layer: int) -> Block:
        name = f"layers.{layer}."
        return Block(
            self._ops,
            layer,
            attention=self._attention(layer, name + "attn."),
            moe=self._moe(layer, name + "ffn."),
            attn_hc=self._hyper(name + "hc_attn"),
            ffn_hc=self._hyper(name + "hc_ffn"),
            attn_norm_D=self._vector(name + "attn_norm.weight"),
            ffn_norm_D=self._vector(name + "ffn_norm.weight"),
            norm_eps=self._config.norm_eps,
        )

    def _hyper(self, name: str) -> HyperConnection:
        c = self._config
        return HyperConnection(
            fn=self._vector(name + "_fn").contiguous(),
            base=self._vector(name + "_base"),
            scale=self._vector(name + "_scale"),
            streams=c.streams,
            iters=c.sinkhorn_iters,
            eps=c.hc_eps,
            norm_eps=c.norm_eps,
        )

    def _attention(self, layer: int, name: str) -> Attention:
        c, ratio = self._config, self._config.ratios[layer]
        groups = self._linear(name + "wo_a.weight").weight_NK.chunk(c.o_groups)
        weights = AttentionWeights(
            wq_a=self._linear(name + "wq_a.weight"),
            q_norm_Q=self._vector(name + "q_norm.weight"),
            wq_b=self._linear(name + "wq_b.weight"),
            wkv=self._linear(name + "wkv.weight"),
            kv_norm_C=self._vector(name + "kv_norm.weight"),
            wo_a=tuple(Linear(part.contiguous(), self._row_tile) for part in groups),
            wo_b=self._linear(name + "wo_b.weight"),
            sink_H=self._vector(name + "attn_sink"),
            freq_P=self._freq(layer),
        )
        indexer = None
        if ratio == CSA_RATIO:
            indexer = Indexer(
                self._ops,
                self._codec,
                compressor=self._compressor(layer, name + "indexer.compressor."),
                wq_b=self._linear(name + "indexer.wq_b.weight"),
                weights_proj=self._linear(name + "indexer.weights_proj.weight"),
                heads=c.index_heads,
                dim=c.index_dim,
                topk=c.index_topk,
            )
        return Attention(
            self._ops,
            self._codec,
            weights,
            ratio=ratio,
            heads=c.heads,
            head_dim=c.head_dim,
            topk=c.index_topk,
            norm_eps=c.norm_eps,
            compressor=self._compressor(layer, name + "compressor.") if ratio else None,
            indexer=indexer,
        )

    def _compressor(self, layer: int, name: str) -> Compressor:
        return Compressor(
            self._ops,
            ratio=self._config.ratios[layer],
            project=self._linear(name + "wkv.weight", name + "wgate.weight", dtype=torch.float32),
            ape=self._vector(name + "ape"),
            norm_C=self._vector(name + "norm.weight"),
            freq_P=self._freq(layer),
            norm_eps=self._config.norm_eps,
            dtype=self._dtype,
        )

    def _moe(self, layer: int, name: str) -> Moe:
        c, hashed = self._config, layer < self._config.hash_layers
        router = Router(
            gate=self._linear(name + "gate.weight", dtype=torch.float32),
            bias_E=None if hashed else self._vector(name + "gate.bias"),
            table_VK=self._tensors[name + "gate.tid2eid"].long() if hashed else None,
        )
        return Moe(
            self._ops,
            router,
            [self._expert(f"{name}experts.{e}.") for e in range(c.experts)],
            self._expert(name + "shared_experts."),
            active=c.active_experts,
            route_scale=c.route_scale,
            limit=c.swiglu_limit,
        )

    def _expert(self, name: str) -> Expert:
        return Expert(
            w13=self._linear(name + "w1.weight", name + "w3.weight"),
            w2=self._linear(name + "w2.weight"),
        )


def _evidence_rows(rows: Rows) -> list[int]:
    """Each span's last row, or all rows of a sequence that leaves a trail."""
    found: list[int] = []
    for span in rows.spans:
        end = span.row + span.count
        found += range(end - 1 if span.cache.trail is None else span.row, end)
    return found


def _hand_evidence(rows: Rows, evidence: list[list[tuple[int, float]]]) -> None:
    """To the sequences, in the order of `_evidence_rows`."""
    at = 0
    for span in rows.spans:
        trail = span.cache.trail
        at += 1 if trail is None else span.count
        span.cache.evidence = evidence[at - 1]
        if trail is not None:
            trail.evidence = evidence[at - span.count : at]
