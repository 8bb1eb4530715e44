"""The native kernels against the reference's meaning, and each row against itself alone."""

from __future__ import annotations

import platform
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.native import build
from kernels.native.build import BuildError, load_library
from kernels.native.ops import NativeOps
from kernels.ops import ReferenceOps
from kernels.reference.attend import AttendSpan
from kernels.reference.mhc import HyperWeights
from kernels.reference.moe import add_branches, part_size

torch.set_num_threads(1)
NATIVE, REFERENCE = NativeOps(), ReferenceOps()
SEEDS = st.integers(0, 2**31)


def normal(seed: int, *shape: int, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 260),
    k=st.integers(1, 90),
    n=st.integers(1, 200),
    bf16=st.booleans(),
    seed=SEEDS,
)
def test_a_row_of_a_product_is_alone(rows: int, k: int, n: int, bf16: bool, seed: int) -> None:
    weight, x = normal(seed, n, k), normal(seed + 1, rows, k)
    weight = weight.bfloat16().float() if bf16 else weight
    packed = NATIVE.pack(weight)
    assert packed.bf16 == bf16
    whole = NATIVE.product(x, packed)
    assert torch.allclose(whole, x @ weight.t(), atol=1e-4)
    for first, count in ((0, 1), (rows // 2, 1), (rows // 3, max(rows // 2, 1)), (rows - 1, 1)):
        part = NATIVE.product(x[first : first + count], packed)
        assert torch.equal(part, whole[first : first + count])


def hyper(seed: int, width: int) -> HyperWeights:
    return HyperWeights(
        fn=normal(seed, 24, 4 * width, scale=0.1),
        base=normal(seed + 1, 24),
        scale=normal(seed + 2, 3).abs(),
        streams=4,
        iters=20,
        eps=1e-6,
        norm_eps=1e-6,
    )


@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 112), width=st.sampled_from([16, 48, 128]), seed=SEEDS)
def test_t7_hyper_connections(rows: int, width: int, seed: int) -> None:
    gates, norm = hyper(seed, width), 1 + normal(seed + 3, width, scale=0.1)
    streams, y = normal(seed + 4, 112, 4, width), normal(seed + 5, 112, width)
    packed = NATIVE.prepare_mhc(gates)
    x, mixed = NATIVE.enter(streams[:rows], packed, norm)
    wanted, their = REFERENCE.enter(streams, gates, norm)
    assert torch.allclose(x, wanted[:rows], atol=2e-5)
    out = NATIVE.leave(streams[:rows], packed, mixed, y[:rows])
    assert torch.allclose(out, REFERENCE.leave(streams, gates, their, y)[:rows], atol=2e-4)
    alone, its = NATIVE.enter(streams[rows - 1 : rows], packed, norm)
    assert torch.equal(alone[0], x[-1])
    last = NATIVE.leave(streams[rows - 1 : rows], packed, its, y[rows - 1 : rows])
    assert torch.equal(last[0], out[-1])
    over = streams[:rows].clone()
    again = NATIVE.leave(over, packed, mixed, y[:rows], in_place=True)
    assert again.data_ptr() == over.data_ptr() and torch.equal(again, out)


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, exponent=st.integers(-30, 30), nope=st.sampled_from([448, 64, 32, 0]))
def test_t28_fp8_rounding_is_the_reference_s(seed: int, exponent: int, nope: int) -> None:
    x = normal(seed, 7, nope + 64, scale=2.0**exponent)
    x[:, ::5] = 0.0
    x[2] *= 2.0**-13
    assert torch.equal(NATIVE.fp8_round(x, nope), REFERENCE.fp8_round(x, nope))


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, exponent=st.integers(-30, 30), channels=st.sampled_from([32, 64, 128]))
def test_index_rounding_is_stable_and_near(seed: int, exponent: int, channels: int) -> None:
    x = normal(seed, 5, channels, scale=2.0**exponent)
    signs = REFERENCE.hadamard_matrix(channels)
    rounded = NATIVE.index_round(x, signs)
    # Whatever the last bits of the rotation: the result is a row of the FP4 grid.
    assert torch.equal(REFERENCE.fp4_round(rounded), rounded)
    step = REFERENCE.hadamard(x, signs).abs().amax() / 4
    assert (rounded - REFERENCE.hadamard(x, signs)).abs().max() <= step


