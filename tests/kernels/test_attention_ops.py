"""The meanings of the attention ops for devices agree with one another and with the CPU engine's
finer ops, which the whole model is proved with.
"""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ops import ReferenceOps
from kernels.reference.decode_attention import decode_attention
from kernels.reference.indexer_logits import gather_index, indexer_logits, indexer_logits_paged
from kernels.reference.mxfp4 import quantize_index, round_index
from kernels.reference.pages import IndexPages, KvPages
from kernels.reference.quantize_kv import dequantize_gather, quantize_kv
from kernels.reference.sparse_attention import dense_compressed_attention, sparse_attention
from kernels.reference.topk_blocks import topk_blocks

CPU = ReferenceOps()
SEEDS = st.integers(0, 2**31)


def test_sparse_attention_is_the_engine_s_parts_merged() -> None:
    torch.manual_seed(3)
    q, kv, sink = torch.randn(5, 4, 64), torch.randn(40, 64), torch.randn(4)
    index = torch.randint(-1, 40, (5, 24), dtype=torch.int32)
    index[2] = -1
    cos, sin = CPU.cos_sin(torch.arange(5) + 999_990, CPU.frequencies(16, 1e4, None))
    found = sparse_attention(q, kv, index, sink, cos, sin, scale=0.125)
    parts = [
        CPU.tile_part(
            q, kv[half.clamp_min(0).long()], (half < 0)[:, None].expand(5, 4, 12), scale=0.125
        )
        for half in (index[:, :12], index[:, 12:])
    ]
    wanted = CPU.rotate(CPU.merge_parts(parts, sink)[0], cos, sin, inverse=True)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
    assert not found[2].any()


@settings(max_examples=12, deadline=None)
@given(
    seed=SEEDS,
    rows=st.integers(1, 9),
    position=st.sampled_from([0, 1, 6, 7, 8, 63, 1000]),
    earlier=st.integers(0, 12),
)
def test_dense_attention_is_sparse_attention_over_all_entries(
    seed: int, rows: int, position: int, earlier: int
) -> None:
    torch.manual_seed(seed)
    window, ratio = 8, 8
    q, sink = torch.randn(rows, 2, 32), torch.randn(2)
    own = torch.randn(min(position, max(earlier, window - 1)) + rows, 32)
    entries = torch.randn((position + rows) // ratio + 3, 32)
    cos, sin = CPU.cos_sin(torch.arange(rows) + position, CPU.frequencies(8, 1e4, None))
    kind = {"entries_at": own.shape[0], "position": position, "window": window, "ratio": ratio}
    kv = torch.cat((own, entries))
    found = dense_compressed_attention(q, kv, sink, cos, sin, scale=0.2, **kind)
    lists = []
    for row in range(rows):
        t = position + row
        at = [p - (position + rows - own.shape[0]) for p in range(max(0, t - window + 1), t + 1)]
        at += [own.shape[0] + j for j in range((t + 1) // ratio)]
        lists.append(at + [-1] * (window + entries.shape[0] - len(at)))
    index = torch.tensor(lists, dtype=torch.int32)
    wanted = sparse_attention(q, kv, index, sink, cos, sin, scale=0.2)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


def test_decode_attention_reads_both_caches() -> None:
    torch.manual_seed(4)
    window, entry = (KvPages(page_rows=rows, dim=128, nope=64) for rows in (16, 4))
    pages = [
        torch.zeros(5, window.page_bytes, dtype=torch.uint8),
        torch.zeros(9, entry.page_bytes, dtype=torch.uint8),
    ]
    for each, layout in zip(pages, (window, entry), strict=True):
        slots = torch.arange(each.shape[0] * layout.page_rows, dtype=torch.int32)
        quantize_kv(torch.randn(slots.shape[0], 128), slots, each, layout)
    own = torch.randint(-1, 80, (3, 64), dtype=torch.int32)
    heavy = torch.randint(-1, 36, (3, 64), dtype=torch.int32)
    q, sink = torch.randn(3, 2, 128).double(), torch.randn(2)
    cos, sin = CPU.cos_sin(torch.arange(3), CPU.frequencies(64, 1e4, None))
    caches = (pages[0], own, window, pages[1], heavy, entry)
    found = decode_attention(q, *caches, sink, cos, sin, scale=0.1)
    rows = torch.cat(
        [
            dequantize_gather(pages[0], torch.arange(80), window, dtype=torch.float64),
            dequantize_gather(pages[1], torch.arange(36), entry, dtype=torch.float64),
        ]
    )
    index = torch.cat((own, torch.where(heavy < 0, -1, heavy + 80)), 1)
    wanted = sparse_attention(q, rows, index, sink, cos, sin, scale=0.1)
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=1e-12)


def test_index_scores_from_pages_and_from_keys_are_the_engine_s() -> None:
    torch.manual_seed(5)
    layout = IndexPages(page_rows=32, dim=128)
    pages = torch.zeros(4, layout.page_bytes, dtype=torch.uint8)
    slots = torch.arange(128, dtype=torch.int32)
    matrix = CPU.hadamard_matrix(128)
    quantize_index(torch.randn(128, 128), matrix, slots, pages, layout)
    q, scale = round_index(torch.randn(3 * 4, 128), matrix)
    weight, visible = torch.randn(3, 4), torch.tensor([0, 70, 96], dtype=torch.int32)
    folded = weight * scale.view(3, 4)
    table = torch.tensor([[2, 0, 3]] * 3, dtype=torch.int32)
    args = (q.view(3, 4, 128), folded)
    paged = indexer_logits_paged(*args, pages, table, layout, visible)
    order = (table[0].repeat_interleave(32) * 32 + torch.arange(32).repeat(3)).int()
    keys = gather_index(pages, order, layout)
    found = indexer_logits(*args, *keys, visible)
    values = (q.float() * scale[:, None]).view(3, 4, 128)
    exact = keys[0].float() * keys[1][:, None]
    wanted = CPU.index_scores(values, weight, exact, visible, key_tile=32)
    for score, maxima in (paged, found):
        torch.testing.assert_close(score, wanted, atol=1e-4, rtol=1e-5)
        assert torch.equal(maxima, score.view(3, 3, 32).amax(2))


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, entries=st.integers(1, 70), k=st.integers(1, 40), ties=st.booleans())
def test_topk_blocks_selects_what_the_engine_selects(
    seed: int, entries: int, k: int, ties: bool
) -> None:
    torch.manual_seed(seed)
    scores = torch.randn(3, entries).relu() if ties else torch.randn(3, entries)
    scores[:, ::3] *= -1.0
    visible = torch.randint(0, entries + 1, (3,), dtype=torch.int32)
    hidden = scores.masked_fill(torch.arange(entries) >= visible[:, None], float("-inf"))
    maxima = torch.empty(3, -(-entries // 32))
    found = topk_blocks(scores, maxima, visible, k)
    assert torch.equal(found.long(), CPU.select_visible(hidden, visible, k))


def test_topk_blocks_ranks_nan_last_and_both_zeros_alike() -> None:
    nan, inf = float("nan"), float("inf")
    scores = torch.tensor([[nan, -inf, -0.0, 0.0, nan, 1.0]])
    visible = torch.tensor([6], dtype=torch.int32)
    found = [topk_blocks(scores, scores, visible, k)[0].tolist() for k in range(1, 7)]
    wanted = [[5], [2, 5], [2, 3, 5], [1, 2, 3, 5], [0, 1, 2, 3, 5], [0, 1, 2, 3, 4, 5]]
    assert found == wanted
