"""The measured calls of dense products, plain norms, routing and evidence; see
bench/kernels_cases.py.

Shape suffixes as in the ops' references.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench.kernels_work import Case, Ops, Work, distance, normal

_EPS = 1e-6


def _linear(device: torch.device, tiny: bool, *, rows: int, shape: tuple[int, int, int]) -> Work:
    rows, (groups, outputs, inputs) = (3, (2, 64, 64)) if tiny else (rows, shape)
    x, weight = normal(device, rows, groups, inputs), normal(device, groups, outputs, inputs)

    def call(ops: Ops) -> Tensor:
        return ops.linear(x, weight, dtype=torch.bfloat16)

    def error(ops: Ops) -> float:
        few = slice(0, 4)
        found = ops.linear(x[few], weight, dtype=torch.float32)
        return distance(found, Ops.linear(x[few].double(), weight, dtype=torch.float64))

    moved = 2.0 * (x.numel() + weight.numel() + rows * groups * outputs)
    flops = 2.0 * rows * weight.numel()
    # Below about 200 rows the weights' way from memory takes longer than the products.
    return Work(call, error, 1e-5, moved, flops, "bf16" if rows > 256 else "copy")


def _rms_norm(device: torch.device, tiny: bool, *, width: int) -> Work:
    rows, width = (3, 96) if tiny else (16_384, width)
    x, weight = normal(device, rows, width), normal(device, width, dtype=torch.float32)

    def call(ops: Ops) -> Tensor:
        return ops.rms_norm(x, weight, eps=_EPS, dtype=torch.bfloat16)

    def error(ops: Ops) -> float:
        found = ops.rms_norm(x[:4], weight, eps=_EPS, dtype=torch.float32)
        wide = x[:4].double(), weight.double()
        return distance(found, Ops.rms_norm(*wide, eps=_EPS, dtype=torch.float64))

    return Work(call, error, 2e-6, 4.0 * rows * width)


def _route(device: torch.device, tiny: bool) -> Work:
    rows, experts, active = (3, 8, 2) if tiny else (8192, 256, 6)
    logits = normal(device, rows, experts, dtype=torch.float32)
    bias = normal(device, experts, dtype=torch.float32)

    def call(ops: Ops) -> tuple[Tensor, Tensor]:
        return ops.moe_route(logits, bias, None, active, scale=1.5)

    def error(ops: Ops) -> float:
        (ids, weights), (known, exact) = call(ops), call(Ops())
        return distance(weights, exact) + float((ids != known).sum())

    return Work(call, error, 4e-6, rows * (4.0 * experts + 8.0 * active))


def _swiglu(device: torch.device, tiny: bool) -> Work:
    rows, width = (3, 40) if tiny else (16_384, 2048)
    x = normal(device, rows, 2 * width, dtype=torch.float32)

    def call(ops: Ops) -> Tensor:
        return ops.swiglu(x, limit=10.0, dtype=torch.bfloat16)

    def error(ops: Ops) -> float:
        found = ops.swiglu(x[:4], limit=10.0, dtype=torch.float32)
        return distance(found, Ops.swiglu(x[:4].double(), limit=10.0, dtype=torch.float64))

    return Work(call, error, 2e-6, 10.0 * rows * width)


def _masses(device: torch.device, tiny: bool) -> Work:
    rows, heads, keys, store = (2, 16, 64, 80) if tiny else (8, 64, 640, 65_536)
    q, kv = normal(device, rows, heads, 512), normal(device, store, 512)
    index = torch.randint(0, store, (rows, keys), dtype=torch.int32, device=device)
    sink = torch.randn(heads, device=device)

    def call(ops: Ops) -> Tensor:
        return ops.entry_masses(q, kv, index, sink, scale=512**-0.5)

    def error(ops: Ops) -> float:
        exact = Ops.entry_masses(q.double(), kv.double(), index, sink, scale=512**-0.5)
        return distance(call(ops), exact)

    return Work(call, error, 1e-5, rows * keys * 1024.0)


CASES = (
    Case("linear, Flash queries", partial(_linear, rows=4096, shape=(1, 32_768, 1024)), target=0.6),
    Case("linear, Flash output", partial(_linear, rows=4096, shape=(8, 1024, 4096)), target=0.6),
    Case("linear, 1 row", partial(_linear, rows=1, shape=(1, 32_768, 1024)), target=0.7),
    Case("linear, 1 row, few outputs", partial(_linear, rows=1, shape=(1, 1024, 4096))),
    Case("rms_norm, 4096", partial(_rms_norm, width=4096), target=0.85),
    Case("rms_norm, 7168", partial(_rms_norm, width=7168), target=0.85),
    Case("moe_route, 256", _route, target_us=10.0),
    Case("swiglu, 2048", _swiglu, target=0.85),
    Case("entry_masses, 8 rows", _masses),
)
