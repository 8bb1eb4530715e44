"""Experts of the training network and the router that chooses them (deepseek-v4.md 1.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.config import NetworkConfig
from training.layers import Linear


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
