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
from kernels.reference.lanes import round_up
from kernels.reference.mhc import HyperWeights
from model.codec import RowCodec
from model.config import CSA_RATIO, ModelConfig
from model.drafts.drafter import Asked, Drafter, Parts
from model.drafts.open import open_drafter
from model.drafts.plan import DraftPlan
from model.layers.attention import Attention, AttentionWeights
from model.layers.block import Block, Wanted
from model.layers.compressor import Compressor
from model.layers.experts import Expert, experts_of
from model.layers.head import HeadCollapse
from model.layers.indexer import Indexer
from model.layers.moe import Moe, Router
from model.layout import EVIDENCE_PAIRS
from model.linear import Linear, linear
from model.ranks.communicator import Communicator
from model.ranks.share import CUT_TOKENS, Share, cut
from model.rounding import Rounding
from model.rows import Rows, Span
from model.tensors import local_experts


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
        rounding: Rounding,
        rounded: frozenset[str],
        comm: Communicator,
        drafts: DraftPlan | None = None,
    ) -> None:
        """`tensors` are this rank's parts, emptied on the way: what is stacked with others would
        else lie in memory twice. `rounded` names the weights whose inputs may be rounded.
        """
        self._comm = comm
        self._config, self._ops, self._codec, self._dtype = config, ops, codec, dtype
        self._tensors, self._row_tile = tensors, row_tile
        self._rounding = rounding
        self._rounded = rounded if rounding.activations else frozenset[str]()
        self._embed_VD = tensors.pop("embed.weight").to(dtype)
        self._head = linear(ops, tensors.pop("head.weight").float(), row_tile)
        self._collapse = self._head_collapse("")
        self._freqs: dict[bool, Tensor] = {}
        names = [f"layers.{layer}." for layer in range(config.layers)]
        self._blocks = [self._block(layer, name) for layer, name in enumerate(names)]
        self._drafter = None if drafts is None else self._draft_module(drafts)
        self._taps = self._drafter.taps if self._drafter else frozenset[int]()
        self._tail = self._drafter.tail if self._drafter else 1
        self._tensors = {}

    def forward(self, chunks: Sequence[Chunk], *, every: bool = False) -> Tensor:
        """Absorb one pass. Afterwards every sequence's position, last row and evidence are set.

        Returns collapsed and normalised rows fp32: of each chunk's last token, or of every token
        (which a sequence that leaves a trail needs).
        """
        c = self._config
        asked = chunks
        share = self.share_of(chunks)
        if share is not None:
            chunks = [_part(asked[0], share)]
        spans = [chunk.span for chunk in chunks]
        rows = Rows(spans, window=c.window, ops=self._ops, share=share)
        tokens = torch.tensor([token for chunk in chunks for token in chunk.tokens])
        index, last = rows.last_of_each(self._tail)
        wanted = None if every else Wanted(index, last)
        embedded = self.embed(tokens)
        streams = self._ops.pad_rows(embedded[:, None, :].repeat(1, c.streams, 1))
        tapped: dict[int, Tensor] = {}
        for layer, block in enumerate(self._blocks):
            streams, attended = block(
                streams,
                rows,
                tokens,
                wanted=wanted if layer == c.layers - 1 else None,
                evidence_rows=_evidence_rows(rows) if layer == c.last_csa_layer else None,
            )
            if attended.evidence is not None:
                _hand_evidence(rows, attended.evidence)
            if layer in self._taps:
                whole = every or layer < c.layers - 1
                tapped[layer] = streams.index_select(0, index) if whole else streams[: last.count]
        ended = tokens.index_select(0, index)
        if share is not None and self._drafter is not None:
            # The last plane's part is at least as long as what a draft module wants.
            _, last = Rows([asked[0].span], window=c.window, ops=self._ops).last_of_each(self._tail)
            tapped = {at: share.from_last(x, last.count) for at, x in tapped.items()}
            ended = torch.tensor(asked[0].tokens[-last.count :])
        if self._drafter is not None:
            self._drafter.absorb(last, tapped, ended)
        lasts = [span.row + span.count - 1 for span in (rows if every else last).spans]
        if not every and self._tail > 1:
            streams = self._ops.pad_rows(streams[lasts])
            lasts = list(range(len(lasts)))
        hidden = self._collapse(self._ops, streams)
        if share is not None:
            hidden = share.rows(hidden) if every else share.from_last(hidden[: len(lasts)], 1)
            span, cache = asked[0].span, asked[0].span.cache
            cache.evidence = share.evidence_of_last(cache.evidence, most=EVIDENCE_PAIRS)
            cache.hidden_D, cache.position = hidden[-1].clone(), span.end
            return hidden
        for row, span in zip(lasts, rows.spans, strict=True):
            span.cache.hidden_D = hidden[row].clone()
            span.cache.position = span.end
            if span.cache.trail is not None:
                span.cache.trail.hidden_RD = hidden[span.rows]
        return hidden

    def share_of(self, chunks: Sequence[Chunk]) -> Share | None:
        """This plane's part of a pass that the planes share: one long chunk. All ranks agree."""
        (span, *others) = [chunk.span for chunk in chunks]
        if others or span.cache.trail is not None:
            return None
        unit = round_up(max(CUT_TOKENS, self._config.window, self._tail), CUT_TOKENS)
        planes = self._comm.grid.cp
        borders = cut(span.position, span.end, planes=planes, unit=unit)
        return None if borders is None else Share(self._comm, borders)

    def embed(self, tokens_R: Tensor) -> Tensor:
        """[R, D] in the activation type."""
        return self._embed_VD.index_select(0, tokens_R)

    def draft(self, asked: Sequence[Asked]) -> list[list[int]]:
        """See `Drafter.draft`."""
        if self._drafter is None:
            raise ValueError("this engine was opened without drafts")
        return self._drafter.draft(asked)

    def logits(self, hidden_RD: Tensor) -> Tensor:
        """[R, V] fp32 of collapsed and normalised rows."""
        part = self._head(self._ops.pad_rows(hidden_RD))[: hidden_RD.shape[0]]
        # A vocabulary that the plane does not divide is whole on every rank.
        return part if part.shape[1] == self._config.vocab_size else self._comm.join_plane(part)[0]

    def _linear(self, *names: str, dtype: torch.dtype | None = None) -> Linear:
        """Several weights stacked along their outputs make one product."""
        rounds = self._ops.activation_round if names[0] in self._rounded else None
        return linear(self._ops, self._stacked(*names, dtype=dtype), self._row_tile, rounds)

    def _stacked(self, *names: str, dtype: torch.dtype | None = None) -> Tensor:
        parts = [self._tensors.pop(name).to(dtype or self._dtype) for name in names]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).contiguous()

    def _vector(self, name: str) -> Tensor:
        return self._tensors.pop(name).float()

    def _ratio(self, layer: int) -> int:
        """A draft's blocks follow the backbone's and have a window only."""
        return self._config.ratios[layer] if layer < self._config.layers else 0

    def _freq(self, layer: int) -> Tensor:
        """One table per kind of layer: rows cache their angles by table."""
        c, compressed = self._config, self._ratio(layer) > 0
        if compressed not in self._freqs:
            scaling = vars(c.yarn) if compressed and c.yarn is not None else None
            theta = c.compress_rope_theta if compressed else c.rope_theta
            self._freqs[compressed] = self._ops.frequencies(c.rope_dim, theta, scaling)
        return self._freqs[compressed]

    def _head_collapse(self, name: str) -> HeadCollapse:
        return HeadCollapse(
            fn=self._ops.prepare_head(self._vector(name + "hc_head_fn").contiguous()),
            scale=self._vector(name + "hc_head_scale"),
            base=self._vector(name + "hc_head_base"),
            norm_D=self._vector(name + "norm.weight"),
            norm_eps=self._config.norm_eps,
            eps=self._config.hc_eps,
        )

    def _draft_module(self, plan: DraftPlan) -> Drafter:
        c = self._config
        names = [f"mtp.{stage}." for stage in range(plan.stages)]
        parts = Parts(
            ops=self._ops,
            blocks=tuple(self._block(c.layers + i, name) for i, name in enumerate(names)),
            head=self._head_collapse(names[-1]),
            linear=lambda name: self._linear(f"mtp.{name}"),
            vector=lambda name: self._vector(f"mtp.{name}"),
            embed=self.embed,
            logits=self.logits,
            dtype=self._dtype,
            streams=c.streams,
            window=c.window,
            norm_eps=c.norm_eps,
            first_layer=c.layers,
        )
        return open_drafter(parts, c.draft, plan)

    def _block(self, layer: int, name: str) -> Block:
        return Block(
            self._ops,
            layer,
            attention=self._attention(layer, name + "attn."),
            moe=self._moe(layer, name + "ffn."),
            attn_hc=self._hyper(name + "hc_attn"),
            ffn_hc=self._hyper(name + "hc_ffn"),
            attn_norm_D=self._vector(name + "attn_norm.weight"),
            ffn_norm_D=self._vector(name + "ffn_norm.weight"),
        )

    def _hyper(self, name: str) -> HyperWeights:
        c = self._config
        return self._ops.prepare_mhc(
            HyperWeights(
                fn=self._vector(name + "_fn").contiguous(),
                base=self._vector(name + "_base"),
                scale=self._vector(name + "_scale"),
                streams=c.streams,
                iters=c.sinkhorn_iters,
                eps=c.hc_eps,
                norm_eps=c.norm_eps,
            )
        )

    def _attention(self, layer: int, name: str) -> Attention:
        c, ratio = self._config, self._ratio(layer)
        plane = self._comm.grid.plane
        groups = self._stacked(name + "wo_a.weight").chunk(max(c.o_groups // plane, 1))
        weights = AttentionWeights(
            wq_a=self._linear(name + "wq_a.weight"),
            q_norm_Q=self._vector(name + "q_norm.weight"),
            wq_b=self._linear(name + "wq_b.weight"),
            wkv=self._linear(name + "wkv.weight"),
            kv_norm_C=self._vector(name + "kv_norm.weight"),
            wo_a=tuple(linear(self._ops, part, self._row_tile) for part in groups),
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
                round_scores=self._rounding.scores,
            )
        return Attention(
            self._ops,
            self._codec,
            weights,
            ratio=ratio,
            heads=c.heads // plane,
            sharers=max(plane // c.o_groups, 1),
            head_dim=c.head_dim,
            norm_eps=c.norm_eps,
            compressor=self._compressor(layer, name + "compressor.") if ratio else None,
            indexer=indexer,
            comm=self._comm,
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
            table_VK=self._hash_table(name) if hashed else None,
        )
        numbers = local_experts(c.experts, self._comm.grid)
        experts = experts_of(
            self._ops,
            [self._expert(f"{name}experts.{e}.") for e in numbers],
            self._expert(name + "shared_experts."),
            first=numbers.start,
            total=c.experts,
            outputs=c.hidden // self._comm.grid.tp,
            limit=c.swiglu_limit,
        )
        return Moe(
            self._ops,
            router,
            experts,
            comm=self._comm,
            active=c.active_experts,
            route_scale=c.route_scale,
        )

    def _hash_table(self, name: str) -> Tensor:
        """[V, K] with each token's experts ascending: the order in which outputs are added."""
        return self._tensors.pop(name + "gate.tid2eid").long().sort(1).values.contiguous()

    def _expert(self, name: str) -> Expert:
        return Expert(
            w13=self._linear(name + "w1.weight", name + "w3.weight"),
            w2=self._linear(name + "w2.weight"),
        )


def _part(chunk: Chunk, share: Share) -> Chunk:
    first = share.start - chunk.span.position
    count = share.end - share.start
    span = Span(chunk.span.cache, 0, count, share.start)
    return Chunk(span, chunk.tokens[first : first + count])


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
