"""Routed experts as grouped products (deepseek-v4.md 1.4, 5.2).

(token, slot) pairs are sorted by expert into tiles of a fixed number of places, so that one product
never meets two experts. Weights are e4m3 with one ue8m0 scale per 128 x 128, or MXFP4, both with
activations that are rounded per token and 128 channels before each product; or plain bfloat16.

Shape suffixes: R rows (tokens), K active experts, E experts, D model width, I expert width,
M places (pairs and padding), T tiles, G groups of 128 channels, N outputs, X bytes or scales of one
weight row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.reference.mxfp4 import mxfp4_decode
from kernels.reference.wide import wide

GROUP = 128


@dataclass(frozen=True)
class MoePlan:
    """Where each pair went. `pair_M` is row * K + slot (-1: padding), `place_RK` the inverse,
    `expert_T` the expert of each tile (-1: unused); all int32. M = T * tile is an upper bound that
    needs no look at the ids, so nothing waits for the device.
    """

    tile: int
    pair_M: Tensor
    place_RK: Tensor
    expert_T: Tensor


def tiles_needed(pairs: int, experts: int, tile: int) -> int:
    """Most tiles that `pairs` pairs over `experts` experts can fill."""
    used = min(pairs, experts)
    return (pairs - used) // tile + used


def moe_plan(ids_RK: Tensor, *, experts: int, tile: int) -> MoePlan:
    """Pairs in the order of (expert, row, slot); every expert begins a tile of its own."""
    flat = ids_RK.reshape(-1).long()
    tiles = tiles_needed(flat.shape[0], experts, tile)
    device = ids_RK.device
    order = flat.argsort(stable=True)
    count = torch.bincount(flat, minlength=experts)
    used = -(-count // tile)
    first = (used.cumsum(0) - used) * tile
    rank = torch.arange(flat.shape[0], device=device) - (count.cumsum(0) - count)[flat[order]]
    place = torch.empty_like(flat)
    place[order] = first[flat[order]] + rank
    pair = torch.full((tiles * tile,), -1, device=device)
    pair[place] = torch.arange(flat.shape[0], device=device)
    expert = torch.full((tiles,), -1, device=device)
    owners = torch.arange(experts, device=device).repeat_interleave(used)
    expert[: owners.shape[0]] = owners
    places = place.view(ids_RK.shape)
    return MoePlan(tile, *(x.to(torch.int32) for x in (pair, places, expert)))


def quantize_rows(x_RD: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [R, D] and power-of-two scales fp32 [R, D / 128], as every FP8 product needs (5.2)."""
    groups = x_RD.float().view(x_RD.shape[0], -1, GROUP)
    bits = groups.abs().amax(2).clamp_min(1e-4).view(torch.int32)
    exponent = (bits >> 23) - 135 + ((bits & 0x7FFFFF) > 0x600000).to(torch.int32)
    scale = ((exponent + 127) << 23).view(torch.float32)
    inverse = ((127 - exponent) << 23).view(torch.float32)
    scaled = (groups * inverse[..., None]).clamp(-448.0, 448.0)
    return scaled.to(torch.float8_e4m3fn).view(x_RD.shape), scale


def round_rows(x_RD: Tensor) -> Tensor:
    """The values of `quantize_rows` in bfloat16, which holds them exactly: input of MXFP4 experts,
    whose product is bfloat16 on devices without FP4 tensor cores.
    """
    codes, scale = quantize_rows(x_RD)
    values = codes.float().view(*scale.shape, GROUP) * scale[..., None]
    return values.view(x_RD.shape).to(torch.bfloat16)


def _values(x_RD: Tensor, scale_RG: Tensor | None, kind: torch.dtype) -> Tensor:
    if scale_RG is None:
        return x_RD.to(kind)
    return (x_RD.to(kind).view(*scale_RG.shape, GROUP) * scale_RG.to(kind)[..., None]).flatten(1)


