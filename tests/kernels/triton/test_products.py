"""Dense products, the router, the shared expert and the evidence equal their references; a row's
result is the same bits whatever rows stand beside it.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.reference.pages import KvPages
from tests.kernels.triton.check import REFERENCE, TRITON, Draw, distance, examples

SEEDS = st.integers(0, 2**31)
BF16 = torch.bfloat16


@examples(6)
@given(
    seed=SEEDS,
    rows=st.sampled_from([1, 5, 17, 70]),
    groups=st.sampled_from([1, 3]),
    outputs=st.sampled_from([8, 64, 200]),
    inputs=st.sampled_from([24, 64, 130]),
    tile=st.sampled_from([16, 64, 128]),
)
def test_linear(seed: int, rows: int, groups: int, outputs: int, inputs: int, tile: int) -> None:
    draw = Draw(seed)
    x = draw.normal(rows, groups, inputs, dtype=BF16)
    weight = draw.normal(groups, outputs, inputs, dtype=BF16)
    found = TRITON.linear(x, weight, dtype=torch.float32, tile=tile)
    exact = REFERENCE.linear(x.double(), weight, dtype=torch.float64)
    assert distance(found, exact) < 1e-6
    half = TRITON.linear(x, weight, dtype=BF16, tile=tile)
    assert torch.equal(half, found.to(BF16))
    alone = TRITON.linear(x[rows // 2 :][:1], weight, dtype=torch.float32, tile=tile)
    assert torch.equal(alone[0], found[rows // 2])


@examples(4)
@given(seed=SEEDS, rows=st.sampled_from([1, 3]), width=st.sampled_from([32, 96, 200]))
def test_rms_norm_of_any_width_and_rope_alone(seed: int, rows: int, width: int) -> None:
    draw = Draw(seed)
    x, weight = draw.rows(rows, width, dtype=BF16), draw.normal(width)
    found = TRITON.rms_norm(x, weight, eps=1e-6, dtype=torch.float32)
    exact = REFERENCE.rms_norm(x.double(), weight.double(), eps=1e-6, dtype=torch.float64)
    assert distance(found, exact) < 1e-6
    q, angle = draw.normal(rows, 2, 64, dtype=BF16), draw.normal(rows, 16)
    cos, sin = angle.cos(), angle.sin()
    found = TRITON.rope(q, cos, sin, dtype=torch.float32)
    exact = REFERENCE.rope(q.double(), cos, sin, dtype=torch.float64)
    assert distance(found, exact) < 1e-6
    assert torch.equal(found[..., :32], q[..., :32].float())


@examples(6)
@given(
    seed=SEEDS,
    experts=st.sampled_from([4, 7, 24]),
    active=st.integers(1, 4),
    kind=st.sampled_from(["score", "bias", "hash", "ties"]),
)
def test_routing(seed: int, experts: int, active: int, kind: str) -> None:
    draw = Draw(seed)
    rows = 5
    logits = draw.normal(rows, experts, scale=20.0)
    if kind == "ties":
        logits = logits.round().clamp(-1, 1)
    bias = draw.normal(experts) if kind == "bias" else None
    given_ids = None
    if kind == "hash":
        given_ids = torch.stack(
            [torch.randperm(experts, generator=draw.generator)[:active] for _ in range(rows)]
        )
        given_ids = given_ids.sort(1).values.to(torch.int32)
    ids, weights = TRITON.moe_route(logits, bias, given_ids, active, scale=1.5)
    wanted, exact = REFERENCE.moe_route(logits, bias, given_ids, active, scale=1.5)
    assert torch.equal(ids, wanted)
    assert (ids.diff(dim=1) > 0).all()
    assert distance(weights, exact) < 2e-6


def test_the_router_keeps_small_scores_apart() -> None:
    """softplus of a very negative logit is its exponential: 1 + x would lose it."""
    logits = torch.tensor([[-30.0, -31.0, -40.0]])
    _, weights = TRITON.moe_route(logits, None, None, 3, scale=1.0)
    score = torch.exp(logits.double()).sqrt()
    assert distance(weights, score / score.sum()) < 1e-6


@examples(3)
@given(seed=SEEDS, width=st.sampled_from([8, 40]), limit=st.sampled_from([0.0, 0.5]))
def test_swiglu(seed: int, width: int, limit: float) -> None:
    x = Draw(seed).normal(3, 2 * width, scale=3.0)
    found = TRITON.swiglu(x, limit=limit, dtype=torch.float32)
    exact = REFERENCE.swiglu(x.double(), limit=limit, dtype=torch.float64)
    assert distance(found, exact) < 1e-6


@examples(4)
@given(seed=SEEDS, heads=st.sampled_from([2, 16, 80]), slots=st.sampled_from([3, 64, 100]))
def test_entry_masses(seed: int, heads: int, slots: int) -> None:
    draw = Draw(seed)
    q, kv = (draw.normal(n, 64, dtype=torch.float16) for n in (2 * heads, 50))
    q, sink = q.view(2, heads, 64), draw.normal(heads)
    index = draw.integers(-1, 50, 2, slots)
    index[1, 1:] = -1
    found = TRITON.entry_masses(q, kv, index, sink, scale=0.2)
    exact = REFERENCE.entry_masses(q.double(), kv, index, sink, scale=0.2)
    assert found.shape == (2, slots)
    assert (found[index < 0] == 0).all()
    assert distance(found, exact) < 2e-6


@examples(4)
@given(seed=SEEDS, nope=st.sampled_from([32, 96, 112]))
def test_rows_whose_last_scale_group_is_cut_short(seed: int, nope: int) -> None:
    """96 e4m3 channels are one group of 64 and half of another."""
    draw = Draw(seed)
    layout = KvPages(page_rows=3, dim=128, nope=nope)
    x, slots = draw.rows(5, 128), torch.tensor([4, -1, 0, 2, 5], dtype=torch.int32)
    found = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
    wanted = found.clone()
    TRITON.quantize_kv(x, slots, found, layout)
    REFERENCE.quantize_kv(x, slots, wanted, layout)
    assert torch.equal(found, wanted)
    into = torch.empty(5, 128)
    values = TRITON.dequantize_gather(found, slots, layout, dtype=torch.float32, out=into)
    assert values.data_ptr() == into.data_ptr()
    exact = REFERENCE.dequantize_gather(found, slots, layout, dtype=torch.float32)
    assert torch.equal(values, exact)


@examples(4)
@given(seed=SEEDS, nope=st.sampled_from([64, 96]), heavy=st.sampled_from([0, 64]))
def test_decode_attention_over_such_rows(seed: int, nope: int, heavy: int) -> None:
    draw = Draw(seed)
    layouts = KvPages(page_rows=24, dim=128, nope=nope), KvPages(page_rows=2, dim=128, nope=nope)
    args: list[object] = []
    for layout, slots in zip(layouts, (64, heavy), strict=True):
        pages = torch.zeros(48 // layout.page_rows, layout.page_bytes, dtype=torch.uint8)
        rows = torch.arange(48, dtype=torch.int32)
        REFERENCE.quantize_kv(draw.normal(48, 128), rows, pages, layout)
        args += [pages, draw.integers(-1, 48, 2, slots), layout]
    q, sink = draw.normal(2, 2, 128, dtype=torch.float16), draw.normal(2)
    turn = draw.normal(2, (128 - nope) // 2)
    args += [sink, turn.cos(), turn.sin()]
    found = TRITON.decode_attention(q, *args, scale=0.1)
    exact = REFERENCE.decode_attention(q.double(), *args, scale=0.1)
    assert distance(found, exact) < 2e-3


def test_decode_attention_names_rows_that_it_cannot_cut() -> None:
    layout = KvPages(page_rows=24, dim=128, nope=112)
    pages = torch.zeros(2, layout.page_bytes, dtype=torch.uint8)
    slots = torch.zeros(1, 64, dtype=torch.int32)
    args = (pages, slots, layout, pages, slots, layout)
    turn = torch.ones(1, 8)
    with pytest.raises(ValueError, match="112 e4m3 of 128 channels"):
        q = torch.zeros(1, 2, 128, dtype=torch.float16)
        TRITON.decode_attention(q, *args, torch.zeros(2), turn, turn, scale=0.1)