def test_fp4_ties_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -5.0, -3.5, 1.1])
    row = torch.nn.functional.pad(ties, (0, 20))[None]
    signs = REFERENCE.hadamard_matrix(32)
    turned = REFERENCE.hadamard(row, signs)
    back = NATIVE.index_round(turned, signs)[0, :12]
    assert back[[0, 1, 2, 3, 4, 5, 6, 7]].tolist() == pytest.approx(
        REFERENCE.fp4_round(row)[0, :8].tolist(), abs=1.01
    )
    assert REFERENCE.fp4_round(row)[0, :8].tolist() == [0, 1, 1, 2, 2, 4, 4, 6]


@settings(max_examples=30, deadline=None)
@given(
    heads=st.sampled_from([1, 2, 5, 8]),
    kind=st.sampled_from(["window", "heavy", "selected"]),
    position=st.integers(0, 90),
    count=st.integers(1, 40),
    window=st.sampled_from([8, 16, 24, 128]),
    seed=SEEDS,
)
def test_attention_is_the_reference_s_and_each_row_alone(
    heads: int, kind: str, position: int, count: int, window: int, seed: int
) -> None:
    dim, ratio, scale = 48, {"window": 0, "heavy": 8, "selected": 4}[kind], 0.2
    q = normal(seed, count, heads, dim)
    history = normal(seed + 1, window + count, dim)
    # Before position 0 there is nothing, whatever lies there.
    history[: max(window - position, 0)] = 1e3
    entries, sink = normal(seed + 2, 128, dim), normal(seed + 3, heads)
    picked = None
    if kind == "selected":
        visible = (torch.arange(position, position + count) + 1) // ratio
        scores = normal(seed + 4, count, 128)
        scores.masked_fill_(torch.arange(128) >= visible[:, None], float("-inf"))
        picked = REFERENCE.select_visible(scores, visible, 6)
    span = AttendSpan(0, count, position, history, entries)
    asked = {"window": window, "ratio": ratio, "picked_RK": picked, "scale": scale}
    out, top, norm = NATIVE.attend(q, [span], sink, **asked)
    wanted = REFERENCE.attend(REFERENCE.pad_rows(q), [span], sink, **asked)
    for got, their in zip((out, top, norm), wanted, strict=True):
        assert torch.allclose(got, their[:count], atol=1e-5, rtol=1e-5)
    for row in {0, count // 2, count - 1}:
        own = AttendSpan(0, 1, position + row, history[: window + row + 1], entries)
        mine = None if picked is None else picked[row : row + 1]
        alone = NATIVE.attend(q[row : row + 1], [own], sink, **{**asked, "picked_RK": mine})
        assert torch.equal(alone[0][0], out[row]) and torch.equal(alone[2][0], norm[row])
        if picked is not None:
            facts = (entries, picked[row], top[row], norm[row])
            mass = NATIVE.entry_masses(q[row], *facts, scale=scale)
            assert torch.allclose(
                mass, REFERENCE.entry_masses(q[row], *facts, scale=scale), atol=1e-6
            )


def drawn_scores(seed: int, rows: int, entries: int, shape: str) -> torch.Tensor:
    """Of the kinds that a choice of the best has to live with."""
    scores = normal(seed, rows, entries, scale=3.0)
    match shape:
        case "ties":
            return scores.round()
        case "zeros":
            return scores.clamp_min(0.0) * torch.where(scores > -1, 1.0, -1.0)
        case "rising":
            return scores.sort(1).values
        case "falling":
            return scores.sort(1, descending=True).values
        case "wide":
            return scores * torch.exp2(normal(seed + 1, rows, entries, scale=30.0))
        case _:
            return scores


@settings(max_examples=120, deadline=None)
@given(
    rows=st.integers(1, 5),
    entries=st.one_of(st.integers(1, 400), st.integers(401, 3000)),
    k=st.integers(1, 300),
    shape=st.sampled_from(["plain", "ties", "zeros", "rising", "falling", "wide"]),
    seed=SEEDS,
    data=st.data(),
)
def test_selection_is_the_reference_s_ties_included(
    rows: int, entries: int, k: int, shape: str, seed: int, data: st.DataObject
) -> None:
    scores = drawn_scores(seed, rows, entries, shape)
    visible = torch.tensor(
        data.draw(st.lists(st.integers(0, entries), min_size=rows, max_size=rows))
    )
    masked = scores.masked_fill(torch.arange(entries) >= visible[:, None], float("-inf"))
    assert torch.equal(
        NATIVE.select_visible(scores, visible, k), REFERENCE.select_visible(masked, visible, k)
    )


def test_selection_takes_any_number_there_is() -> None:
    """Infinite scores are ordered like others, and one that is no number breaks nothing."""
    scores = normal(5, 4, 1000)
    scores[0, ::2], scores[1] = float("-inf"), float("inf")
    scores[2, ::3], scores[3] = float("nan"), float("nan")
    visible = torch.tensor([1000, 999, 1000, 700])
    picked = NATIVE.select_visible(scores, visible, 130)
    assert torch.equal(picked[:2], REFERENCE.select_visible(scores[:2], visible[:2], 130))
    assert bool((picked[:, 1:] > picked[:, :-1]).all()) and bool((picked < visible[:, None]).all())


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 20),
    heads=st.sampled_from([1, 2, 6, 8, 15, 32]),
    channels=st.sampled_from([16, 32, 48, 128]),
    entries=st.integers(1, 300),
    seed=SEEDS,
    data=st.data(),
)
def test_t16_index_scores(
    rows: int, heads: int, channels: int, entries: int, seed: int, data: st.DataObject
) -> None:
    """Keys lie in panels of 32: a key's score is that of the key alone, wherever it lies."""
    q, weight = normal(seed, rows, heads, channels), normal(seed + 1, rows, heads)
    keys = normal(seed + 2, entries, channels)
    seen = data.draw(st.lists(st.integers(1, entries), min_size=rows, max_size=rows))
    visible = torch.tensor(seen)
    got = NATIVE.index_scores(q, weight, keys, visible)
    wanted = REFERENCE.index_scores(q, weight, keys, visible, key_tile=entries)
    first = data.draw(st.integers(0, entries - 1))
    for row, count in enumerate(seen):
        assert torch.allclose(got[row, :count], wanted[row, :count], atol=1e-3)
        mine = slice(row, row + 1)
        alone = NATIVE.index_scores(q[mine], weight[mine], keys, visible[mine])
        assert torch.equal(alone[0, :count], got[row, :count])
        if first < count:
            later = NATIVE.index_scores(q[mine], weight[mine], keys[first:], visible[mine] - first)
            assert torch.equal(later[0, : count - first], got[row, first:count])


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    experts=st.sampled_from([1, 4, 24]),
    width=st.sampled_from([16, 40]),
    hashed=st.booleans(),
    seed=SEEDS,
)
def test_t9_experts_and_routing(
    rows: int, experts: int, width: int, hashed: bool, seed: int
) -> None:
    d, k, limit = 32, min(experts, 3), 0.7
    x = normal(seed, rows, d)
    logits, bias = normal(seed + 1, rows, experts, scale=12.0), normal(seed + 2, experts)
    table = None
    if hashed:
        # With repetitions: a table may name an expert twice.
        table = torch.randint(0, experts, (rows, k), generator=torch.Generator().manual_seed(seed))
        table = table.sort(1).values
    args = (None if hashed else bias, table, k)
    ids, weights = NATIVE.route(logits, *args, scale=1.5)
    their_ids, their_weights = REFERENCE.route(logits, *args, scale=1.5)
    assert torch.equal(ids, their_ids)
    assert torch.allclose(weights, their_weights, rtol=1e-5, atol=1e-7)
    w13 = [normal(seed + 10 + e, 2 * width, d) for e in range(experts + 1)]
    w2 = [normal(seed + 90 + e, d, width) for e in range(experts + 1)]
    pairs = [(NATIVE.pack(a), NATIVE.pack(b)) for a, b in zip(w13, w2, strict=True)]
    unit = part_size(experts)
    stack = NATIVE.stack_experts(pairs[:-1], pairs[-1], first=0, unit=unit)
    out = NATIVE.experts(x, ids, weights, stack, limit=limit)
    wanted = torch.zeros_like(x)
    for row in range(rows):
        for expert, weight in [*zip(ids[row].tolist(), weights[row], strict=True), (experts, 1.0)]:
            inner = REFERENCE.swiglu(w13[expert] @ x[row], limit=limit) * weight
            wanted[row] += w2[expert] @ inner
    assert torch.allclose(out, wanted, atol=2e-3, rtol=1e-4)
    last = slice(rows - 1, rows)
    alone = NATIVE.experts(x[last], ids[last], weights[last], stack, limit=limit)
    assert torch.equal(alone[0], out[-1])
    # Expert ranks, and every rank's part of the inner channels and of the outputs: the same bits.
    for tp, ep in ((1, 1), (2, 1), (4, 2), (1, 4)):
        if experts % ep == 0:
            cut = cut_experts(w13, w2, tp, ep)
            assert torch.equal(on_ranks(cut, x, ids, weights, experts, limit=limit), out), (tp, ep)


