"""A model with random weights that are made on the device, one tensor at a time: layer stacks of a
released model's shape need no checkpoint and no host memory.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from kernels.device import ReferenceDeviceOps
from model.config import ModelConfig, Yarn
from model.device.engine import DeviceEngine
from model.device.weights import ExpertFormat
from model.layout import KvFormat
from model.options import EngineOptions
from model.rounding import Rounding
from model.tensors import RELEASED, Expected, Kind, expected_tensors

FLASH = ModelConfig(
    vocab_size=129_280,
    hidden=4096,
    layers=8,
    heads=64,
    head_dim=512,
    rope_dim=64,
    q_rank=1024,
    o_groups=8,
    o_rank=1024,
    window=128,
    index_heads=64,
    index_dim=128,
    index_topk=512,
    experts=256,
    active_experts=6,
    expert_width=2048,
    route_scale=1.5,
    hash_layers=0,
    swiglu_limit=10.0,
    streams=4,
    sinkhorn_iters=20,
    hc_eps=1e-6,
    norm_eps=1e-6,
    rope_theta=10_000.0,
    compress_rope_theta=160_000.0,
    yarn=Yarn(factor=16.0, original=65_536.0, beta_fast=32.0, beta_slow=1.0),
    ratios=(4, 128) * 4,
    max_positions=1 << 20,
    eos_token_ids=frozenset({1}),
)
TINY = replace(
    FLASH,
    vocab_size=320,
    hidden=128,
    layers=2,
    heads=4,
    head_dim=128,
    q_rank=128,
    o_groups=1,
    o_rank=128,
    window=16,
    index_heads=4,
    index_topk=8,
    experts=4,
    active_experts=2,
    expert_width=128,
    sinkhorn_iters=2,
    ratios=(4, 128),
    max_positions=4096,
)
_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class RandomWeights:
    """Values of the size that a trained model has: rows keep about their length through a product.
    FP4 weights lie on the grid of their format.
    """

    def __init__(self, config: ModelConfig, device: torch.device, *, seed: int = 0) -> None:
        self._table = expected_tensors(config, RELEASED)
        self._config, self._device = config, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def pop(self, name: str, /) -> Tensor:
        weight = self._table.pop(name)
        if weight.kind is Kind.INT64:
            return self._integers(self._config.experts, weight.shape)
        if len(weight.shape) == 1 or name.endswith(".ape"):
            return self._small(name, weight)
        scale = 1.0 / math.sqrt(weight.shape[1])
        if weight.kind is Kind.FP4:
            grid = torch.tensor((*_GRID, *(-v for v in _GRID)), device=self._device)
            values = (grid * math.ldexp(1.0, round(math.log2(scale / 3)))).to(torch.bfloat16)
            drawn = self._integers(16, weight.shape).flatten()
            return values.index_select(0, drawn).view(weight.shape)
        return (self._normal(weight.shape) * scale).to(torch.bfloat16)

    def _small(self, name: str, weight: Expected) -> Tensor:
        if "norm" in name or name.endswith("_scale"):
            return torch.ones(weight.shape, device=self._device)
        return 0.3 * self._normal(weight.shape)

    def _normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device)

    def _integers(self, below: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(below, shape, generator=self._generator, device=self._device)


def random_engine(
    config: ModelConfig, ops: ReferenceDeviceOps, device: torch.device, *, numerics: str
) -> DeviceEngine:
    """The engine that a released checkpoint of this shape gets: FP8 rows, FP4 experts."""
    rounding = Rounding(KvFormat.FP8, index=True, scores=True, activations=True)
    return DeviceEngine(
        config,
        RandomWeights(config, device),
        weights_digest="random",
        options=EngineOptions(rounding, "bfloat16", numerics, config.max_positions),
        ops=ops,
        device=device,
        experts=ExpertFormat.MXFP4,
    )
