"""The measured calls of the device ops: rows, the compressor, hyper-connections, experts, sampling.

Each case makes its inputs at the released models' shapes (or tiny ones, to try the script), says
what it must move and compute, and compares a few rows with the reference in float64.

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
from kernels.reference.hadamard import hadamard_matrix
from kernels.reference.moe_grouped import MoePlan

_EPS = 1e-6


def _quantize(device: torch.device, tiny: bool, *, back: bool) -> Work:
    rows = 24 if tiny else 65536
    x, slots, pages = (
        normal(device, rows, 512),
        numbered(device, rows),
        empty_pages(device, rows, KV_PAGES),
    )

    def call(ops: Ops) -> object:
        if back:
            return ops.dequantize_gather(pages, slots, KV_PAGES, dtype=torch.bfloat16)
        return ops.quantize_kv(x, slots, pages, KV_PAGES)

    def error(ops: Ops) -> float:
        ops.quantize_kv(x, slots, pages, KV_PAGES)
        few = slots[:16]
        found = ops.dequantize_gather(pages, few, KV_PAGES, dtype=torch.bfloat16)
        again = torch.zeros_like(pages[:1])
        Ops.quantize_kv(x[:16], few, again, KV_PAGES)
        return distance(found, Ops.dequantize_gather(again, few, KV_PAGES, dtype=torch.float64))

    ours = rows * (584 + 1024)
    return Work(call, error, 0.0, ours)


def _index_rows(device: torch.device, tiny: bool, *, keys: bool) -> Work:
    rows = 24 if tiny else 262144
    x, slots, pages = (
        normal(device, rows, 128),
        numbered(device, rows),
        empty_pages(device, rows, INDEX_PAGES),
    )
    matrix = hadamard_matrix(128).to(device)

    def call(ops: Ops) -> object:
        if keys:
            return ops.quantize_index(x, matrix, slots, pages, INDEX_PAGES)
        return ops.round_index(x, matrix)

    def error(ops: Ops) -> float:
        # A rotated value on a rounding border may take the neighbouring FP4 code.
        codes, scale = ops.round_index(x[:16], matrix)
        exact = Ops.hadamard(x[:16].double(), matrix.double())
        return distance(codes.double() * scale.double()[:, None], exact)

    return Work(call, error, 0.2, rows * (256 + (68 if keys else 132)))


def _hadamard(device: torch.device, tiny: bool) -> Work:
    rows = 24 if tiny else 262144
    x, matrix = normal(device, rows, 128, dtype=torch.float32), hadamard_matrix(128).to(device)

    def error(ops: Ops) -> float:
        return distance(ops.hadamard(x[:16], matrix), x[:16].double() @ matrix.double() / 128**0.5)

    return Work(lambda ops: ops.hadamard(x, matrix), error, 1e-6, rows * 1024)


def _mxfp4(device: torch.device, tiny: bool, *, back: bool) -> Work:
    side = 64 if tiny else 8192
    x = normal(device, side, side)
    codes = Ops.mxfp4_encode(x)

    def call(ops: Ops) -> object:
        return ops.mxfp4_decode(*codes, dtype=torch.bfloat16) if back else ops.mxfp4_encode(x)

    def error(ops: Ops) -> float:
        found = ops.mxfp4_decode(*ops.mxfp4_encode(x), dtype=torch.bfloat16)
        return distance(found, Ops.mxfp4_decode(*codes, dtype=torch.float64))

    return Work(call, error, 0.0, side * side * (2 + 17 / 32))


def _norm_rope(device: torch.device, tiny: bool, *, heads: int) -> Work:
    rows, heads = (2, heads // 32) if tiny else (8192, heads)
    x, (cos, sin) = normal(device, rows, heads, 512), angles(device, rows)

    def call(ops: Ops) -> object:
        return ops.norm_rope(x, None, cos, sin, eps=_EPS, dtype=torch.bfloat16)

    def error(ops: Ops) -> float:
        few = x[:2], None, cos[:2], sin[:2]
        found = ops.norm_rope(*few, eps=_EPS, dtype=torch.float32)
        return distance(
            found,
            Ops.norm_rope(
                x[:2].double(), None, cos[:2].double(), sin[:2].double(),
                eps=_EPS, dtype=torch.float64,
            ),
        )  # fmt: skip

    return Work(call, error, 2e-6, rows * heads * 2048)


def _window_rows(device: torch.device, tiny: bool) -> Work:
    rows = 16 if tiny else 65536
    x, (cos, sin) = normal(device, rows, 512), angles(device, rows)
    weight, slots = normal(device, 512, dtype=torch.float32), numbered(device, rows)
    pages = empty_pages(device, rows, KV_PAGES)

    def call(ops: Ops) -> object:
        return ops.norm_rope_quantize(x, weight, cos, sin, slots, pages, KV_PAGES, eps=_EPS)

    def error(ops: Ops) -> float:
        call(ops)
        found = ops.dequantize_gather(pages, slots[:16], KV_PAGES, dtype=torch.float32)
        exact = Ops.norm_rope(
            x[:16, None].double(), weight.double(), cos[:16].double(), sin[:16].double(),
            eps=_EPS, dtype=torch.float64,
        )  # fmt: skip
        return distance(found, exact[:, 0])

    # e4m3 keeps four bits: half a step is 1/16 of a value.
    return Work(call, error, 2**-4, rows * (1024 + 584))


def _compress(device: torch.device, tiny: bool, *, ratio: int, decode: bool) -> Work:
    halves, dim = (2 if ratio == 4 else 1), 512
    tokens = ratio if tiny else 64 if decode else 65536
    count = 64 if decode and not tiny else tokens // ratio
    slots, width = halves * ratio, 2 * halves * dim
    raw = normal(device, tokens, width, dtype=torch.float32)
    carry = normal(device, count if decode else 1, slots, width, dtype=torch.float32)
    place = torch.arange(count, device=device, dtype=torch.int32)
    end = place * 0 + 2**19 - 1 if decode else place * ratio + ratio - 1
    last = place if decode and not tiny else place * ratio + ratio - 1
    windows = torch.stack((last, last * 0 if decode else last, end, place * int(decode)), 1)
    ape = normal(device, ratio, halves * dim, dtype=torch.float32)
    norm = normal(device, dim, dtype=torch.float32)
    (cos, sin), pages = angles(device, count), empty_pages(device, count, KV_PAGES)
    args = (raw, carry, windows, ape, norm, cos, sin)

    def call(ops: Ops) -> object:
        return ops.compress_kv(*args, place, pages, KV_PAGES, eps=_EPS)

    def error(ops: Ops) -> float:
        call(ops)
        few = min(count, 4)
        found = ops.dequantize_gather(pages, place[:few], KV_PAGES, dtype=torch.float32)
        again = torch.zeros_like(pages)
        some = (raw, carry, windows[:few], ape, norm, cos[:few], sin[:few])
        Ops.compress_kv(*some, place[:few], again, KV_PAGES, eps=_EPS)
        return distance(
            found, Ops.dequantize_gather(again, place[:few], KV_PAGES, dtype=torch.float64)
        )

    read = count * slots * 2 * dim if decode else tokens * width
    return Work(call, error, 2**-3, 4 * read + count * 584)


def _boundary(device: torch.device, tiny: bool, *, width: int, rows: int) -> Work:
    rows, width = (3, 64) if tiny else (rows, width)
    streams, y = normal(device, rows, 4, width), normal(device, rows, width)
    fn = normal(device, 24, 4 * width, dtype=torch.float32) * width**-0.5
    scale, base = (normal(device, n, dtype=torch.float32) for n in (3, 24))
    post = torch.rand(rows, 4, device=device)
    comb = torch.rand(rows, 4, 4, device=device) / 4
    kind: dict[str, Any] = {"iters": 20, "eps": _EPS, "norm_eps": _EPS}

    def call(ops: Ops) -> object:
        return ops.mhc_boundary(streams, y, post, comb, fn, scale, base, **kind)

    def error(ops: Ops) -> float:
        few = slice(0, 4)
        parts = (streams[few], y[few], post[few], comb[few])
        found = ops.mhc_boundary(*parts, fn, scale, base, **kind)
        # The second half starts from the streams that were found: they are rounded once.
        wide = [t.double() for t in (found[0], fn, scale, base)]
        exact = Ops.mhc_pre(*wide, **kind)
        new = Ops.mhc_post(*(t.double() for t in parts))
        gates = [distance(f, e) for f, e in zip(found[1:], exact, strict=True)]
        return max(distance(found[0], new), *gates)

    # Read 4 streams and y, write 4 streams; read them again (fused: not), write the input.
    return Work(call, error, 5e-3, rows * width * 2 * 10, ceiling="copy")


class _Layer:
    """Random experts of one format at a released model's shape."""

    def __init__(self, device: torch.device, tiny: bool, fp4: bool, rows: int, tile: int) -> None:
        self.fp4, self.tile = fp4, tile
        self.width, self.hidden, self.experts = (128, 128, 2) if tiny else (4096, 2048, 256)
        self.rows, self.active = (2 if tiny else rows), (2 if tiny else 6)
        self.x = normal(device, self.rows, self.width)
        score = torch.rand(self.rows, self.experts, device=device)
        self.ids = score.topk(self.active, 1).indices.sort(1).values.to(torch.int32)
        self.share = torch.rand(self.rows, self.active, device=device)
        self.w13 = self._weight(device, 2 * self.hidden, self.width)
        self.w2 = self._weight(device, self.width, self.hidden)

    def _weight(self, device: torch.device, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
        def random(low: int, high: int, *shape: int) -> Tensor:
            return torch.randint(low, high, shape, dtype=torch.uint8, device=device)

        # Without the highest exponent bit no code is nan and no value above 1.9.
        if self.fp4:
            codes = random(0, 256, self.experts, outputs, inputs // 2)
            return codes, random(118, 122, self.experts, outputs, inputs // 32)
        codes = random(0, 256, self.experts, outputs, inputs) & 0xBF
        scale = random(118, 122, self.experts, outputs // 128, inputs // 128)
        return codes.view(torch.float8_e4m3fn), scale

    @property
    def weight_bytes(self) -> int:
        """Of the experts that these rows meet."""
        per_expert = sum(t.numel() * t.element_size() for t in (*self.w13, *self.w2))
        return per_expert // self.experts * len(set(self.ids.flatten().tolist()))

    def rounded(self, ops: Ops, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return (ops.round_rows(x), None) if self.fp4 else ops.quantize_rows(x)

    def up(self, ops: Ops, rows: slice = slice(None)) -> tuple[Tensor, MoePlan]:
        plan = ops.moe_plan(self.ids[rows], experts=self.experts, tile=self.tile)
        rounded = self.rounded(ops, self.x[rows])
        share = self.share[rows].contiguous()
        return ops.moe_up(*rounded, *self.w13, share, plan, limit=10.0), plan

    def run(self, ops: Ops, rows: slice = slice(None)) -> Tensor:
        h, plan = self.up(ops, rows)
        y = ops.moe_down(*self.rounded(ops, h), *self.w2, plan)
        return ops.moe_combine(y, torch.zeros_like(self.x[rows]), plan)


def _moe(device: torch.device, tiny: bool, *, fp4: bool, rows: int, tile: int) -> Work:
    layer = _Layer(device, tiny, fp4, rows, tile)
    flops = 6.0 * layer.rows * layer.active * layer.width * layer.hidden

    def error(ops: Ops) -> float:
        few = slice(0, 2)
        found, exact = layer.run(ops, few), layer.run(Ops(), few)
        return distance(found, exact)

    moved = layer.weight_bytes + 4 * layer.x.numel()
    # Few rows meet every expert's weights once: memory bounds them, not the products.
    ceiling = "copy" if rows <= 64 else "bf16" if fp4 else "e4m3"
    return Work(layer.run, error, 2e-2, moved, flops, ceiling)


def _sample(device: torch.device, tiny: bool, *, rows: int) -> Work:
    rows, size = (1, 60) if tiny else (rows, 129280)
    logits = normal(device, rows, size, dtype=torch.float32) * 4
    uniform = torch.rand(rows, dtype=torch.float64, device=device)
    heat = torch.ones(rows, dtype=torch.float64, device=device)

    def call(ops: Ops) -> Tensor:
        return ops.sample(logits, uniform, heat, top_p_R=heat * 0.95)

    def error(ops: Ops) -> float:
        return float((call(ops) != call(Ops())).sum())

    return Work(call, error, 0.0, rows * size * 4)


CASES = (
    Case("quantize_kv", partial(_quantize, back=False), target=0.85),
    Case("dequantize_gather", partial(_quantize, back=True), target=0.85),
    Case("hadamard", _hadamard, target=0.85),
    Case("quantize_index", partial(_index_rows, keys=True), target=0.85),
    Case("round_index", partial(_index_rows, keys=False), target=0.85),
    Case("mxfp4_encode", partial(_mxfp4, back=False), target=0.85),
    Case("mxfp4_decode", partial(_mxfp4, back=True), target=0.85),
    Case("norm_rope, 64 heads", partial(_norm_rope, heads=64), target=0.85),
    Case("norm_rope, 128 heads", partial(_norm_rope, heads=128), target=0.85),
    Case("norm_rope_quantize", _window_rows, target=0.85),
    Case("compress_kv, ratio 4", partial(_compress, ratio=4, decode=False), target=0.8),
    Case("compress_kv, ratio 128", partial(_compress, ratio=128, decode=False), target=0.8),
    Case("compress_kv, 64 windows", partial(_compress, ratio=4, decode=True), target_us=4.0),
    Case("mhc_boundary, 4096", partial(_boundary, width=4096, rows=8192), target=0.75),
    Case("mhc_boundary, 7168", partial(_boundary, width=7168, rows=8192), target=0.75),
    Case(
        "mhc_boundary, 16 rows",
        partial(_boundary, width=7168, rows=16),
        target_us=25.0,
        published="16 us (B200)",
    ),
    Case(
        "moe e4m3, 8192 rows",
        partial(_moe, fp4=False, rows=8192, tile=128),
        target=0.55,
        published="1381 TFLOP/s (H800)",
    ),
    Case(
        "moe MXFP4, 8192 rows",
        partial(_moe, fp4=True, rows=8192, tile=128),
        target=0.5,
        published="490 TFLOP/s (49% of peak)",
    ),
    Case("moe e4m3, 16 rows", partial(_moe, fp4=False, rows=16, tile=16), target=0.7),
    Case("moe MXFP4, 16 rows", partial(_moe, fp4=True, rows=16, tile=16), target=0.7),
    Case("moe MXFP4, 16 rows, tile 64", partial(_moe, fp4=True, rows=16, tile=64), target=0.7),
    Case("sample, 64 rows", partial(_sample, rows=64)),
)
