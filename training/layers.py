"""What every part of the training network is made of: norms, matrices, rotary positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