Cut = list[list[list[tuple[torch.Tensor, torch.Tensor]]]]


def cut_experts(w13: list[torch.Tensor], w2: list[torch.Tensor], tp: int, ep: int) -> Cut:
    """[ep rank][tp rank]: that rank's experts, and the shared one (cut over all of them)."""

    def part(
        a: torch.Tensor, b: torch.Tensor, ways: int, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = (half.chunk(ways)[rank] for half in a.chunk(2))
        return torch.cat((gate, up)), b.chunk(ways)[rank]

    each = (len(w13) - 1) // ep
    return [
        [
            [part(w13[e], w2[e], tp, rank) for e in range(branch * each, branch * each + each)]
            + [part(w13[-1], w2[-1], tp * ep, branch * tp + rank)]
            for rank in range(tp)
        ]
        for branch in range(ep)
    ]


def on_ranks(
    cut: Cut,
    x: torch.Tensor,
    ids: torch.Tensor,
    weights: torch.Tensor,
    experts: int,
    *,
    limit: float,
) -> torch.Tensor:
    """What the ranks exchange, done by hand (model.layers.moe)."""
    each = experts // len(cut)
    stacks = []
    for branch, plane in enumerate(cut):
        packed = [[(NATIVE.pack(a), NATIVE.pack(b)) for a, b in rank] for rank in plane]
        first, unit = branch * each, part_size(experts)
        stacks.append([NATIVE.stack_experts(p[:-1], p[-1], first=first, unit=unit) for p in packed])
    made = [[NATIVE.experts_up(x, ids, weights, s, limit=limit) for s in row] for row in stacks]
    shared = torch.cat([its for row in made for _, its in row], 1)
    branches, columns = [], []
    for row, stack in zip(made, stacks, strict=True):
        inner = torch.cat([routed for routed, _ in row], 1)
        done = [NATIVE.experts_down(inner, shared, ids, s) for s in stack]
        branches.append(torch.cat([routed for routed, _ in done], 1))
        columns += [its for _, its in done]
    return add_branches(branches) + torch.cat(columns, 1)


@settings(max_examples=60, deadline=None)
@given(
    experts=st.integers(1, 40),
    ep=st.sampled_from([1, 2, 4, 8]),
    rows=st.integers(1, 9),
    k=st.integers(1, 7),
    seed=SEEDS,
)
def test_a_rank_s_experts_are_a_branch_of_the_sum(
    experts: int, ep: int, rows: int, k: int, seed: int
) -> None:
    """The reference's definition: 2, 4 or 8 ranks add what one rank adds, to the bit."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, experts, (rows, k), generator=generator).sort(1).values
    y = normal(seed, rows, k, 16) * torch.exp2(normal(seed + 1, rows, k, 16, scale=9.0))
    whole = REFERENCE.add_experts(y, ids, experts=experts)
    assert torch.allclose(whole, y.sum(1), rtol=1e-3, atol=1e-3)
    if experts % ep:
        return
    rank = ids * ep // experts
    branches = [
        REFERENCE.add_experts(torch.where((rank == r)[:, :, None], y, 0.0), ids, experts=experts)
        for r in range(ep)
    ]
    assert torch.equal(add_branches(branches), whole)


@pytest.mark.parametrize("windows", [1, 3, 40])
def test_pooling_and_norms(windows: int) -> None:
    kv, score = normal(1, windows, 8, 32), normal(2, windows, 8, 32, scale=5.0)
    kv[0, :4], score[0, :4] = 0.0, float("-inf")
    got = NATIVE.pool_windows(kv, score)
    assert torch.allclose(got, REFERENCE.pool_windows(kv, score), atol=1e-5)
    position = torch.arange(windows) * 999_983 % 1_000_000
    freq = REFERENCE.frequencies(32, 10000.0, None)
    x, weight = normal(3, windows, 2, 48), 1 + normal(4, 48, scale=0.1)
    mine = NATIVE.norm_rotate(x, weight, *NATIVE.cos_sin(position, freq), eps=1e-6)
    their = REFERENCE.norm_rotate(x, weight, *REFERENCE.cos_sin(position, freq), eps=1e-6)
    assert torch.allclose(mine, their, atol=1e-5)
    back = NATIVE.rotate(
        NATIVE.rotate(x, *NATIVE.cos_sin(position, freq)),
        *NATIVE.cos_sin(position, freq),
        inverse=True,
    )
    assert torch.allclose(back, x, atol=1e-5)


def test_exp_and_log_are_near_to_an_ulp_over_their_whole_range() -> None:
    x = torch.linspace(-90, 20, 64_000).view(-1, 16)
    ids = torch.zeros((4000, 16), dtype=torch.int64)
    ids[:] = torch.arange(16)
    # sqrt(softplus(x)) of 16 experts, without normalisation: through the routing weights.
    _, weights = NATIVE.route(x, None, ids, 16, scale=1.0)
    wanted = torch.nn.functional.softplus(x.double()).sqrt()
    wanted = wanted / wanted.sum(1, keepdim=True)
    assert torch.allclose(weights.double(), wanted, rtol=2e-6, atol=0.0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator")
def test_buffers_are_not_taken_from_the_system_again_and_again() -> None:
    """Opening the kernels keeps freed memory: new pages cost more than what is computed in them."""

    def come_and_go(times: int) -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(times):
            buffers = [torch.ones(1 << 21) for _ in range(3)]
            del buffers
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    come_and_go(2)
    # 24 MiB are 6,144 pages, each time.
    assert come_and_go(10) < 6144


def test_no_compiler_is_one_sentence(tmp_path: object) -> None:
    with pytest.raises(BuildError, match="no C compiler"):
        load_library(environ={"CC": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)})
    with pytest.raises(BuildError, match="failed"):
        load_library(environ={"CC": "false", "XDG_CACHE_HOME": str(tmp_path)})


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the narrower set is x86's")
def test_narrower_vectors_give_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without AVX-512 other code runs; sums over the same sixteen lanes come out the same."""
    other = {"-march=native": "-march=x86-64-v3", "-O3": "-O1"}
    monkeypatch.setattr(build, "FLAGS", tuple(other.get(flag, flag) for flag in build.FLAGS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    narrow = NativeOps()
    assert narrow.name != NATIVE.name
    q, weight, keys = normal(1, 9, 5, 48), normal(2, 9, 5), normal(3, 700, 48)
    visible = torch.arange(9) * 80 + 30
    scores = NATIVE.index_scores(q, weight, keys, visible)
    theirs = narrow.index_scores(q, weight, keys, visible)
    for row, seen in enumerate(visible.tolist()):
        assert torch.equal(scores[row, :seen], theirs[row, :seen])
    for shape in ("plain", "ties", "rising"):
        drawn = drawn_scores(4, 9, 700, shape)
        assert torch.equal(
            NATIVE.select_visible(drawn, visible, 40), narrow.select_visible(drawn, visible, 40)
        )
    x, matrix = normal(5, 21, 48), normal(6, 70, 48)
    assert torch.equal(
        NATIVE.product(x, NATIVE.pack(matrix)), narrow.product(x, narrow.pack(matrix))
    )
    history, entries, sink = normal(7, 37, 48), normal(8, 128, 48), normal(9, 5)
    span = AttendSpan(0, 9, 300, history, entries)
    asked = {"window": 24, "ratio": 8, "picked_RK": None, "scale": 0.2}
    assert torch.equal(
        NATIVE.attend(q, [span], sink, **asked)[0], narrow.attend(q, [span], sink, **asked)[0]
    )
