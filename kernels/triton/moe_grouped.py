"""Routed experts as grouped products; meaning in kernels/reference/moe_grouped.py.

Weights stand on the rows of the product and tokens on its columns: a tile of 16 tokens then costs
what 16 tokens cost, and MXFP4 weights, decoded in registers, feed the tensor cores from there. An
e4m3 product is promoted to fp32 after every 128 channels, where its scale changes anyway. Plain
bfloat16 weights have no scale.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference.moe_grouped import GROUP, MoePlan, tiles_needed
from kernels.triton.launch import Case, launch, meta
from kernels.triton.numerals import fp4_value, fp8_exponent, power_of_two

_SCAN = 1024
_OUTPUTS = 64
_COMBINED = 512
_GROUP = tl.constexpr(GROUP)


@triton.jit
def _count(ids, counts, pairs, SCAN: tl.constexpr):
    expert = tl.program_id(0)
    total = tl.zeros([], tl.int32)
    for start in tl.range(0, pairs, SCAN):
        at = start + tl.arange(0, SCAN)
        found = tl.load(ids + at, mask=at < pairs, other=-1) == expert
        total += tl.sum(found.to(tl.int32), 0)
    tl.store(counts + expert, total)


@triton.jit
def _place(
    ids, counts, pair, place, owner, pairs, experts, tile,
    EXPERTS: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(0)
    other = tl.arange(0, EXPERTS)
    size = tl.load(counts + other, mask=other < experts, other=0)
    used = (size + tile - 1) // tile
    first = tl.sum(tl.where(other < expert, used, 0), 0)
    own = tl.sum(tl.where(other == expert, used, 0), 0)
    for number in tl.range(0, own):
        tl.store(owner + first + number, expert)
    at_place = first * tile
    for start in tl.range(0, pairs, SCAN):
        at = start + tl.arange(0, SCAN)
        found = tl.load(ids + at, mask=at < pairs, other=-1) == expert
        rank = at_place + tl.cumsum(found.to(tl.int32), 0) - 1
        tl.store(pair + rank, at, mask=found)
        tl.store(place + at, rank, mask=found)
        at_place += tl.sum(found.to(tl.int32), 0)


@triton.jit
def _quantize_rows(x, codes, scales, rows, groups, ROWS: tl.constexpr, VALUES: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    real = row < rows
    at = row.to(tl.int64)[:, None] * (groups * _GROUP) + group * _GROUP
    at = at + tl.arange(0, _GROUP)[None, :]
    value = tl.load(x + at, mask=real[:, None], other=0.0).to(tl.float32)
    exponent = fp8_exponent(tl.max(tl.abs(value), 1))
    value = value * power_of_two(-exponent)[:, None]
    code = tl.minimum(tl.maximum(value, -448.0), 448.0).to(tl.float8e4nv)
    if VALUES:
        value = code.to(tl.float32) * power_of_two(exponent)[:, None]
        tl.store(codes + at, value.to(tl.bfloat16), mask=real[:, None])
    else:
        tl.store(codes + at, code, mask=real[:, None])
        tl.store(scales + row * groups + group, power_of_two(exponent), mask=real)


@triton.jit
def weight_tile(
    weight, scale, row, k, inputs, outputs, ROWS: tl.constexpr, STEP: tl.constexpr,
    FP4: tl.constexpr,
):  # fmt: skip
    """Rows [ROWS] x channels k .. k + STEP of one expert's weight: e4m3 codes, or bfloat16 values
    of MXFP4 with their scales applied.
    """
    if FP4:
        inside = (row < outputs)[:, None]
        pair = k // 2 + tl.arange(0, STEP // 2)
        known = inside & (pair < inputs // 2)[None, :]
        at = row.to(tl.int64)[:, None] * (inputs // 2) + pair[None, :]
        byte = tl.load(weight + at, mask=known, other=0).to(tl.int32)
        group = k // 32 + tl.arange(0, STEP // 32)
        known = inside & (group < inputs // 32)[None, :]
        at = row.to(tl.int64)[:, None] * (inputs // 32) + group[None, :]
        factor = power_of_two(tl.load(scale + at, mask=known, other=127).to(tl.int32) - 127)
        both = tl.join(fp4_value(byte & 15), fp4_value(byte >> 4))
        value = tl.reshape(both, (ROWS, STEP // 32, 32)) * factor[:, :, None]
        found = tl.reshape(value, (ROWS, STEP)).to(tl.bfloat16)
    else:
        column = k + tl.arange(0, STEP)
        known = (row < outputs)[:, None] & (column < inputs)[None, :]
        at = row.to(tl.int64)[:, None] * inputs + column[None, :]
        found = tl.load(weight + at, mask=known, other=0.0)
    return found


@triton.jit
def weight_factor(scale, row, k, inputs):
    """The ue8m0 scale of the 128 x 128 block that holds (row, k), as fp32."""
    at = (row // _GROUP) * ((inputs + _GROUP - 1) // _GROUP) + k // _GROUP
    return power_of_two(tl.load(scale + at).to(tl.int32) - 127)


@triton.jit
def _moe_up(
    x, x_scale, weight, scale, share, pair, owner, out,
    active, width, inputs, weight_stride, scale_stride, limit: tl.float32,
    TILE: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, FP4: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    # Outputs fastest: neighbouring programs share a tile of tokens and stream one expert.
    tile = tl.program_id(1)
    expert = tl.load(owner + tile)
    if expert < 0:
        return
    weight += expert.to(tl.int64) * weight_stride
    if FP4 or SCALED:
        scale += expert.to(tl.int64) * scale_stride
    place = tile * TILE + tl.arange(0, TILE)
    at = tl.load(pair + place)
    row = tl.maximum(at, 0) // active
    first = tl.program_id(0) * OUTPUTS
    output = first + tl.arange(0, OUTPUTS)
    # Rows past the gates' end are masked to no effect: they meet rows past the ups' end.
    gate = tl.zeros([OUTPUTS, TILE], tl.float32)
    up = tl.zeros([OUTPUTS, TILE], tl.float32)
    for k in tl.range(0, inputs, STEP):
        column = k + tl.arange(0, STEP)
        start = x + row.to(tl.int64)[:, None] * inputs
        x_TS = tl.load(start + column[None, :], mask=(column < inputs)[None, :], other=0.0)
        w1 = weight_tile(weight, scale, output, k, inputs, width, OUTPUTS, STEP, FP4)
        w3 = weight_tile(weight, scale, width + output, k, inputs, 2 * width, OUTPUTS, STEP, FP4)
        if FP4 or not SCALED:
            gate = tl.dot(w1, tl.trans(x_TS), gate)
            up = tl.dot(w3, tl.trans(x_TS), up)
        else:
            groups = tl.cdiv(inputs, _GROUP)
            token = tl.load(x_scale + row * groups + k // _GROUP)
            gate += (
                tl.dot(w1, tl.trans(x_TS))
                * (token * weight_factor(scale, first, k, inputs))[None, :]
            )
            up += (
                tl.dot(w3, tl.trans(x_TS))
                * (token * weight_factor(scale, width + first, k, inputs))[None, :]
            )
    if limit > 0:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    value = gate / (1.0 + tl.exp(-gate)) * up
    value = value * tl.load(share + tl.maximum(at, 0)).to(tl.float32)[None, :]
    value = tl.where((at >= 0)[None, :], value, 0.0)
    at_out = out + place.to(tl.int64)[:, None] * width + output[None, :]
    tl.store(at_out, tl.trans(value).to(tl.bfloat16), mask=(output < width)[None, :])


@triton.jit
def _moe_down(
    x, x_scale, weight, scale, owner, out, inputs, outputs, weight_stride, scale_stride,
    TILE: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, FP4: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    expert = tl.load(owner + tile)
    if expert < 0:
        return
    weight += expert.to(tl.int64) * weight_stride
    if FP4 or SCALED:
        scale += expert.to(tl.int64) * scale_stride
    place = tile * TILE + tl.arange(0, TILE)
    first = tl.program_id(0) * OUTPUTS
    output = first + tl.arange(0, OUTPUTS)
    total = tl.zeros([OUTPUTS, TILE], tl.float32)
    for k in tl.range(0, inputs, STEP):
        column = k + tl.arange(0, STEP)
        start = x + place.to(tl.int64)[:, None] * inputs
        x_TS = tl.load(start + column[None, :], mask=(column < inputs)[None, :], other=0.0)
        w2 = weight_tile(weight, scale, output, k, inputs, outputs, OUTPUTS, STEP, FP4)
        if FP4 or not SCALED:
            total = tl.dot(w2, tl.trans(x_TS), total)
        else:
            groups = tl.cdiv(inputs, _GROUP)
            token = tl.load(x_scale + place * groups + k // _GROUP)
            total += (
                tl.dot(w2, tl.trans(x_TS))
                * (token * weight_factor(scale, first, k, inputs))[None, :]
            )
    at_out = out + place.to(tl.int64)[:, None] * outputs + output[None, :]
    tl.store(at_out, tl.trans(total).to(tl.bfloat16), mask=(output < outputs)[None, :])


@triton.jit
def _moe_combine(y, shared, place, out, active, width, COLUMNS: tl.constexpr):
    row = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    total = tl.zeros([COLUMNS], tl.float32)
    for slot in tl.range(0, active):
        at = tl.load(place + row * active + slot).to(tl.int64) * width
        total += tl.load(y + at + column, mask=inside, other=0.0).to(tl.float32)
    at = row.to(tl.int64) * width + column
    total += tl.load(shared + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def moe_plan(ids_RK: Tensor, *, experts: int, tile: int) -> MoePlan:
    pairs, device = ids_RK.numel(), ids_RK.device
    tiles = tiles_needed(pairs, experts, tile)
    ids = ids_RK.to(torch.int32).contiguous()
    counts = torch.empty(experts, dtype=torch.int32, device=device)
    pair = torch.full((tiles * tile,), -1, dtype=torch.int32, device=device)
    place = torch.empty(ids_RK.shape, dtype=torch.int32, device=device)
    owner = torch.full((tiles,), -1, dtype=torch.int32, device=device)
    launch(_count, (experts,), ids, counts, pairs, SCAN=_SCAN, num_warps=4)
    launch(
        _place, (experts,), ids, counts, pair, place, owner, pairs, experts, tile,
        EXPERTS=triton.next_power_of_2(experts), SCAN=_SCAN, num_warps=4,
    )  # fmt: skip
    return MoePlan(tile, pair, place, owner)


def _rounded(x_RD: Tensor, out: Tensor, scales: Tensor | None) -> None:
    rows, groups = x_RD.shape[0], x_RD.shape[1] // GROUP
    launch(
        _quantize_rows, (triton.cdiv(rows, 8), groups), x_RD.contiguous(), out, scales, rows,
        groups, ROWS=8, VALUES=scales is None, num_warps=4, num_stages=1,
    )  # fmt: skip


def quantize_rows(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    codes = torch.empty(x_RD.shape, dtype=torch.float8_e4m3fn, device=x_RD.device)
    shape = (x_RD.shape[0], x_RD.shape[1] // GROUP)
    scales = torch.empty(shape, dtype=torch.float32, device=x_RD.device)
    _rounded(x_RD, codes, scales)
    return codes, scales


def round_rows(x_RD: Tensor) -> Tensor:
    values = torch.empty(x_RD.shape, dtype=torch.bfloat16, device=x_RD.device)
    _rounded(x_RD, values, None)
    return values


def _step(weight: Tensor) -> int:
    """Channels a step: one scale block of e4m3; half of it for MXFP4, whose decoded tile otherwise
    fills the registers and serialises the products, and for bfloat16, which takes twice the room.
    """
    return GROUP if weight.dtype == torch.float8_e4m3fn else 64


def _stride(scale: Tensor | None) -> int:
    return 0 if scale is None else scale.stride(0)


def _stages(fp4: bool, tile: int) -> int:
    return 3 if fp4 or tile > 64 else 4


def moe_up(
    x_RD: Tensor,
    scale_RG: Tensor | None,
    w13_ENX: Tensor,
    w13_scale_ENX: Tensor | None,
    weight_RK: Tensor,
    plan: MoePlan,
    *,
    limit: float,
) -> Tensor:
    width, inputs = w13_ENX.shape[1] // 2, x_RD.shape[1]
    fp4 = w13_ENX.dtype == torch.uint8
    shape = (plan.pair_M.shape[0], width)
    # Tiles that no expert uses are not written: their places are padding.
    out = torch.zeros(shape, dtype=torch.bfloat16, device=x_RD.device)
    launch(
        _moe_up, (triton.cdiv(width, _OUTPUTS), plan.expert_T.shape[0]),
        x_RD, scale_RG, w13_ENX, w13_scale_ENX, weight_RK, plan.pair_M, plan.expert_T, out,
        weight_RK.shape[1], width, inputs, w13_ENX.stride(0), _stride(w13_scale_ENX), limit,
        TILE=plan.tile, OUTPUTS=_OUTPUTS, STEP=_step(w13_ENX), FP4=fp4,
        SCALED=scale_RG is not None,
        num_warps=_warps(plan.tile), num_stages=_stages(fp4, plan.tile),
    )  # fmt: skip
    return out


def moe_down(
    h_MI: Tensor,
    scale_MG: Tensor | None,
    w2_EDX: Tensor,
    w2_scale_EDX: Tensor | None,
    plan: MoePlan,
) -> Tensor:
    outputs, inputs = w2_EDX.shape[1], h_MI.shape[1]
    fp4 = w2_EDX.dtype == torch.uint8
    out = torch.empty((h_MI.shape[0], outputs), dtype=torch.bfloat16, device=h_MI.device)
    launch(
        _moe_down, (triton.cdiv(outputs, 2 * _OUTPUTS), plan.expert_T.shape[0]),
        h_MI, scale_MG, w2_EDX, w2_scale_EDX, plan.expert_T, out,
        inputs, outputs, w2_EDX.stride(0), _stride(w2_scale_EDX),
        TILE=plan.tile, OUTPUTS=2 * _OUTPUTS, STEP=_step(w2_EDX), FP4=fp4,
        SCALED=scale_MG is not None, num_warps=8, num_stages=_stages(fp4, plan.tile),
    )  # fmt: skip
    return out


def _warps(tile: int) -> int:
    """64 outputs are one warpgroup's rows; a wide tile of tokens is shared by two."""
    return 8 if tile >= 64 else 4


