"""Attention of the training network: compressor, lightning indexer, projections, and the core for
every token (deepseek-v4.md 2.1 - 2.5). Shape letters as in `training/network.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import NetworkConfig
from training.layers import Linear, Norm, inverse, rms, rotate
from training.rounding import Cache


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
