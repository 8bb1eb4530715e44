"""The measured calls of attention, index scores and selection; see bench/kernels_cases.py.

Shape suffixes as in the ops' references.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.kernels_work import (
    INDEX_PAGES,
    KV_PAGES,
    Case,
    Ops,
    Work,
    angles,
    distance,
    empty_pages,
    normal,
    numbered,
)
from kernels.reference.pages import KvPages

_SCALE = 512**-0.5
_LIMIT = 1e-2
"""Weights are rounded to bfloat16 before they meet the values, as in the release."""


def _sparse(device: torch.device, tiny: bool, *, heads: int, keys: int) -> Work:
    rows, heads, keys, store = (2, 16, 64, 80) if tiny else (4096, heads, keys, 16384)
    q, kv = normal(device, rows, heads, 512), normal(device, store, 512)
    cos, sin = angles(device, rows)
    index = torch.randint(0, store, (rows, keys), dtype=torch.int32, device=device)
    index[:, -3:] = -1
    sink = torch.randn(heads, device=device)

    def call(ops: Ops) -> Tensor:
        return ops.sparse_attention(q, kv, index, sink, cos, sin, scale=_SCALE)

    def error(ops: Ops) -> float:
        few = slice(0, 4)
        found = ops.sparse_attention(q[few], kv, index[few], sink, cos[few], sin[few], scale=_SCALE)
        wide, turn = (q[few].double(), kv.double()), (cos[few], sin[few])
        exact = Ops.sparse_attention(*wide, index[few], sink, *turn, scale=_SCALE)
        return distance(found, exact)

    moved = 2 * 2 * q.numel() + 2 * kv.numel()
    return Work(call, error, _LIMIT, moved, 4.0 * rows * heads * keys * 512, "bf16")


def _dense(device: torch.device, tiny: bool, *, heads: int, position: int) -> Work:
    rows, heads, position = (2, 16, 255) if tiny else (1024, heads, position)
    entries = (position + rows) // 128
    own = min(position + rows, rows + 127)
    kv = normal(device, own + entries, 512)
    q, (cos, sin), sink = (
        normal(device, rows, heads, 512),
        angles(device, rows),
        torch.randn(heads, device=device),
    )
    kind: dict[str, Any] = {"entries_at": own, "window": 128, "ratio": 128}

    def call(ops: Ops) -> Tensor:
        return ops.dense_compressed_attention(
            q, kv, sink, cos, sin, position=position, scale=_SCALE, **kind
        )

    def error(ops: Ops) -> float:
        few = slice(rows - 2, rows)
        found = call(ops)[few]
        # The last two tokens alone: their window ends the run, their entries are all of it.
        wide, turn = (q[few].double(), kv.double()), (cos[few], sin[few])
        exact = Ops.dense_compressed_attention(
            *wide, sink, *turn, position=position + rows - 2, scale=_SCALE, **kind
        )
        return distance(found, exact)

    seen = 128 + entries - rows / 256
    moved = 4 * q.numel() + 2 * kv.numel()
    return Work(call, error, _LIMIT, moved, 4.0 * rows * heads * seen * 512, "bf16")


def _decode(device: torch.device, tiny: bool, *, rows: int, keys: int, chunk: int) -> Work:
    rows, heads, keys = (1, 16, 64) if tiny else (rows, 64, keys)
    own = 64 if tiny else 128
    window = KvPages(page_rows=256, dim=512, nope=448)
    store = 256 if tiny else 65536
    caches = []
    for layout in (window, KV_PAGES):
        pages, slots = empty_pages(device, store, layout), numbered(device, store)
        Ops.quantize_kv(normal(device, store, 512), slots, pages, layout)
        caches.append(pages)
    lists = [
        torch.randint(0, store, (rows, n), dtype=torch.int32, device=device) for n in (own, keys)
    ]
    q, (cos, sin) = normal(device, rows, heads, 512), angles(device, rows)
    sink = torch.randn(heads, device=device)
    args = (caches[0], lists[0], window, caches[1], lists[1], KV_PAGES, sink, cos, sin)

    def call(ops: Ops) -> Tensor:
        return ops.decode_attention(q, *args, scale=_SCALE, chunk=chunk)

    def error(ops: Ops) -> float:
        return distance(call(ops), Ops.decode_attention(q.double(), *args, scale=_SCALE))

    count = rows * (own + keys)
    flops = 4.0 * count * heads * 512
    return Work(call, error, _LIMIT, count * 584 + 4 * q.numel(), flops, "bf16")


def _codes(device: torch.device, *shape: int) -> Tensor:
    return normal(device, *shape).to(torch.float8_e4m3fn)


def _logits(device: torch.device, tiny: bool) -> Work:
    rows, heads, entries = (3, 16, 128) if tiny else (1024, 64, 16384)
    q, keys = _codes(device, rows, heads, 128), _codes(device, entries, 128)
    weight, scale = torch.randn(rows, heads, device=device), torch.rand(entries, device=device)
    visible = torch.full((rows,), entries, dtype=torch.int32, device=device)

    def call(ops: Ops) -> tuple[Tensor, Tensor]:
        return ops.indexer_logits(q, weight, keys, scale, visible)

    def error(ops: Ops) -> float:
        exact = Ops.indexer_logits(q[:2], weight[:2].double(), keys, scale.double(), visible[:2])
        return max(distance(f[:2], e) for f, e in zip(call(ops), exact, strict=True))

    moved = rows * entries * 4.125 + q.numel() + keys.numel()
    return Work(call, error, 1e-3, moved, 2.0 * rows * entries * heads * 128, "e4m3")


def _logits_paged(device: torch.device, tiny: bool) -> Work:
    rows, heads, places = (1, 16, 2) if tiny else (1, 64, 4096)
    entries = places * INDEX_PAGES.page_rows
    pages = torch.randint(
        0, 128, (places, INDEX_PAGES.page_bytes), dtype=torch.uint8, device=device
    )
    # Codes may be any bits; scales lie near 1.
    pages[:, INDEX_PAGES.page_rows * INDEX_PAGES.data_bytes :] &= 3
    pages[:, INDEX_PAGES.page_rows * INDEX_PAGES.data_bytes :] += 124
    table = torch.randperm(places, device=device).to(torch.int32).expand(rows, -1).contiguous()
    q, weight = _codes(device, rows, heads, 128), torch.randn(rows, heads, device=device)
    visible = torch.full((rows,), entries, dtype=torch.int32, device=device)

    def call(ops: Ops) -> tuple[Tensor, Tensor]:
        return ops.indexer_logits_paged(q, weight, pages, table, INDEX_PAGES, visible)

    def error(ops: Ops) -> float:
        exact = Ops.indexer_logits_paged(q, weight, pages, table, INDEX_PAGES, visible)
        return max(distance(f, e) for f, e in zip(call(ops), exact, strict=True))

    return Work(call, error, 1e-3, rows * entries * (68 + 4.125))


def _topk(device: torch.device, tiny: bool, *, rows: int, entries: int, k: int) -> Work:
    rows, entries, k = (2, 200, 4) if tiny else (rows, entries, k)
    scores = torch.randn(rows, entries, device=device).relu()
    visible = torch.full((rows,), entries, dtype=torch.int32, device=device)
    padded = torch.nn.functional.pad(scores, (0, -entries % 32), value=float("-inf"))
    maxima = padded.view(rows, -1, 32).amax(2)

    def call(ops: Ops) -> Tensor:
        return ops.topk_blocks(scores, maxima, visible, k)

    def error(ops: Ops) -> float:
        return float((call(ops) != call(Ops())).sum())

    return Work(call, error, 0.0, rows * entries * 4)


CASES = (
    Case(
        "sparse_attention, Flash",
        partial(_sparse, heads=64, keys=640),
        target=0.45,
        published="640 TFLOP/s (H800)",
    ),
    Case(
        "sparse_attention, Pro",
        partial(_sparse, heads=128, keys=1152),
        target=0.45,
        published="640 TFLOP/s (H800)",
    ),
    Case(
        "dense_compressed_attention, 1M",
        partial(_dense, heads=64, position=1_047_552),
        target=0.5,
        published="660 TFLOP/s (H800)",
    ),
    Case(
        "decode_attention, 1 row",
        partial(_decode, rows=1, keys=512, chunk=128),
        target_us=15.0,
    ),
    Case(
        "decode_attention, 128 rows",
        partial(_decode, rows=128, keys=512, chunk=1152),
        target=0.2,
        published="410 TFLOP/s (H800)",
    ),
    Case(
        "decode_attention, HCA 1M, 1 row",
        partial(_decode, rows=1, keys=8192, chunk=128),
        target_us=15.0,
    ),
    Case("indexer_logits, e4m3", _logits, target=0.5),
    Case("indexer_logits_paged, 1M", _logits_paged, target=0.75),
    Case(
        "topk_blocks, 512 of 16384",
        partial(_topk, rows=1024, entries=16384, k=512),
    ),
    Case(
        "topk_blocks, 1024 of 262144",
        partial(_topk, rows=8, entries=262144, k=1024),
        target_us=45.0,
        published="16-30 us (GB300, 131072)",
    ),
)
