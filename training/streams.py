"""Residual streams (mHC, deepseek-v4.md 4) and the block that reads and writes them.

Shape letters as in `training/network.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as recomputed

from training.attention import Attention
from training.config import NetworkConfig
from training.experts import MoE
from training.layers import Norm, rms

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
