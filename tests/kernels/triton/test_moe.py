"""Routed experts: the plan puts every pair in its expert's tiles, grouped products equal float64
in both weight formats and all tile sizes, and a token's output does not depend on its companions.
"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.device import ReferenceDeviceOps
from kernels.reference.moe_grouped import MoePlan
from tests.kernels.triton.check import REFERENCE, TRITON, Draw, distance, examples

SEEDS = st.integers(0, 2**31)
WIDTH, HIDDEN = 256, 128


def drawn_ids(draw: Draw, rows: int, experts: int, active: int) -> Tensor:
    """Ascending expert ids, with favourites, as a router gives them."""
    score = torch.rand(rows, experts, generator=draw.generator)
    score[:, 0] += 0.5
    return score.topk(active).indices.sort(1).values.to(torch.int32)


@examples(12)
@given(
    seed=SEEDS,
    rows=st.sampled_from([1, 7, 400]),
    experts=st.sampled_from([2, 5, 16]),
    tile=st.sampled_from([16, 64]),
)
def test_the_plan_is_the_reference_s(seed: int, rows: int, experts: int, tile: int) -> None:
    ids = drawn_ids(Draw(seed), rows, experts, 2)
    found = TRITON.moe_plan(ids, experts=experts, tile=tile)
    wanted = REFERENCE.moe_plan(ids, experts=experts, tile=tile)
    for name in ("pair_M", "place_RK", "expert_T"):
        assert torch.equal(getattr(found, name), getattr(wanted, name)), name
    for place, pair in enumerate(found.pair_M.tolist()):
        if pair >= 0:
            assert ids.view(-1)[pair] == found.expert_T[place // tile]
            assert found.place_RK.view(-1)[pair] == place


@examples(6)
@given(
    seed=SEEDS, rows=st.sampled_from([1, 9]), kind=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_rounded_rows_are_bit_exact(seed: int, rows: int, kind: torch.dtype) -> None:
    x = Draw(seed).rows(rows, 384, dtype=kind)
    found, wanted = TRITON.quantize_rows(x), REFERENCE.quantize_rows(x)
    assert torch.equal(found[0].view(torch.uint8), wanted[0].view(torch.uint8))
    assert torch.equal(found[1], wanted[1])
    values = TRITON.round_rows(x)
    assert torch.equal(values, REFERENCE.round_rows(x))
    exact = wanted[0].double().view(rows, 3, 128) * wanted[1].double()[..., None]
    assert torch.equal(values.double(), exact.flatten(1))


class Layer:
    """Random experts in one format."""

    def __init__(self, draw: Draw, *, fp4: bool, experts: int) -> None:
        self.fp4 = fp4
        self.w13 = self.weight(draw, experts, 2 * HIDDEN, WIDTH)
        self.w2 = self.weight(draw, experts, WIDTH, HIDDEN)

    def weight(self, draw: Draw, experts: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        if self.fp4:
            x = draw.normal(experts * outputs, inputs, scale=inputs**-0.5)
            codes, scale = REFERENCE.mxfp4_encode(x)
            return codes.view(experts, outputs, -1), scale.view(experts, outputs, -1)
        x = draw.normal(experts, outputs, inputs).to(torch.float8_e4m3fn)
        shape = (experts, outputs // 128, inputs // 128)
        return x, draw.integers(120, 126, *shape).to(torch.uint8)

    def rounded(self, ops: ReferenceDeviceOps, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (ops.round_rows(x), None) if self.fp4 else ops.quantize_rows(x)

    def run(
        self, ops: ReferenceDeviceOps, x: Tensor, share: Tensor, plan: MoePlan, limit: float
    ) -> tuple[Tensor, Tensor]:
        up = ops.moe_up(*self.rounded(ops, x), *self.w13, share, plan, limit=limit)
        return up, ops.moe_down(*self.rounded(ops, up), *self.w2, plan)


@examples(8)
@given(
    seed=SEEDS,
    fp4=st.booleans(),
    rows=st.sampled_from([1, 5, 20]),
    tile=st.sampled_from([16, 64]),
    limit=st.sampled_from([0.0, 1.0]),
)
def test_grouped_products(seed: int, fp4: bool, rows: int, tile: int, limit: float) -> None:
    draw = Draw(seed)
    experts = 3
    layer = Layer(draw, fp4=fp4, experts=experts)
    x, share = draw.normal(rows, WIDTH, dtype=torch.bfloat16), draw.normal(rows, 2).abs()
    plan = TRITON.moe_plan(drawn_ids(draw, rows, experts, 2), experts=experts, tile=tile)
    up, down = layer.run(TRITON, x, share, plan, limit)
    args = (*layer.rounded(REFERENCE, x), *layer.w13)
    exact = REFERENCE.moe_up(*args, share.double(), plan, limit=limit)
    assert distance(up, exact) < 5e-3
    assert not up[plan.pair_M < 0].any()
    # The second product is checked from the same input: rounding of the first may flip a code.
    real = plan.pair_M >= 0
    wanted = REFERENCE.moe_down(*layer.rounded(REFERENCE, up), *layer.w2, plan)
    assert distance(down[real], wanted[real]) < 5e-3
    shared = draw.normal(rows, WIDTH, dtype=torch.bfloat16)
    total = TRITON.moe_combine(down, shared, plan)
    assert torch.equal(total, REFERENCE.moe_combine(down, shared, plan))


@examples(2)
@given(seed=SEEDS, fp4=st.booleans(), row=st.integers(0, 17))
def test_a_token_s_experts_do_not_see_its_companions(seed: int, fp4: bool, row: int) -> None:
    draw = Draw(seed)
    layer = Layer(draw, fp4=fp4, experts=3)
    x, share = draw.normal(18, WIDTH, dtype=torch.bfloat16), draw.normal(18, 2)
    ids, shared = drawn_ids(draw, 18, 3, 2), draw.normal(18, WIDTH)
    totals = []
    for part in (slice(0, 18), slice(row, row + 1)):
        plan = TRITON.moe_plan(ids[part], experts=3, tile=16)
        down = layer.run(TRITON, x[part], share[part].contiguous(), plan, 10.0)[1]
        totals.append(TRITON.moe_combine(down, shared[part].contiguous(), plan))
    assert torch.equal(totals[0][row], totals[1][0])