def moe_combine(y_MD: Tensor, shared_RD: Tensor, plan: MoePlan) -> Tensor:
    rows, width = shared_RD.shape
    out = torch.empty_like(shared_RD)
    launch(
        _moe_combine, (rows, triton.cdiv(width, _COMBINED)),
        y_MD, shared_RD, plan.place_RK, out, plan.place_RK.shape[1], width,
        COLUMNS=_COMBINED, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


def _experts(kind: str, count: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor | None]:
    if kind == "bfloat16":
        return meta(count, outputs, inputs), None
    if kind == "MXFP4":
        return (
            meta(count, outputs, inputs // 2, dtype=torch.uint8),
            meta(count, outputs, inputs // 32, dtype=torch.uint8),
        )
    return (
        meta(count, outputs, inputs, dtype=torch.float8_e4m3fn),
        meta(count, outputs // GROUP, inputs // GROUP, dtype=torch.uint8),
    )


def _layer(kind: str, rows: int, tile: int, shape: tuple[int, int, int]) -> None:
    width, hidden, experts = shape

    def rounded(x: Tensor) -> tuple[Tensor, Tensor | None]:
        if kind == "e4m3":
            return quantize_rows(x)
        return (round_rows(x) if kind == "MXFP4" else x), None

    plan = moe_plan(meta(rows, 6, dtype=torch.int32), experts=experts, tile=tile)
    x, scale = rounded(meta(rows, width))
    share = meta(rows, 6, dtype=torch.float32)
    h = moe_up(x, scale, *_experts(kind, experts, 2 * hidden, width), share, plan, limit=10.0)
    h, scale = rounded(h)
    y = moe_down(h, scale, *_experts(kind, experts, width, hidden), plan)
    moe_combine(y, meta(rows, width), plan)


_PRODUCTS = {"_moe_up": "wgmma", "_moe_down": "wgmma"}

CASES = tuple(
    Case(
        f"moe {kind}, {name}, tile {tile}",
        partial(_layer, kind, rows, tile, shape),
        _PRODUCTS,
    )
    for kind in ("e4m3", "MXFP4", "bfloat16")
    for name, rows, tile, shape in (
        ("Flash", 8192, 128, (4096, 2048, 256)),
        ("Flash", 512, 64, (4096, 2048, 256)),
        ("Flash", 16, 16, (4096, 2048, 256)),
        ("Pro", 8192, 128, (7168, 3072, 384)),
    )
    # Plain weights are for small models and for comparison.
    if kind != "bfloat16" or (name, tile) in (("Flash", 64), ("Flash", 16))
)
