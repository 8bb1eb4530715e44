"""The reference ops against plain definitions written out here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import ops
from kernels.reference import attention, hadamard, indexer, lanes, mhc, pool, select

torch.set_num_threads(1)


@settings(max_examples=150, deadline=None)
@given(
    scores=st.lists(st.integers(-3, 3), min_size=1, max_size=40),
    k=st.integers(1, 45),
)
def test_topk_ties_go_to_the_lowest_index(scores: list[int], k: int) -> None:
    x = torch.tensor([scores], dtype=torch.float32)
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    assert select.topk_lowest(x, k)[0].tolist() == sorted(order[:k])


@settings(max_examples=100, deadline=None)
@given(
    scores=st.lists(st.integers(-2, 2), min_size=1, max_size=40),
    k=st.integers(1, 20),
    data=st.data(),
)
def test_selection_keeps_to_what_is_visible(scores: list[int], k: int, data: st.DataObject) -> None:
    visible = data.draw(st.integers(0, len(scores)))
    x = torch.tensor([scores], dtype=torch.float32)
    x[0, visible:] = float("-inf")
    order = sorted(range(visible), key=lambda i: (-scores[i], i))
    wanted = sorted(order[:k])
    got = select.select_visible(x, torch.tensor([visible]), k)[0].tolist()
    assert got == wanted + [-1] * (k - len(wanted))


@given(power=st.integers(0, 8), seed=st.integers(0, 1000))
def test_hadamard_is_orthogonal_and_undoes_itself(power: int, seed: int) -> None:
    size = 1 << power
    signs = hadamard.hadamard_matrix(size)
    assert torch.equal(signs @ signs.t(), size * torch.eye(size))
    x = torch.randn(16, size, generator=torch.Generator().manual_seed(seed))
    twice = hadamard.hadamard(hadamard.hadamard(x, signs), signs)
    assert torch.allclose(twice, x, atol=1e-5)


def test_hadamard_refuses_what_is_no_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        hadamard.hadamard_matrix(96)


@given(rows=st.integers(1, 40), columns=st.integers(1, 9), seed=st.integers(0, 99))
def test_elementwise_ops_do_not_depend_on_their_neighbours(
    rows: int, columns: int, seed: int
) -> None:
    x = 4 * torch.randn(64, columns, generator=torch.Generator().manual_seed(seed))
    for op in (lanes.exp, lanes.sigmoid, lanes.silu, lanes.softplus):
        assert torch.equal(op(x[3 : 3 + rows]), op(x)[3 : 3 + rows])


@pytest.mark.parametrize("rows", [1, 16, 512])
def test_t7_sinkhorn_follows_the_written_order(rows: int) -> None:
    comb = torch.randn(4, 4, rows)
    eps = 1e-6
    wanted = torch.exp(comb - comb.amax(1, keepdim=True))
    wanted = wanted / (wanted[:, 0] + wanted[:, 1] + wanted[:, 2] + wanted[:, 3])[:, None] + eps
    wanted = wanted / (wanted[0] + wanted[1] + wanted[2] + wanted[3] + eps)
    for _ in range(19):
        total = wanted[:, 0] + wanted[:, 1] + wanted[:, 2] + wanted[:, 3]
        wanted = wanted / (total + eps)[:, None]
        wanted = wanted / (wanted[0] + wanted[1] + wanted[2] + wanted[3] + eps)
    got = mhc.sinkhorn(comb.clone(), iters=20, eps=eps)
    assert torch.equal(got, wanted)
    assert torch.allclose(got.sum(0), torch.ones(4, rows), atol=1e-4)
    graph = comb.clone().requires_grad_()
    assert torch.equal(mhc.sinkhorn(graph, iters=20, eps=eps).detach(), wanted)


def test_t7_streams_mix_over_the_first_index() -> None:
    streams, y = torch.randn(16, 4, 8), torch.randn(16, 8)
    post, comb = torch.randn(4, 16), torch.randn(4, 4, 16)
    wanted = torch.einsum("kr,rd->rkd", post, y) + torch.einsum("jkr,rjd->rkd", comb, streams)
    assert torch.allclose(mhc.expand(streams, y, post, comb), wanted, atol=1e-5)


def test_pooling_ignores_an_empty_previous_window() -> None:
    kv, score = torch.randn(16, 8, 4), torch.randn(16, 8, 4)
    kv[:, :4], score[:, :4] = 0.0, float("-inf")
    wanted = (torch.softmax(score[:, 4:], 1) * kv[:, 4:]).sum(1)
    assert torch.allclose(pool.pool_windows(kv, score), wanted, atol=1e-6)


@pytest.mark.parametrize("visible", [0, 1, 127, 128, 129, 300])
def test_parts_share_one_softmax_with_the_sink(visible: int) -> None:
    q, keys, window = torch.randn(16, 32), torch.randn(3, 128, 32), torch.randn(1, 32, 32)
    sink = torch.randn(1)
    hidden = torch.arange(32).expand(1, 16, 32) < 5
    parts = [
        attention.tile_part(q[None], window, hidden, scale=0.2),
        attention.dense_part(q, keys, torch.full((16,), visible), scale=0.2),
    ]
    first = parts[0]
    flat = attention.Part(first.top[0, :, None], first.norm[0, :, None], first.out[0, :, None])
    second = parts[1]
    other = attention.Part(second.top[:, None], second.norm[:, None], second.out[:, None])
    got, _, _ = attention.merge_parts([flat, other], sink)
    every = torch.cat((window[0, 5:], keys.view(-1, 32)[:visible]))
    logits = torch.cat((0.2 * q @ every.t(), sink.expand(16, 1)), 1)
    wanted = torch.softmax(logits, 1)[:, :-1] @ every
    assert torch.allclose(got[:, 0], wanted, atol=1e-5)


def test_t16_index_scores_apply_relu_per_head() -> None:
    q, weight, keys = torch.randn(16, 3, 32), torch.randn(16, 3), torch.randn(1024, 32)
    visible = torch.arange(16) * 60
    got = indexer.index_scores(q, weight, keys, visible)
    wanted = torch.einsum("rhc,ec->rhe", q, keys).relu().mul(weight[..., None]).sum(1)
    seen = torch.arange(1024) < visible[:, None]
    assert torch.allclose(got[seen], wanted[seen], atol=1e-4)
    assert (got[~seen] == float("-inf")).all()


def test_backends_are_named_and_refused_by_name() -> None:
    assert ops.load(environ={}).name.startswith("native-")
    assert ops.load(environ={ops.BACKEND_VARIABLE: "native"}).name.startswith("native-")
    assert ops.load(environ={ops.BACKEND_VARIABLE: "reference"}).name == "reference-2"
    with pytest.raises(ops.BackendError, match="no ops for the engine on a CPU"):
        ops.load("triton")
    with pytest.raises(ops.BackendError, match="must be one of"):
        ops.load(environ={ops.BACKEND_VARIABLE: "cuda"})