def _weights(weight_NX: Tensor, scale_NX: Tensor | None, kind: torch.dtype) -> Tensor:
    """[N, K] values of one expert's weight."""
    if scale_NX is None:
        return weight_NX.to(kind)
    if weight_NX.dtype == torch.uint8:
        return mxfp4_decode(weight_NX, scale_NX, dtype=kind)
    factor = (scale_NX.to(torch.int32) << 23).view(torch.float32).to(kind)
    factor = factor.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)
    return weight_NX.to(kind) * factor[: weight_NX.shape[0], : weight_NX.shape[1]]


def _stored(x: Tensor) -> torch.dtype:
    """Type of what a product leaves: bfloat16, unless its input was wider."""
    return x.dtype if x.dtype in (torch.float32, torch.float64) else torch.bfloat16


def _grouped(x_MD: Tensor, weight: Tensor, scale: Tensor | None, plan: MoePlan) -> Tensor:
    """[M, N]: every tile times its expert's weight; zeros in unused tiles."""
    out = x_MD.new_zeros((x_MD.shape[0], weight.shape[1]))
    for tile, expert in enumerate(plan.expert_T.tolist()):
        if expert >= 0:
            places = slice(tile * plan.tile, (tile + 1) * plan.tile)
            own = None if scale is None else scale[expert]
            out[places] = x_MD[places] @ _weights(weight[expert], own, x_MD.dtype).t()
    return out


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
    """bfloat16 [M, I]: silu(min(gate, limit)) * clamp(up) * routing weight; zeros in padding.

    x is e4m3 with `scale_RG`, or bfloat16 values with None (MXFP4 and plain weights). `w13` holds
    the I gate rows, then the I up rows, of each expert: e4m3 [E, 2 I, D] with scales uint8
    [E, 2 I / 128, D / 128], MXFP4 [E, 2 I, D / 2] with [E, 2 I, D / 32], or bfloat16 [E, 2 I, D]
    with None. limit 0: no clamp. An fp32 x (reference only) gives fp32.
    """
    double = torch.float64 in (weight_RK.dtype, x_RD.dtype)
    kind = torch.float64 if double else torch.float32
    x = _values(x_RD, scale_RG, kind)
    pair = plan.pair_M.long()
    active = weight_RK.shape[1]
    gate, up = _grouped(x[pair.clamp_min(0) // active], w13_ENX, w13_scale_ENX, plan).chunk(2, 1)
    if limit > 0:
        gate, up = gate.clamp_max(limit), up.clamp(-limit, limit)
    share = weight_RK.reshape(-1)[pair.clamp_min(0)].masked_fill(pair < 0, 0.0)
    return (torch.nn.functional.silu(gate) * up * share[:, None]).to(_stored(x_RD))


def moe_down(
    h_MI: Tensor,
    scale_MG: Tensor | None,
    w2_EDX: Tensor,
    w2_scale_EDX: Tensor | None,
    plan: MoePlan,
) -> Tensor:
    """bfloat16 [M, D]; what stands in padding is unspecified. Formats as in `moe_up`."""
    kind = torch.float64 if h_MI.dtype == torch.float64 else torch.float32
    y = _grouped(_values(h_MI, scale_MG, kind), w2_EDX, w2_scale_EDX, plan)
    return y.to(_stored(h_MI))


def moe_combine(y_MD: Tensor, shared_RD: Tensor, plan: MoePlan) -> Tensor:
    """[R, D] in the type of `shared_RD`: a token's expert outputs added in slot order (ascending
    expert ids), then the shared expert's, in fp32.
    """
    y = wide(y_MD)
    total = torch.zeros_like(wide(shared_RD), dtype=y.dtype)
    for slot in range(plan.place_RK.shape[1]):
        total = total + y[plan.place_RK[:, slot].long()]
    return (total + wide(shared_RD)).to(shared_RD.dtype)
