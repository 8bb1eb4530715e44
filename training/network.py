"""The DeepSeek-V4 network, differentiable (deepseek-v4.md sections 1, 2 and 4).

Written for training and evaluation of a small model: the whole row is one forward pass, there is no
cache, and the LAST layer (which must be CSA) runs its queries only at the rows that are asked for.
Parameter names are the official tensor names, so a `state_dict` is a checkpoint.

Shape letters: B rows of a batch, S tokens, N = B*S, D hidden, M streams, H heads, K head dim,
W window, E compressed entries, R asked rows, I index dim.
Two things exist for training only: positions may jump (PoSE), and entries of other rows and of
earlier steps can be offered as distractors.

Its parts: `layers.py`, `attention.py`, `experts.py`, `streams.py`. All of it is a second,
independent reading of the report beside `model/`, compared with it and with transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.attention import attend_everywhere
from training.config import NetworkConfig
from training.experts import MoE
from training.layers import Linear, Norm, rotation
from training.rounding import PLAIN, Cache
from training.streams import Functions, Layer

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
