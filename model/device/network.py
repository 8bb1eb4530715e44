"""The network on one device: embedding, blocks, head (deepseek-v4.md 1.3), over `kernels.device`.

Shape suffixes: R rows (tokens), S streams, D model width, V vocabulary, W wanted rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.device import ReferenceDeviceOps
from kernels.reference.hadamard import hadamard_matrix
from kernels.reference.pages import KvPages
from kernels.reference.rope import frequencies
from model.config import CSA_RATIO, ModelConfig
from model.device.attention import Attention, AttentionWeights, Compressor, Scratch
from model.device.experts import Moe, MoeWeights
from model.device.indexer import Indexer, IndexerWeights
from model.device.pools import Geometry, LayerPool
from model.device.rows import Rows
from model.device.sequence import Picked
from model.device.weights import Loader, Product
from model.rounding import Rounding

PASS_ROWS = 2048
"""Most rows of a pass: what its buffers are sized for."""


@dataclass(frozen=True)
class Gates:
    """One hyper-connection: fp32 tensors."""

    fn_MX: Tensor
    scale: Tensor
    base_M: Tensor


@dataclass(frozen=True)
class Block:
    attention: Attention
    moe: Moe
    attn_gates: Gates
    ffn_gates: Gates
    attn_norm_D: Tensor
    ffn_norm_D: Tensor


@dataclass(frozen=True)
class Output:
    """Collapsed and normalised fp32 rows [W, D] of the wanted rows, and what they selected."""

    hidden_WD: Tensor
    picked: Picked | None


class DeviceNetwork:
    def __init__(
        self,
        config: ModelConfig,
        loader: Loader,
        geometry: Geometry,
        *,
        ops: ReferenceDeviceOps,
        device: torch.device,
        dtype: torch.dtype,
        rounding: Rounding,
        exact: bool,
        tile: int,
    ) -> None:
        self._config, self._ops, self._geometry = config, ops, geometry
        self._device, self._dtype, self._rounding = device, dtype, rounding
        self._exact, self._tile, self._loader = exact, tile, loader
        # e4m3 rows of normed values fit float16, whose mantissa is longer than bfloat16's.
        self._operand = torch.float32 if dtype == torch.float32 else torch.float16
        layout = KvPages(page_rows=PASS_ROWS, dim=config.head_dim, nope=config.nope_dim)
        pages = torch.zeros((1, layout.page_bytes), dtype=torch.uint8, device=device)
        self._scratch = Scratch(pages, layout)
        signs = hadamard_matrix(config.index_dim) if config.last_csa_layer is not None else None
        self._signs = None if signs is None else signs.to(device)
        self._freqs: dict[bool, Tensor] = {}
        self._embed_VD = loader.raw("embed.weight").to(dtype)
        self._head = loader.product("head.weight", wide=True)
        self._head_gates = self._gates("hc_head")
        self._norm_D = loader.vector("norm.weight")
        self._blocks = [self._block(layer) for layer in range(config.layers)]

    def forward(self, rows: Rows, pools: list[LayerPool], wanted_W: Tensor) -> Output:
        """Absorb the rows' tokens; `wanted_W` (int64) are the rows whose prediction is wanted."""
        ops, c = self._ops, self._config
        kind: dict[str, Any] = {"iters": c.sinkhorn_iters, "eps": c.hc_eps, "norm_eps": c.norm_eps}
        embedded = self._embed_VD.index_select(0, rows.tokens_R)
        streams = embedded[:, None, :].repeat(1, c.streams, 1)
        first = self._blocks[0].attn_gates
        x, post, comb = ops.mhc_pre(streams, first.fn_MX, first.scale, first.base_M, **kind)
        picked: Picked | None = None
        for layer, (block, pool) in enumerate(zip(self._blocks, pools, strict=True)):
            evidence = wanted_W if layer == c.last_csa_layer else None
            y, found = block.attention(
                rows, pool, self._normed(x, block.attn_norm_D), evidence=evidence
            )
            picked = found or picked
            gates = block.ffn_gates
            streams, x, post, comb = ops.mhc_boundary(
                streams, y, post, comb, gates.fn_MX, gates.scale, gates.base_M, **kind
            )
            y = block.moe(self._normed(x, block.ffn_norm_D), rows.tokens_R)
            if layer + 1 == c.layers:
                break
            gates = self._blocks[layer + 1].attn_gates
            streams, x, post, comb = ops.mhc_boundary(
                streams, y, post, comb, gates.fn_MX, gates.scale, gates.base_M, **kind
            )
        streams = ops.mhc_post(*(t.index_select(0, wanted_W) for t in (streams, y, post, comb)))
        return Output(self._collapsed(streams), picked)

    def logits(self, hidden_WD: Tensor) -> Tensor:
        """[W, V] fp32 of collapsed and normalised rows."""
        return self._head(self._ops, hidden_WD.to(self._dtype), torch.float32)

    def _normed(self, x_RD: Tensor, weight_D: Tensor) -> Tensor:
        return self._ops.rms_norm(x_RD, weight_D, eps=self._config.norm_eps, dtype=self._dtype)

    def _collapsed(self, streams_WSD: Tensor) -> Tensor:
        g, c = self._head_gates, self._config
        x = self._ops.mhc_head(
            streams_WSD, g.fn_MX, g.scale, g.base_M, eps=c.hc_eps, norm_eps=c.norm_eps
        )
        return self._normed(x, self._norm_D).float()

    def _gates(self, name: str) -> Gates:
        return Gates(*(self._loader.vector(f"{name}_{part}") for part in ("fn", "scale", "base")))

    def _freq(self, compressed: bool) -> Tensor:
        """One table per kind of layer: rows keep their angles by table."""
        c = self._config
        if compressed not in self._freqs:
            scaling = vars(c.yarn) if compressed and c.yarn is not None else None
            theta = c.compress_rope_theta if compressed else c.rope_theta
            table = frequencies(c.rope_dim, theta, scaling)
            self._freqs[compressed] = table.to(self._device)
        return self._freqs[compressed]

    def _block(self, layer: int) -> Block:
        name = f"layers.{layer}."
        return Block(
            attention=self._attention(layer, name + "attn."),
            moe=self._moe(layer, name + "ffn."),
            attn_gates=self._gates(name + "hc_attn"),
            ffn_gates=self._gates(name + "hc_ffn"),
            attn_norm_D=self._loader.vector(name + "attn_norm.weight"),
            ffn_norm_D=self._loader.vector(name + "ffn_norm.weight"),
        )

    def _attention(self, layer: int, name: str) -> Attention:
        c, load, ratio = self._config, self._loader, self._config.ratios[layer]
        weights = AttentionWeights(
            wq_a=load.product(name + "wq_a.weight"),
            q_norm_Q=load.vector(name + "q_norm.weight"),
            wq_b=load.product(name + "wq_b.weight"),
            wkv=load.product(name + "wkv.weight"),
            kv_norm_C=load.vector(name + "kv_norm.weight"),
            wo_a=load.product(name + "wo_a.weight", groups=c.o_groups),
            wo_b=load.product(name + "wo_b.weight"),
            sink_H=load.vector(name + "attn_sink"),
            freq_P=self._freq(ratio > 0),
        )
        compressor = None
        if ratio:
            compressor = Compressor(*self._compressor_parts(name + "compressor."))
        return Attention(
            self._ops,
            self._geometry,
            weights,
            ratio=ratio,
            compressor=compressor,
            indexer=self._indexer(name + "indexer.") if ratio == CSA_RATIO else None,
            scratch=self._scratch,
            dtype=self._dtype,
            operand=self._operand,
            exact=self._exact,
        )

    def _compressor_parts(self, name: str) -> tuple[Product, Tensor, Tensor]:
        load = self._loader
        project = load.product(name + "wkv.weight", name + "wgate.weight", wide=True)
        return project, load.vector(name + "ape"), load.vector(name + "norm.weight")

    def _indexer(self, name: str) -> Indexer:
        assert self._signs is not None
        project, ape, norm = self._compressor_parts(name + "compressor.")
        weights = IndexerWeights(
            wq_b=self._loader.product(name + "wq_b.weight"),
            weights_proj=self._loader.product(name + "weights_proj.weight"),
            project=project,
            ape_SA=ape,
            norm_C=norm,
            signs_CC=self._signs,
            freq_P=self._freq(True),
        )
        return Indexer(
            self._ops,
            self._geometry,
            weights,
            dtype=self._dtype,
            round_scores=self._rounding.scores,
        )

    def _moe(self, layer: int, name: str) -> Moe:
        c, load, hashed = self._config, self._loader, layer < self._config.hash_layers
        table = None
        if hashed:
            ids = load.raw(name + "gate.tid2eid").sort(1).values
            table = ids.to(torch.int32).contiguous()
        weights = MoeWeights(
            gate=load.product(name + "gate.weight", wide=True),
            bias_E=None if hashed else load.vector(name + "gate.bias"),
            table_VK=table,
            experts=load.experts(name + "experts.", c.experts),
            shared_w13=load.product(
                name + "shared_experts.w1.weight", name + "shared_experts.w3.weight"
            ),
            shared_w2=load.product(name + "shared_experts.w2.weight"),
        )
        return Moe(
            self._ops,
            weights,
            active=c.active_experts,
            route_scale=c.route_scale,
            limit=c.swiglu_limit,
            dtype=self._dtype,
            rounds=self._rounding.activations,
            exact=self._exact,
            tile=self._tile,
        )
