"""Norms, RoPE, the compressor and hyper-connections equal their references, near position one
million as at zero. Bytes are compared through the values that they hold: two fp32 results that
differ in the last bit may round to neighbouring codes.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kernels.reference.compress import compress
from kernels.reference.hadamard import hadamard_matrix
from kernels.reference.pages import IndexPages, KvPages
from kernels.reference.rope import cos_sin, frequencies
from tests.kernels.triton.check import REFERENCE, TRITON, Draw, distance, examples

SEEDS = st.integers(0, 2**31)
POSITIONS = st.sampled_from([0, 1, 126, 127, 128, 65_535, 999_937, 1_048_000])
EPS = 1e-6
YARN = {"factor": 16.0, "original": 65536.0, "beta_fast": 32.0, "beta_slow": 1.0}
FREQ = frequencies(64, 160_000.0, YARN)


def near(found: Tensor, wanted: Tensor, *, code: float, share: float = 0.02) -> None:
    """Values of quantised rows: nearly all equal, none further away than one `code` step."""
    assert found.shape == wanted.shape
    if not found.numel():
        return
    gap = (found.double() - wanted.double()).abs()
    size = wanted.double().abs().amax(-1, keepdim=True).clamp_min(1e-30)
    assert float((gap / size).max()) <= code
    assert float((gap > 0).double().mean()) <= share


@examples(8)
@given(
    seed=SEEDS,
    rows=st.sampled_from([1, 3, 9]),
    heads=st.sampled_from([1, 4]),
    dim=st.sampled_from([128, 512]),
    weighted=st.booleans(),
    position=POSITIONS,
)
def test_norm_rope(
    seed: int, rows: int, heads: int, dim: int, weighted: bool, position: int
) -> None:
    draw = Draw(seed)
    x = draw.rows(rows, heads, dim, dtype=torch.bfloat16)
    weight = draw.normal(dim) if weighted else None
    cos, sin = cos_sin(torch.arange(position, position + rows), FREQ)
    found = TRITON.norm_rope(x, weight, cos, sin, eps=EPS, dtype=torch.float32)
    wide = None if weight is None else weight.double()
    exact = REFERENCE.norm_rope(
        x.double(), wide, cos.double(), sin.double(), eps=EPS, dtype=torch.float64
    )
    assert distance(found, exact) < 2e-6
    rounded = TRITON.norm_rope(x, weight, cos, sin, eps=EPS, dtype=torch.bfloat16)
    assert torch.equal(rounded, found.to(torch.bfloat16))


@examples(5)
@given(seed=SEEDS, rows=st.sampled_from([1, 5, 17]), position=POSITIONS)
def test_window_rows_are_normed_rotated_and_stored(seed: int, rows: int, position: int) -> None:
    draw = Draw(seed)
    layout = KvPages(page_rows=16, dim=128, nope=64)
    x, weight = draw.normal(rows, 128, dtype=torch.bfloat16), draw.normal(128)
    cos, sin = cos_sin(torch.arange(position, position + rows), FREQ)
    slots = draw.slots(rows, 48)
    found = torch.zeros(3, layout.page_bytes, dtype=torch.uint8)
    wanted = found.clone()
    for ops, pages in ((TRITON, found), (REFERENCE, wanted)):
        ops.norm_rope_quantize(x, weight, cos, sin, slots, pages, layout, eps=EPS)
    values = [
        REFERENCE.dequantize_gather(pages, slots, layout, dtype=torch.float32)
        for pages in (found, wanted)
    ]
    near(values[0], values[1], code=2**-3)


class Compressor:
    """Raw rows of two sequences, of which a first part was already absorbed into the carries."""

    def __init__(self, draw: Draw, *, ratio: int, halves: int, dim: int, start: int) -> None:
        self.ratio, self.start = ratio, start
        self.slots = ratio * 2 if halves == 2 else ratio
        self.x = 2 * halves * dim
        self.ape = draw.normal(ratio, halves * dim)
        self.norm = draw.normal(dim)
        self.dim = dim
        self.history = draw.normal(2, self.slots + 60, self.x)
        self.carry = torch.zeros(2, self.slots, self.x)

    def spans(self, at: int, counts: list[int]) -> Tensor:
        firsts = [0, counts[0]]
        return torch.tensor(
            [[firsts[n], counts[n], self.start + at, n] for n in range(2)], dtype=torch.int32
        )

    def windows(self, at: int, counts: list[int]) -> Tensor:
        found = [
            (sum(counts[:n]) + i, i, self.start + at + i, n)
            for n in range(2)
            for i in range(counts[n])
            if (self.start + at + i + 1) % self.ratio == 0
        ]
        # An empty place, as a captured graph has for a sequence without a boundary.
        return torch.tensor([*found, (-1, 0, 0, 0)], dtype=torch.int32)

    def raw(self, at: int, counts: list[int]) -> Tensor:
        return torch.cat([self.history[n, at : at + counts[n]] for n in range(2)])


@examples(6)
@given(
    seed=SEEDS,
    shape=st.sampled_from([(4, 2), (128, 1)]),
    start=st.sampled_from([0, 4, 128, 999_936]),
    first=st.integers(0, 9),
    counts=st.tuples(st.integers(0, 40), st.integers(1, 12)),
)
def test_the_compressor_continues_from_its_carry(
    seed: int, shape: tuple[int, int], start: int, first: int, counts: tuple[int, int]
) -> None:
    draw = Draw(seed)
    ratio, halves = shape
    case = Compressor(draw, ratio=ratio, halves=halves, dim=128, start=start)
    # Ratio 128 is near its border at once: the interpreter is slow.
    lead = first if ratio == 4 else first + 118
    kept = {}
    for ops in (REFERENCE, TRITON):
        carry = case.carry.clone()
        if start:
            carry.copy_(Draw(seed + 1).normal(*carry.shape))
        ops.keep_carry(case.raw(0, [lead, lead]), carry, case.spans(0, [lead, lead]), case.ape)
        kept[ops.name] = carry
    assert torch.equal(kept["triton-1"], kept["reference-1"])
    sizes = list(counts)
    raw, windows = case.raw(lead, sizes), case.windows(lead, sizes)
    place = (windows[:, 2] // ratio * ratio).long()
    cos, sin = cos_sin(place, FREQ)
    slots = torch.arange(windows.shape[0], dtype=torch.int32).flip(0)
    layout = KvPages(page_rows=2, dim=128, nope=64)
    pages = torch.zeros(windows.shape[0] // 2 + 1, layout.page_bytes, dtype=torch.uint8)
    carry = kept["triton-1"]
    found, wanted = pages.clone(), pages.clone()
    args = (raw, carry, windows, case.ape, case.norm, cos, sin)
    for ops, out in ((TRITON, found), (REFERENCE, wanted)):
        ops.compress_kv(*args, slots, out, layout, eps=EPS)
    there = slots[windows[:, 0] >= 0]
    values = [
        REFERENCE.dequantize_gather(out, there, layout, dtype=torch.float32)
        for out in (found, wanted)
    ]
    near(values[0], values[1], code=2**-3, share=0.05)
    if halves == 2:
        index = IndexPages(page_rows=2, dim=128)
        found = torch.zeros(windows.shape[0] // 2 + 1, index.page_bytes, dtype=torch.uint8)
        wanted = found.clone()
        matrix = hadamard_matrix(128)
        for ops, out in ((TRITON, found), (REFERENCE, wanted)):
            ops.compress_index(*args, matrix, slots, out, index, eps=EPS)
        assert float((found != wanted).float().mean()) < 0.05


@examples(2)
@given(seed=SEEDS, split=st.integers(1, 30))
def test_compressed_entries_do_not_depend_on_the_chunk(seed: int, split: int) -> None:
    """Bitwise: all tokens in one pass, or in two with the carry between them."""
    draw = Draw(seed)
    case = Compressor(draw, ratio=4, halves=2, dim=128, start=0)
    layout = KvPages(page_rows=64, dim=128, nope=64)
    stored = []
    for borders in ([0, 31], [0, split, 31]):
        carry, pages = case.carry.clone(), torch.zeros(1, layout.page_bytes, dtype=torch.uint8)
        for at, end in pairwise(borders):
            counts = [end - at, 0]
            windows = case.windows(at, counts)
            cos, sin = cos_sin((windows[:, 2] // 4 * 4).long(), FREQ)
            raw, slots = case.raw(at, counts), windows[:, 2] // 4
            TRITON.compress_kv(
                raw, carry, windows, case.ape, case.norm, cos, sin, slots, pages, layout, eps=EPS
            )
            TRITON.keep_carry(raw, carry, case.spans(at, counts), case.ape)
        stored.append(pages)
    assert stored[0].any()
    assert torch.equal(stored[0], stored[1])


def test_the_reference_pools_as_the_model_does() -> None:
    """One overlapping window by hand: previous first halves, own second halves."""
    draw = Draw(5)
    case = Compressor(draw, ratio=4, halves=2, dim=128, start=0)
    raw = case.history[0, :8]
    windows = torch.tensor([[7, 7, 7, 0]], dtype=torch.int32)
    cos, sin = torch.ones(1, 32), torch.zeros(1, 32)
    found = compress(raw, case.carry, windows, case.ape, torch.ones(128), cos, sin, eps=EPS)
    kv = torch.cat((raw[:4, :128], raw[4:, 128:256]))
    bias = torch.cat((case.ape[:, :128], case.ape[:, 128:]))
    score = torch.cat((raw[:4, 256:384], raw[4:, 384:])) + bias
    pooled = (torch.softmax(score, 0) * kv).sum(0).to(torch.bfloat16).float()
    assert distance(found[0], pooled / torch.sqrt((pooled * pooled).mean() + EPS)) < 1e-6


@examples(3)
@given(
    seed=SEEDS,
    shape=st.sampled_from([(1, 320), (5, 64), (17, 64)]),
    iters=st.sampled_from([1, 2, 20]),
)
def test_hyper_connections(seed: int, shape: tuple[int, int], iters: int) -> None:
    rows, width = shape
    draw = Draw(seed)
    streams = draw.normal(rows, 4, width, dtype=torch.bfloat16)
    y = draw.normal(rows, width, dtype=torch.bfloat16)
    fn = draw.normal(24, 4 * width, scale=width**-0.5)
    scale, base = draw.normal(3), draw.normal(24)
    settings_ = {"iters": iters, "eps": EPS, "norm_eps": EPS}
    found = TRITON.mhc_pre(streams, fn, scale, base, **settings_)
    exact = REFERENCE.mhc_pre(
        streams.double(), fn.double(), scale.double(), base.double(), **settings_
    )
    assert found[0].dtype == torch.bfloat16
    for part, wanted, limit in zip(found, exact, (5e-3, 2e-6, 2e-5), strict=True):
        assert distance(part, wanted) < limit
    post, comb = found[1:]
    new = TRITON.mhc_post(streams, y, post, comb)
    wide = [each.double() for each in (streams, y, post, comb)]
    assert distance(new, REFERENCE.mhc_post(*wide)) < 5e-3
    joint = TRITON.mhc_boundary(streams, y, post, comb, fn, scale, base, **settings_)
    again = TRITON.mhc_pre(new, fn, scale, base, **settings_)
    for one, two in zip(joint, (new, *again), strict=True):
        assert torch.equal(one, two)
    head = TRITON.mhc_head(streams, fn[:4], scale[:1], base[:4], eps=EPS, norm_eps=EPS)
    wide = [each.double() for each in (streams, fn[:4], scale[:1], base[:4])]
    assert distance(head, REFERENCE.mhc_head(*wide, eps=EPS, norm_eps=EPS)) < 5e-3


@examples(1)
@given(seed=SEEDS, row=st.integers(0, 18))
def test_a_row_of_a_boundary_is_independent_of_its_companions(seed: int, row: int) -> None:
    draw = Draw(seed)
    streams = draw.normal(19, 4, 320, dtype=torch.bfloat16)
    fn, scale, base = draw.normal(24, 1280), draw.normal(3), draw.normal(24)
    settings_ = {"iters": 3, "eps": EPS, "norm_eps": EPS}
    every = TRITON.mhc_pre(streams, fn, scale, base, **settings_)
    alone = TRITON.mhc_pre(streams[row : row + 1], fn, scale, base, **settings_)
    for one, two in zip(every, alone, strict=True):
        assert torch.equal(one[row], two[0])
