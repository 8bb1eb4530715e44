"""Router and SwiGLU; meaning in kernels/reference/moe_route.py.

A program takes one row: all its scores fit a few registers a thread. The best expert is found K
times; a running count of the chosen ones then lists them in ascending order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.moe_route import LEAST_TOTAL
from kernels.triton.launch import Case, launch, meta

_LEAST_TOTAL = tl.constexpr(LEAST_TOTAL)
_COLUMNS = 1024


@triton.jit
def route_score(x):
    """sqrt(softplus(x)): max(x, 0) + log1p(exp(-|x|)), the logarithm to fp32 accuracy."""
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    near = tl.where(w == 1.0, u, tl.log(w) * (u / tl.where(w == 1.0, 1.0, w - 1.0)))
    return tl.sqrt_rn(tl.maximum(x, 0.0) + near)


@triton.jit
def _moe_route(
    logits, bias, given, ids, weights, experts, active, scale: tl.float32,
    EXPERTS: tl.constexpr, SLOTS: tl.constexpr, HASHED: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, SLOTS)
    if HASHED:
        there = slot < active
        expert = tl.load(given + row * active + slot, mask=there, other=0)
        score = route_score(tl.load(logits + row * experts + expert, mask=there, other=0.0))
        score = tl.where(there, score, 0.0)
        total = tl.maximum(tl.sum(score, 0), _LEAST_TOTAL)
        tl.store(ids + row * active + slot, expert, mask=there)
        tl.store(weights + row * active + slot, score / total * scale, mask=there)
    else:
        expert = tl.arange(0, EXPERTS)
        real = expert < experts
        score = route_score(tl.load(logits + row * experts + expert, mask=real, other=0.0))
        choice = score
        if BIASED:
            choice += tl.load(bias + expert, mask=real, other=0.0)
        choice = tl.where(real, choice, float("-inf"))
        taken = expert < 0
        for _ in tl.range(0, active):
            best = tl.max(choice, 0)
            first = tl.min(tl.where((choice == best) & (taken == 0), expert, EXPERTS), 0)
            taken = taken | (expert == first)
            choice = tl.where(taken, float("-inf"), choice)
        score = tl.where(taken, score, 0.0)
        total = tl.maximum(tl.sum(score, 0), _LEAST_TOTAL)
        place = tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(ids + row * active + place, expert, mask=taken)
        tl.store(weights + row * active + place, score / total * scale, mask=taken)


@triton.jit
def _swiglu(x, out, width, limit: tl.float32, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    start = x + row * 2 * width
    gate = tl.load(start + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(start + width + column, mask=inside, other=0.0).to(tl.float32)
    if limit > 0:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    value = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=inside)


def moe_route(
    logits_RE: Tensor, bias_E: Tensor | None, ids_RK: Tensor | None, active: int, *, scale: float
) -> tuple[Tensor, Tensor]:
    rows, experts = logits_RE.shape
    device = logits_RE.device
    # Logits that are not numbers choose no expert: the lists must still name real ones.
    ids = torch.zeros((rows, active), dtype=torch.int32, device=device)
    weights = torch.zeros((rows, active), dtype=torch.float32, device=device)
    launch(
        _moe_route, (rows,), logits_RE.contiguous(), bias_E, ids_RK, ids, weights, experts, active,
        scale, EXPERTS=triton.next_power_of_2(experts), SLOTS=triton.next_power_of_2(active),
        HASHED=ids_RK is not None, BIASED=bias_E is not None, num_warps=1, num_stages=1,
    )  # fmt: skip
    return ids, weights


def swiglu(gate_up_RI: Tensor, *, limit: float, dtype: torch.dtype) -> Tensor:
    rows, width = gate_up_RI.shape[0], gate_up_RI.shape[1] // 2
    out = torch.empty((rows, width), dtype=dtype, device=gate_up_RI.device)
    launch(
        _swiglu, (rows, triton.cdiv(width, _COLUMNS)), gate_up_RI.contiguous(), out, width, limit,
        COLUMNS=_COLUMNS, num_warps=4, num_stages=1,
    )  # fmt: skip
    return out


def _f32(*shape: int) -> Tensor:
    return meta(*shape, dtype=torch.float32)


CASES = (
    Case("moe_route, 256", lambda: moe_route(_f32(4096, 256), _f32(256), None, 6, scale=1.5)),
    Case("moe_route, 384", lambda: moe_route(_f32(4096, 384), _f32(384), None, 6, scale=2.5)),
    Case(
        "moe_route by hash",
        lambda: moe_route(_f32(64, 256), None, meta(64, 6, dtype=torch.int32), 6, scale=1.5),
    ),
    Case("swiglu, 2048", lambda: swiglu(_f32(4096, 4096), limit=10.0, dtype=torch.bfloat16)),
)
