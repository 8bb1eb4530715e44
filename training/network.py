"""The DeepSeek-V4 network, differentiable (deepseek-v4.md sections 1, 2 and 4).

Written for training and evaluation of a small model: the whole row is one forward pass, there is no
cache, and the LAST layer (which must be CSA) runs its queries only at the rows that are asked for.
Parameter names are the official tensor names, so a `state_dict` is a checkpoint.

Shape letters: B rows of a batch, S tokens, N = B*S, D hidden, M streams, H heads, K head dim,
W window, E compressed entries, R asked rows, I index dim.
Two things exist for training only: positions may jump (PoSE), and entries of other rows and of
earlier steps can be offered as distractors.

Longer than our files should be: it is a second, independent reading of the report beside `model/`
and is compared as one piece with it and with transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from training.config import NetworkConfig
from training.rounding import PLAIN, Cache

Select = Literal["index", "dense", "random", "recent"]
"""Which compressed entries the last layer attends to: the index's top-k, all, or a control of the
same number (drawn by torch's generator, or the latest).
"""


@dataclass(frozen=True)
class Distractors:
    """Entries of earlier steps, detached: CSA kv [X, K] and index keys [X, I]; HCA kv [Y, K] with
    the position of each entry's first token [Y]."""

    csa_XK: Tensor
    index_XI: Tensor
    hca_YK: Tensor
    hca_position_Y: Tensor


@dataclass(frozen=True)
class Batch:
    """Input of one pass. `rows_R` are flat indices into B*S; `document_end_B` counts tokens."""

    tokens_BS: Tensor
    positions_BS: Tensor
    document_end_B: Tensor
    rows_R: Tensor


@dataclass(frozen=True)
class Evidence:
    """What the last layer looked at, for losses, citation and distractor banks.

    `chosen_RC` are flat entry numbers (own batch first: row * E + j, then the bank),
    `mass_HRC` the attention on them, `index_RE` the index scores (-inf where invisible).
    """

    chosen_RC: Tensor
    valid_RC: Tensor
    mass_HRC: Tensor
    index_RE: Tensor
    csa_BEK: Tensor
    keys_BEI: Tensor
    hca_BEK: Tensor | None


def rms(x: Tensor, eps: float) -> Tensor:
    """Unweighted RMS normalization over the last dimension."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def rotation(positions: Tensor, dims: int, theta: float) -> Tensor:
    """cos and sin of position * frequency, [..., dims / 2, 2]."""
    frequencies = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float32) / dims)
    angles = positions[..., None].float() * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def inverse(turn: Tensor) -> Tensor:
    """The opposite rotation."""
    return turn * torch.tensor([1.0, -1.0])


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Interleaved RoPE on the last channels of x; `turn` broadcasts against [..., dims / 2, 2]."""
    dims = 2 * turn.shape[-2]
    a, b = x[..., -dims::2], x[..., x.shape[-1] - dims + 1 :: 2]
    cos, sin = turn[..., 0], turn[..., 1]
    turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    return torch.cat([x[..., :-dims], turned], dim=-1)


class Norm(nn.Module):
    """RMSNorm with a weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms(x, self.eps) * self.weight


class Linear(nn.Module):
    """A matrix [out, in] without bias."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class Compressor(nn.Module):
    """Gated pooling of `ratio` tokens into one entry; ratio 4 overlaps the window before (2.3)."""

    def __init__(self, cfg: NetworkConfig, ratio: int, dim: int) -> None:
        super().__init__()
        self.ratio, self.dim, self.overlap = ratio, dim, ratio == 4
        width = dim * (2 if self.overlap else 1)
        self.ape = nn.Parameter(torch.zeros(ratio, width))
        self.wkv = Linear(cfg.hidden_size, width)
        self.wgate = Linear(cfg.hidden_size, width)
        self.norm = Norm(dim, cfg.rms_norm_eps)
        nn.init.normal_(self.wgate.weight, std=0.02)

    def forward(self, x_BSD: Tensor, turn_BS: Tensor) -> Tensor:
        """Entries [B, S // ratio, dim], normed and rotated at the position of their first token."""
        usable = x_BSD.shape[1] // self.ratio * self.ratio
        if not usable:
            return x_BSD.new_zeros(len(x_BSD), 0, self.dim)
        x = x_BSD[:, :usable]
        kv = self.wkv(x).unflatten(1, (-1, self.ratio))
        gate = self.wgate(x).unflatten(1, (-1, self.ratio)) + self.ape
        if self.overlap:
            kv = self._with_previous(kv, 0.0)
            gate = self._with_previous(gate, float("-inf"))
        entries = self.norm((kv * gate.softmax(2)).sum(2))
        return rotate(entries, turn_BS[:, : usable : self.ratio])

    def _with_previous(self, x: Tensor, fill: float) -> Tensor:
        """[B, E, 4, 2d] -> [B, E, 8, d]: first half of the last window, second of this one."""
        before = F.pad(x[:, :-1, :, : self.dim], (0, 0, 0, 0, 1, 0), value=fill)
        return torch.cat([before, x[..., self.dim :]], dim=2)


class Indexer(nn.Module):
    """The lightning indexer (2.4)."""

    def __init__(self, cfg: NetworkConfig) -> None:
        super().__init__()
        self.heads, self.dim = cfg.index_n_heads, cfg.index_head_dim
        self.wq_b = Linear(cfg.q_lora_rank, self.heads * self.dim)
        self.weights_proj = Linear(cfg.hidden_size, self.heads)
        self.compressor = Compressor(cfg, 4, self.dim)

    def scores(
        self, x_RD: Tensor, qr_R: Tensor, turn_R: Tensor, keys_EI: Tensor, cache: Cache
    ) -> Tensor:
        """Index scores [R, E] of asked rows against flat entries."""
        q = rotate(self.wq_b(qr_R).unflatten(-1, (self.heads, self.dim)), turn_R[:, None])
        q = cache.key(q)
        weights = self.weights_proj(x_RD) * (self.dim * self.heads) ** -0.5
        score = torch.zeros(())
        for head in range(self.heads):
            score = score + F.relu(q[:, head] @ keys_EI.T) * weights[:, head, None]
        return score


class Attention(nn.Module):
    """Window attention, with compressed entries where the layer has them (2.1 - 2.5)."""

    def __init__(self, cfg: NetworkConfig, layer: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.ratio = cfg.compress_ratios[layer]
        d, heads, k = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim
        self.wq_a = Linear(d, cfg.q_lora_rank)
        self.q_norm = Norm(cfg.q_lora_rank, cfg.rms_norm_eps)
        self.wq_b = Linear(cfg.q_lora_rank, heads * k)
        self.wkv = Linear(d, k)
        self.kv_norm = Norm(k, cfg.rms_norm_eps)
        self.wo_a = Linear(heads * k // cfg.o_groups, cfg.o_groups * cfg.o_lora_rank)
        self.wo_b = Linear(cfg.o_groups * cfg.o_lora_rank, d)
        self.attn_sink = nn.Parameter(torch.zeros(heads))
        if self.ratio:
            self.compressor = Compressor(cfg, self.ratio, k)
        if self.ratio == 4:
            self.indexer = Indexer(cfg)

    def queries(self, x: Tensor, turn: Tensor) -> tuple[Tensor, Tensor]:
        """(q [..., H, K], the low-rank query [..., q_lora])."""
        qr = self.q_norm(self.wq_a(x))
        q = self.wq_b(qr).unflatten(-1, (self.cfg.num_attention_heads, -1))
        return rotate(rms(q, self.cfg.rms_norm_eps), turn[..., None, :, :]), qr

    def keys(self, x: Tensor, turn: Tensor, cache: Cache) -> Tensor:
        """Window kv [..., K]."""
        kv = rotate(self.kv_norm(self.wkv(x)), turn)
        return cache.row(kv, self.cfg.qk_rope_head_dim)

    def output(self, o: Tensor, turn: Tensor) -> Tensor:
        """Inverse RoPE and the grouped low-rank projection: [..., H, K] -> [..., D]."""
        cfg = self.cfg
        o = rotate(o, inverse(turn)[..., None, :, :]).flatten(-2)
        o = torch.unflatten(o, -1, (cfg.o_groups, -1))
        weight = self.wo_a.weight.view(cfg.o_groups, cfg.o_lora_rank, -1)
        low = [F.linear(o[..., g, :], weight[g]) for g in range(cfg.o_groups)]
        out: Tensor = self.wo_b(torch.cat(low, dim=-1))
        return out


def window_mask(window: int) -> Tensor:
    """[W, 2W]: query i of a block sees offset k of (block before, own block)."""
    distance = window + torch.arange(window)[:, None] - torch.arange(2 * window)[None, :]
    return (distance >= 0) & (distance < window)


def attend_everywhere(
    sink_H: Tensor,
    w: int,
    q_BSHK: Tensor,
    kv_BSK: Tensor,
    entries: Tensor | None,
    seen_BSE: Tensor | None,
) -> Tensor:
    """Core attention for every token in blocks of W queries; entries [B or 1, E, K] if any."""
    b, s, heads, k = q_BSHK.shape
    pad = -s % w
    blocks = (s + pad) // w
    q = F.pad(q_BSHK, (0, 0, 0, 0, 0, pad)).view(b * blocks, w, heads, k)
    q = q.transpose(1, 2).reshape(b * blocks, heads * w, k) * k**-0.5
    kv = F.pad(kv_BSK, (0, 0, w, pad)).view(b, blocks + 1, w, k)
    near = torch.cat([kv[:, :-1], kv[:, 1:]], dim=2).view(b * blocks, 2 * w, k)
    logits = (q @ near.transpose(1, 2)).view(b, blocks, heads, w, 2 * w)
    mask = window_mask(w).repeat(blocks, 1, 1)
    mask[0, :, :w] = False
    logits = logits.masked_fill(~mask[None, :, None], float("-inf"))
    sink = sink_H.view(1, 1, heads, 1, 1).expand(b, blocks, heads, w, 1)
    parts = [logits, sink]
    if entries is not None and seen_BSE is not None:
        far = q.view(b, -1, k) @ entries.transpose(1, 2)
        seen = F.pad(seen_BSE, (0, 0, 0, pad)).view(b, blocks, 1, w, -1)
        parts.append(far.view(b, blocks, heads, w, -1).masked_fill(~seen, float("-inf")))
    p = torch.cat(parts, dim=-1).softmax(-1)
    o = p[..., : 2 * w].reshape(b * blocks, heads * w, 2 * w) @ near
    if entries is not None:
        o = o + (p[..., 2 * w + 1 :].reshape(b, -1, entries.shape[1]) @ entries).view_as(o)
    o = o.view(b * blocks, heads, w, k).transpose(1, 2).reshape(b, blocks * w, heads, k)
    return o[:, :s]


class Experts(nn.Module):
    """SwiGLU with the clamp (1.4)."""

    def __init__(self, cfg: NetworkConfig) -> None:
        super().__init__()
        self.w1 = Linear(cfg.hidden_size, cfg.moe_intermediate_size)
        self.w3 = Linear(cfg.hidden_size, cfg.moe_intermediate_size)
        self.w2 = Linear(cfg.moe_intermediate_size, cfg.hidden_size)
        self.limit = cfg.swiglu_limit

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        hidden = F.silu(self.w1(x).clamp(max=self.limit)) * self.w3(x).clamp(
            -self.limit, self.limit
        )
        out: Tensor = self.w2(hidden if weight is None else hidden * weight)
        return out


class Gate(nn.Module):
    """The router: a table of token ids in hash layers, else scores plus a bias for selection."""

    def __init__(self, cfg: NetworkConfig, layer: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.weight = nn.Parameter(torch.randn(cfg.n_routed_experts, cfg.hidden_size) * 0.02)
        self.hashed = layer < cfg.num_hash_layers
        if self.hashed:
            generator = torch.Generator().manual_seed(layer)
            table = torch.stack([
                torch.randperm(cfg.n_routed_experts, generator=generator)[: cfg.num_experts_per_tok]
                for _ in range(cfg.vocab_size)
            ])  # fmt: skip
            self.register_buffer("tid2eid", table)
        else:
            self.register_buffer("bias", torch.zeros(cfg.n_routed_experts))

    def forward(
        self, x: Tensor, tokens: Tensor, forced: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(expert ids [N, k], weights [N, k], scores [N, E]); `forced` ids are taken as they are,
        with weights of today.
        """
        scores = F.softplus(F.linear(x, self.weight)).sqrt()
        if forced is not None:
            ids = forced
        elif self.hashed:
            ids = self.get_buffer("tid2eid")[tokens]
        else:
            biased = scores.detach() + self.get_buffer("bias")
            ids = biased.topk(self.cfg.num_experts_per_tok, sorted=False).indices
        w = scores.gather(-1, ids)
        weights = w / (w.sum(-1, keepdim=True) + 1e-20) * self.cfg.routed_scaling_factor
        return ids, weights, scores


class MoE(nn.Module):
    """Routed experts plus one shared expert.

    `ids` and `scores` are those of the last pass: for the bias update, the balance loss, and as the
    indices that a later pass is `forced` to take (anticipatory routing).
    """

    def __init__(self, cfg: NetworkConfig, layer: int) -> None:
        super().__init__()
        self.gate = Gate(cfg, layer)
        self.experts = nn.ModuleList(Experts(cfg) for _ in range(cfg.n_routed_experts))
        self.shared_experts = Experts(cfg)
        self.ids: Tensor | None = None
        self.scores: Tensor | None = None
        self.forced: Tensor | None = None

    @property
    def load(self) -> Tensor | None:
        """Tokens of each expert in the last pass."""
        if self.ids is None:
            return None
        return torch.bincount(self.ids.flatten(), minlength=len(self.experts))

    def forward(self, x_ND: Tensor, tokens_N: Tensor) -> Tensor:
        ids, weights, scores = self.gate(x_ND, tokens_N, self.forced)
        self.ids, self.scores = ids, scores
        out: Tensor = self.shared_experts(x_ND)
        for number, expert in enumerate(self.experts):
            row, slot = (ids == number).nonzero(as_tuple=True)
            if len(row):
                out = out.index_add(0, row, expert(x_ND[row], weights[row, slot, None]))
        return out


SAME = 3.0
"""Mixing logit of a stream with itself at the start."""


def sinkhorn(logits_44N: Tensor, iterations: int, eps: float) -> Tensor:
    """[4 (j), 4 (k), N] -> doubly stochastic; tokens last so that small sums vectorize (4.1)."""
    if iterations == 0:
        # Unconstrained hyper-connections, a control: at the start nearly the identity, as with it.
        return logits_44N / SAME
    c = logits_44N.softmax(1) + eps
    c = c / (c.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        c = c / (c.sum(1, keepdim=True) + eps)
        c = c / (c.sum(0, keepdim=True) + eps)
    return c


def enter_sublayer(
    x_NMD: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    weight: Tensor,
    eps: float,
    hc_eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """mHC coefficients, the collapsed and normed input; see `Layer.enter` (4.1, 4.2)."""
    n = x_NMD.shape[1]
    f = x_NMD.flatten(1)
    m = F.linear(f, fn) * torch.rsqrt(f.square().mean(-1, keepdim=True) + eps)
    pre = torch.sigmoid(m[:, :n] * scale[0] + base[:n]) + hc_eps
    post = 2 * torch.sigmoid(m[:, n : 2 * n] * scale[1] + base[n : 2 * n])
    logits = (m[:, 2 * n :] * scale[2] + base[2 * n :]).T.reshape(n, n, -1)
    return rms((pre[:, :, None] * x_NMD).sum(1), eps) * weight, post, logits


def leave_sublayer(x_NMD: Tensor, y_ND: Tensor, post_NM: Tensor, mix_MMN: Tensor) -> Tensor:
    """X'_k = post_k y + sum_j C_jk X_j; written out so that a compiler makes one loop of it."""
    c = mix_MMN.permute(2, 0, 1)
    out = post_NM[:, :, None] * y_ND[:, None]
    for j in range(x_NMD.shape[1]):
        out = out + c[:, j, :, None] * x_NMD[:, j, None]
    return out


class Functions:
    """The parts that are memory bound; `compiled` makes inductor fuse them (training only)."""

    def __init__(self, compiled: bool = False, recompute: bool = False) -> None:
        self.recompute = recompute

        def fuse(function: Callable[..., Any]) -> Callable[..., Any]:
            return torch.compile(function, dynamic=True) if compiled else function

        self.enter = fuse(enter_sublayer)
        self.leave = fuse(leave_sublayer)


class Layer(nn.Module):
    """One block: mHC-wrapped attention, then mHC-wrapped MoE (1.3, 4)."""

    def __init__(self, cfg: NetworkConfig, layer: int, functions: Functions) -> None:
        super().__init__()
        self.cfg, self.functions = cfg, functions
        d, m = cfg.hidden_size, cfg.hc_mult
        self.attn_norm, self.ffn_norm = Norm(d, cfg.rms_norm_eps), Norm(d, cfg.rms_norm_eps)
        self.attn, self.ffn = Attention(cfg, layer), MoE(cfg, layer)
        for number, part in enumerate(("attn", "ffn")):
            base = torch.zeros(m * (m + 2))
            base[:m] = -1.5
            base[(2 * layer + number) % m] = 1.5  # each sublayer starts from another stream
            base[m : 2 * m] = 0.5 * torch.randn(m)
            base[2 * m :] = SAME * torch.eye(m).flatten()
            self.register_parameter(f"hc_{part}_base", nn.Parameter(base))
            fn = torch.randn(m * (m + 2), m * d) * 0.2 * (m * d) ** -0.5
            self.register_parameter(f"hc_{part}_fn", nn.Parameter(fn))
            self.register_parameter(f"hc_{part}_scale", nn.Parameter(torch.ones(3)))

    def enter(self, part: str, x_NMD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The sublayer's normed input [N, D], post [N, M] and the mixing logits [M, M, N]."""
        result: tuple[Tensor, Tensor, Tensor] = self.functions.enter(
            x_NMD,
            self.get_parameter(f"hc_{part}_fn"),
            self.get_parameter(f"hc_{part}_base"),
            self.get_parameter(f"hc_{part}_scale"),
            self.attn_norm.weight if part == "attn" else self.ffn_norm.weight,
            self.cfg.rms_norm_eps,
            self.cfg.hc_eps,
        )
        return result

    def leave(
        self, x_NMD: Tensor, y_ND: Tensor, post: Tensor, logits: Tensor, iters: int
    ) -> Tensor:
        """The streams behind the sublayer."""

        def mixed(x_NMD: Tensor, y_ND: Tensor, post: Tensor, logits: Tensor) -> Tensor:
            mix = sinkhorn(logits, iters, self.cfg.hc_eps)
            streams: Tensor = self.functions.leave(x_NMD, y_ND, post, mix)
            return streams

        if self.functions.recompute and torch.is_grad_enabled():
            # The iterations' intermediates are many and cheap: made again in the backward pass.
            again: Tensor = recomputed(mixed, x_NMD, y_ND, post, logits, use_reentrant=False)
            return again
        return mixed(x_NMD, y_ND, post, logits)


class Network(nn.Module):
    """The whole model; `forward` answers at the asked rows only."""

    def __init__(
        self, cfg: NetworkConfig, compiled: bool = False, *, recompute: bool = False
    ) -> None:
        super().__init__()
        if cfg.compress_ratios[-1] != 4:
            raise ValueError("the last entry of compress_ratios must be 4: its queries are sparse")
        self.cfg = cfg
        d, m = cfg.hidden_size, cfg.hc_mult
        self.embed = nn.Embedding(cfg.vocab_size, d)
        functions = Functions(compiled, recompute)
        self.layers = nn.ModuleList(Layer(cfg, i, functions) for i in range(cfg.num_hidden_layers))
        self.hc_head_fn = nn.Parameter(torch.randn(m, m * d) * 0.2 * (m * d) ** -0.5)
        self.hc_head_base = nn.Parameter(torch.zeros(m))
        self.hc_head_scale = nn.Parameter(torch.ones(1))
        self.norm = Norm(d, cfg.rms_norm_eps)
        self.head = Linear(d, cfg.vocab_size)
        nn.init.normal_(self.embed.weight, std=1.0)
        nn.init.normal_(self.head.weight, std=0.02)

    def routers(self) -> list[MoE]:
        """The layers' experts, first layer first."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def forward(
        self,
        batch: Batch,
        *,
        distractors: Distractors | None = None,
        share_entries: bool = False,
        dense: bool = False,
        cache: Cache = PLAIN,
        select: Select = "index",
        sinkhorn_iters: int | None = None,
    ) -> tuple[Tensor, Evidence]:
        """Logits [R, V] at `batch.rows_R` and the evidence of the last layer."""
        cfg = self.cfg
        iters = cfg.hc_sinkhorn_iters if sinkhorn_iters is None else sinkhorn_iters
        b, s = batch.tokens_BS.shape
        tokens_N = batch.tokens_BS.flatten()
        plain = torch.arange(s)[None].expand(b, s)  # window-only layers never see the gaps
        turns = {
            0: rotation(plain, cfg.qk_rope_head_dim, cfg.rope_theta),
            1: rotation(batch.positions_BS, cfg.qk_rope_head_dim, cfg.compress_rope_theta),
        }
        x_NMD = self.embed(tokens_N)[:, None].repeat(1, cfg.hc_mult, 1)
        hca: Tensor | None = None
        for layer in list(self.layers)[:-1]:
            assert isinstance(layer, Layer)
            attn, turn = layer.attn, turns[int(layer.attn.ratio > 0)]
            x_ND, post, logits = layer.enter("attn", x_NMD)
            x_BSD = x_ND.view(b, s, -1)
            q, _ = attn.queries(x_BSD, turn)
            kv = attn.keys(x_BSD, turn, cache)
            entries, seen = None, None
            if attn.ratio:
                hca = attn.compressor(x_BSD, turn)
                hca = cache.row(hca, cfg.qk_rope_head_dim)
                entries, seen = heavy_entries(batch, hca, attn.ratio, distractors, share_entries)
                if not entries.shape[1]:
                    entries = None
            o = attend_everywhere(attn.attn_sink, cfg.sliding_window, q, kv, entries, seen)
            y = attn.output(o, turn).view(b * s, -1)
            x_NMD = layer.leave(x_NMD, y, post, logits, iters)
            x_ND, post, logits = layer.enter("ffn", x_NMD)
            x_NMD = layer.leave(x_NMD, layer.ffn(x_ND, tokens_N), post, logits, iters)
        last = self.layers[-1]
        assert isinstance(last, Layer)
        x_RMD, evidence = _last_layer(
            last,
            batch,
            x_NMD,
            turns[1],
            distractors,
            share_entries,
            "dense" if dense else select,
            cache,
            iters,
            hca,
        )
        f = x_RMD.flatten(1)
        m = F.linear(f, self.hc_head_fn) * torch.rsqrt(
            f.square().mean(-1, keepdim=True) + cfg.rms_norm_eps
        )
        pre = torch.sigmoid(m * self.hc_head_scale + self.hc_head_base) + cfg.hc_eps
        return self.head(self.norm((pre[:, None] @ x_RMD)[:, 0])), evidence


def heavy_entries(
    batch: Batch, own_BEK: Tensor, ratio: int, bank: Distractors | None, share: bool
) -> tuple[Tensor, Tensor]:
    """HCA entries offered to every token and which tokens see them.

    Own: j < floor((t+1)/ratio). Of others: entries of the document part that end before the token.
    """
    b, s = batch.tokens_BS.shape
    count = own_BEK.shape[1]
    own = torch.arange(count)[None] < ((torch.arange(s) + 1) // ratio)[:, None]
    if not share:
        return own_BEK, own[None].expand(b, s, count)
    starts = batch.positions_BS[:, : count * ratio : ratio]
    inside = (torch.arange(count) + 1)[None] * ratio <= batch.document_end_B[:, None]
    before = starts.reshape(-1) + ratio <= batch.positions_BS[..., None]
    seen = (before & inside.reshape(-1)).view(b, s, b, count)
    seen[torch.arange(b), :, torch.arange(b)] = own
    entries, seen = own_BEK.reshape(1, b * count, -1), seen.view(b, s, b * count)
    if bank is not None and len(bank.hca_YK):
        entries = torch.cat([entries, bank.hca_YK[None]], dim=1)
        old = bank.hca_position_Y + ratio <= batch.positions_BS[..., None]
        seen = torch.cat([seen, old], dim=2)
    return entries.expand(b, -1, -1), seen


def _ranked(score_RE: Tensor, select: Select) -> Tensor:
    """What the top-k is taken of: the index scores, or a control that ignores them."""
    if select == "index":
        return score_RE
    if select == "recent":
        control = torch.arange(score_RE.shape[1], dtype=score_RE.dtype).expand_as(score_RE)
    else:
        control = torch.rand_like(score_RE)
    return control.masked_fill(score_RE == float("-inf"), float("-inf"))


def _last_layer(
    layer: Layer,
    batch: Batch,
    x_NMD: Tensor,
    turn_BS: Tensor,
    bank: Distractors | None,
    share: bool,
    select: Select,
    cache: Cache,
    iters: int,
    hca: Tensor | None,
) -> tuple[Tensor, Evidence]:
    """The CSA layer: entries of all tokens, queries and MoE at the asked rows only."""
    cfg, attn = layer.cfg, layer.attn
    b, s = batch.tokens_BS.shape
    rows, w, rope = batch.rows_R, cfg.sliding_window, cfg.qk_rope_head_dim
    x_ND, post, logits = layer.enter("attn", x_NMD)
    x_BSD = x_ND.view(b, s, -1)
    csa = attn.compressor(x_BSD, turn_BS)
    keys = attn.indexer.compressor(x_BSD.detach(), turn_BS)
    csa, keys = cache.row(csa, rope), cache.key(keys)
    x_RD, turn_R = x_BSD.flatten(0, 1)[rows], turn_BS.flatten(0, 1)[rows]
    q_RHK, qr = attn.queries(x_RD, turn_R)
    q_RHK = q_RHK * cfg.head_dim**-0.5

    time_R, row_R = rows % s, rows // s
    back = torch.arange(w)
    near_t = time_R[:, None] - back
    flat = (rows[:, None] - back).clamp_min(0)
    kv_RWK = attn.keys(x_BSD.flatten(0, 1)[flat], turn_BS.flatten(0, 1)[flat], cache)
    near = torch.einsum("rhk,rwk->hrw", q_RHK, kv_RWK)
    near = near.masked_fill(near_t < 0, float("-inf"))

    count = csa.shape[1]
    seen = torch.arange(count)[None] < ((time_R + 1) // 4)[:, None]
    flat_csa, flat_keys = csa.flatten(0, 1), keys.flatten(0, 1)
    if b > 1:
        inside = (torch.arange(count) + 1)[None] * 4 <= batch.document_end_B[:, None]
        other = inside.reshape(1, -1).expand(len(rows), -1) & share
        mine = torch.arange(b)[None, :, None] == row_R[:, None, None]
        seen = torch.where(mine, seen[:, None], other.reshape(-1, b, count)).flatten(1)
    if bank is not None and share:
        flat_csa = torch.cat([flat_csa, bank.csa_XK])
        flat_keys = torch.cat([flat_keys, bank.index_XI])
        seen = F.pad(seen, (0, len(bank.csa_XK)), value=True)
    score = attn.indexer.scores(x_RD.detach(), qr.detach(), turn_R, flat_keys, cache)
    score = score.masked_fill(~seen, float("-inf"))
    heads = cfg.num_attention_heads
    if select == "dense":
        chosen = torch.arange(len(flat_csa)).expand(len(rows), -1)
        valid = seen
        far = (q_RHK.transpose(0, 1) @ flat_csa.T).masked_fill(~valid, float("-inf"))
    else:
        ranked = _ranked(score.detach(), select)
        chosen = ranked.topk(min(cfg.index_topk, score.shape[1])).indices
        valid = seen.gather(1, chosen)
        picked = flat_csa[chosen]
        far = torch.einsum("rhk,rck->hrc", q_RHK, picked).masked_fill(~valid, float("-inf"))
    sink = attn.attn_sink[:, None, None].expand(heads, len(rows), 1)
    p = torch.cat([near, sink, far], dim=-1).softmax(-1)
    o = torch.einsum("hrw,rwk->rhk", p[..., :w], kv_RWK)
    mass = p[..., w + 1 :]
    if select == "dense":
        o = o + (mass @ flat_csa).transpose(0, 1)
    else:
        o = o + torch.einsum("hrc,rck->rhk", mass, picked)
    x_RMD = x_NMD[rows]
    y = attn.output(o, turn_R)
    x_RMD = layer.leave(x_RMD, y, post[rows], logits[:, :, rows], iters)
    tokens_R = batch.tokens_BS.flatten()[rows]
    x_RD, post, logits = layer.enter("ffn", x_RMD)
    x_RMD = layer.leave(x_RMD, layer.ffn(x_RD, tokens_R), post, logits, iters)
    return x_RMD, Evidence(chosen, valid, mass, score, csa, keys, hca)
