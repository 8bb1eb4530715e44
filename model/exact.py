"""Start-up check of the numerics class `exact` on the machine at hand.

Which matrix shapes a BLAS computes row by row alike is a property of the library and the CPU, so it
is measured, not assumed: each product that the model uses runs with several row (or batch) counts,
and every row must come out bit for bit the same. If whole products fail, tiles of 16 rows are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.reference.attend import QUERY_TILE
from kernels.reference.indexer import KEY_TILE as INDEX_TILE
from kernels.reference.lanes import ROW_MULTIPLE, round_up
from model.cache import ENTRY_TILE
from model.config import ModelConfig
from model.grid import Grid
from penstock.errors import ModelLoadError

_ROW_COUNTS = (16, 32, 48, 64, 80, 128, 144, 256)
_ROW_TOTAL = 1040
_BATCH_COUNTS = (1, 2, 3, 5, 16, 33)
_BATCH_TOTAL = 64
_MOST_ELEMENTS = 1 << 22


def row_tile_for(
    shapes: Iterable[tuple[int, int]],
    dtype: torch.dtype,
    real: Mapping[tuple[int, int], Tensor] | None = None,
) -> int | None:
    """None if products of (K, N) may take any multiple of 16 rows, else the tile that they need.

    `real`: weights [N, K] of some shapes, used in place of random ones: an output head's would be
    gigabytes.
    """
    wanted = sorted(set(shapes))
    weights = dict(real or {})
    if all(_rows_alike(k, n, dtype, F.linear, weights.get((k, n))) for k, n in wanted):
        return None

    def tiled(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([F.linear(part, weight) for part in torch.split(x, ROW_MULTIPLE)])

    for k, n in wanted:
        if not _rows_alike(k, n, dtype, tiled, weights.get((k, n))):
            raise ModelLoadError(
                f"this machine's {dtype} product of {k} x {n} depends on the row's place even in "
                f"tiles of {ROW_MULTIPLE} rows; numerics class 'exact' is not possible here, "
                "use 'fast'"
            )
    return ROW_MULTIPLE


def check_batches(shapes: Iterable[tuple[int, int, int]]) -> None:
    """Raise unless batched fp32 products (rows, K, N) are the same for every batch count."""
    for m, k, n in sorted(set(shapes)):
        total = max(4, min(_BATCH_TOTAL, _MOST_ELEMENTS // (m * k + k * n + m * n)))
        generator = torch.Generator().manual_seed(m * 7 + k * 3 + n)
        a = torch.randn((total, m, k), generator=generator)
        b = torch.randn((total, n, k), generator=generator).transpose(1, 2)
        whole = torch.bmm(a, b)
        for count in (c for c in _BATCH_COUNTS if c < total):
            first = min(3, total - count)
            part = torch.bmm(a[first : first + count], b[first : first + count])
            if not torch.equal(part, whole[first : first + count]):
                raise ModelLoadError(
                    f"this machine's batched product of {m} x {k} x {n} depends on the batch; "
                    "numerics class 'exact' is not possible here, use 'fast'"
                )


def _rows_alike(
    k: int,
    n: int,
    dtype: torch.dtype,
    product: Callable[[Tensor, Tensor], Tensor],
    weight: Tensor | None,
) -> bool:
    generator = torch.Generator().manual_seed(k * 3 + n)
    total = max(96, min(_ROW_TOTAL, _MOST_ELEMENTS // max(k, n) // ROW_MULTIPLE * ROW_MULTIPLE))
    x = torch.randn((total, k), generator=generator).to(dtype)
    if weight is None:
        weight = torch.randn((n, k), generator=generator).to(dtype)
    whole = product(x, weight)
    for count in (c for c in _ROW_COUNTS if c < total):
        for first in {0, ROW_MULTIPLE, total - count}:
            part = product(x[first : first + count].contiguous(), weight)
            if not torch.equal(part, whole[first : first + count]):
                return False
    return True


def check_machine(
    config: ModelConfig, tensors: dict[str, Tensor], dtype: torch.dtype, grid: Grid
) -> int | None:
    """Row tile for linears; raises if this machine cannot be exact (model.exact)."""
    shapes: dict[torch.dtype, set[tuple[int, int]]] = {torch.float32: set(), dtype: set()}
    real: dict[torch.dtype, dict[tuple[int, int], Tensor]] = {torch.float32: {}, dtype: {}}
    for name, tensor in tensors.items():
        if tensor.dim() != 2 or not tensor.is_floating_point() or name == "embed.weight":
            continue
        rows, inputs = tensor.shape
        fp32 = "hc_" in name or "compressor" in name or "gate.weight" in name or name[:4] == "head"
        kind = torch.float32 if fp32 else dtype
        if name.endswith(("wkv.weight", ".w1.weight")) and "attn.wkv" not in name:
            rows *= 2
        if "wo_a" in name:
            rows //= max(config.o_groups // grid.plane, 1)
        shapes[kind].add((inputs, rows))
        if tensor.shape[0] == rows and tensor.dtype == kind:
            real[kind].setdefault((inputs, rows), tensor)
    if config.last_csa_layer is not None:
        shapes[torch.float32] |= {(config.index_dim, INDEX_TILE), (config.index_dim,) * 2}
    local_heads = config.heads // grid.plane
    heads = local_heads * QUERY_TILE
    keys = round_up(config.window + QUERY_TILE, ROW_MULTIPLE)
    batches = [(heads, config.head_dim, keys), (heads, keys, config.head_dim)]
    batches.append((config.streams, config.streams, config.hidden))
    for rows in (ROW_MULTIPLE, 4 * ROW_MULTIPLE):
        batches.append((rows, config.head_dim, ENTRY_TILE))
        batches.append((rows, ENTRY_TILE, config.head_dim))
    if config.last_csa_layer is not None:
        few = round_up(local_heads, ROW_MULTIPLE)
        slots = round_up(config.index_topk, ROW_MULTIPLE)
        batches += [(few, config.head_dim, slots), (few, slots, config.head_dim)]
    check_batches(batches)
    tiles = [row_tile_for(wanted, kind, real[kind]) for kind, wanted in shapes.items()]
    return next((tile for tile in tiles if tile is not None), None)
