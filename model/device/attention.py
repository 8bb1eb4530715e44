"""Attention of one layer over paged rows (deepseek-v4.md 2).

A token's keys are one list: its window, oldest first, then its entries, ascending. In class `exact`
every token, of a prompt or generated, walks such a list with the same kernel (`sparse_attention`),
so its sums do not know what stood beside it: rows that a prompt shares are decoded once into a
buffer, those of a step are gathered for each token. Class `fast` takes the kernels that are made
for one of the cases.

Shape suffixes: R rows (tokens), H heads, C channels, D model width, Q query rank, K list slots, P
rotated pairs, N rows of a buffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kernels.device import ReferenceDeviceOps
from kernels.reference.pages import KvPages
from kernels.reference.sparse_attention import CHUNK
from model.config import CSA_RATIO
from model.device.indexer import Indexer
from model.device.pools import Geometry, LayerPool
from model.device.rows import Rows, upload
from model.device.sequence import Picked
from model.device.weights import Product

_FEW_UNITS = 132
"""Below one unit of work a multiprocessor a step's lists are cut into more chunks."""
_LIST_BLOCK = 64


@dataclass(frozen=True)
class Compressor:
    """Weights of one compressor. `ape_SA` is added to scores, here and in carries."""

    project: Product
    ape_SA: Tensor
    norm_C: Tensor


@dataclass(frozen=True)
class AttentionWeights:
    wq_a: Product
    q_norm_Q: Tensor
    wq_b: Product
    wkv: Product
    kv_norm_C: Tensor
    wo_a: Product
    wo_b: Product
    sink_H: Tensor
    freq_P: Tensor


def can_split(dim: int, nope: int) -> bool:
    """Whether `decode_attention` takes these rows: it reads the e4m3 channels of the upper half in
    pieces whose sizes are powers of two, of at least 16 (its products' least depth).
    """
    upper = nope - dim // 2
    pieces = [piece for piece in (upper // 128 * 128, upper % 128, dim - nope) if piece]
    return upper >= 0 and all(p >= 16 and p & (p - 1) == 0 for p in (dim // 2, *pieces))


@dataclass(frozen=True)
class Scratch:
    """Pages for the window rows of a pass that are not (or not yet) in the rings."""

    pages_PB: Tensor
    layout: KvPages


PagedList = tuple[Tensor, Tensor, KvPages]
"""Pages, each token's slots in them, and their layout."""


@dataclass(frozen=True)
class Attended:
    """Output [R, H, C]; the buffer of keys and each token's list of its rows, where asked for."""

    out_RHC: Tensor
    keys_NC: Tensor | None
    index_RK: Tensor | None


class Attention:
    def __init__(
        self,
        ops: ReferenceDeviceOps,
        geometry: Geometry,
        weights: AttentionWeights,
        *,
        ratio: int,
        compressor: Compressor | None,
        indexer: Indexer | None,
        scratch: Scratch,
        dtype: torch.dtype,
        operand: torch.dtype,
        exact: bool,
    ) -> None:
        """`dtype` of activations, `operand` of queries and keys as products read them."""
        c = geometry.config
        self._ops, self._geometry, self._w = ops, geometry, weights
        self._ratio, self._heads, self._dim, self._window = ratio, c.heads, c.head_dim, c.window
        self._eps, self._scale = c.norm_eps, float(c.head_dim) ** -0.5
        self._compressor, self._indexer, self._scratch = compressor, indexer, scratch
        self._dtype, self._operand, self._exact = dtype, operand, exact
        self._splits = can_split(c.head_dim, c.nope_dim)
        # A window longer than a chunk of keys would be cut by it.
        self._dense = not exact and ratio not in (0, CSA_RATIO) and c.window <= CHUNK

    def __call__(
        self, rows: Rows, pool: LayerPool, x_RD: Tensor, *, evidence: Tensor | None = None
    ) -> tuple[Tensor, Picked | None]:
        """[R, D], and what the rows in `evidence` (int64) selected, in a CSA layer."""
        ops, w = self._ops, self._w
        cos, sin = rows.cos_sin(w.freq_P)
        qr = ops.rms_norm(
            w.wq_a(ops, x_RD, self._dtype), w.q_norm_Q, eps=self._eps, dtype=x_RD.dtype
        )
        q = w.wq_b(ops, qr, self._dtype).view(-1, self._heads, self._dim)
        q = ops.norm_rope(q, None, cos, sin, eps=self._eps, dtype=self._operand)
        kv = w.wkv(ops, x_RD, self._dtype)
        self._compress(rows, pool, x_RD)
        entries: Tensor | None = None
        if self._indexer is not None:
            entries = self._indexer(rows, pool, x_RD, qr, cos, sin)
        elif self._ratio:
            entries = _all_entries(rows, self._ratio)
        attend = self._step if rows.is_step else self._prompt
        found = attend(rows, pool, q, kv, entries, keys=evidence is not None)
        low = w.wo_a(ops, found.out_RHC.to(self._dtype).flatten(1), self._dtype)
        y = w.wo_b(ops, low, self._dtype)
        if evidence is None or entries is None:
            return y, None
        return y, self._picked(q, found, entries, evidence)

    def _compress(self, rows: Rows, pool: LayerPool, x_RD: Tensor) -> None:
        """Entries of the windows that these rows complete, then the carry."""
        made, ratio = self._compressor, self._ratio
        if made is None:
            return
        assert pool.entries_PB is not None and pool.carry_NSX is not None
        raw = made.project(self._ops, x_RD, torch.float32)
        windows = rows.windows(ratio)
        if windows is not None:
            self._ops.compress_kv(
                raw, pool.carry_NSX, windows.windows_B4, made.ape_SA, made.norm_C,
                *rows.window_angles(windows, self._w.freq_P), windows.slots_B,
                pool.entries_PB, self._geometry.entries(ratio), eps=self._eps,
            )  # fmt: skip
        self._ops.keep_carry(raw, pool.carry_NSX, rows.spans_N4, made.ape_SA)

    def _store(self, rows: Rows, kv_RC: Tensor, slots: Tensor, to: Scratch) -> None:
        w = self._w
        self._ops.norm_rope_quantize(
            kv_RC, w.kv_norm_C, *rows.cos_sin(w.freq_P), slots, to.pages_PB, to.layout,
            eps=self._eps,
        )  # fmt: skip

    def _ring(self, pool: LayerPool) -> Scratch:
        return Scratch(pool.window_PB, self._geometry.ring)

    def _prompt(
        self,
        rows: Rows,
        pool: LayerPool,
        q: Tensor,
        kv: Tensor,
        entries: Tensor | None,
        *,
        keys: bool,
    ) -> Attended:
        """Rows known before the pass come from the rings, its own from the scratch pages: a pass is
        longer than a ring, which it may overwrite only when all its tokens are through.
        """
        del keys  # they are there anyway
        plan = _shared_keys(rows, self._window, self._ratio)
        count, old = rows.count, plan.old_slots.shape[0]
        buffer = torch.empty((plan.total, self._dim), dtype=self._operand, device=q.device)
        self._store(rows, kv, plan.own_slots, self._scratch)
        g, scratch = self._geometry, self._scratch
        self._decode(pool.window_PB, plan.old_slots, g.ring, buffer[:old])
        own = buffer[old : old + count]
        self._decode(scratch.pages_PB, plan.own_slots, scratch.layout, own)
        index = plan.window_RK
        if entries is not None:
            assert pool.entries_PB is not None
            rest = buffer[old + count :]
            self._decode(pool.entries_PB, plan.entry_slots, g.entries(self._ratio), rest)
            heavy = torch.where(entries < 0, -1, entries + plan.entries_at_R[:, None])
            index = torch.cat((index, heavy), 1)
        dense = self._dense and len(rows.spans) == 1 and rows.count >= _LIST_BLOCK
        attend = self._attend_dense if dense else self._attend
        out = attend(rows, q, buffer, index)
        self._store(rows, kv, rows.ring_R, self._ring(pool))
        return Attended(out, buffer, index)

    def _decode(self, pages_PB: Tensor, slots: Tensor, layout: KvPages, out: Tensor) -> None:
        if slots.shape[0]:
            self._ops.dequantize_gather(pages_PB, slots, layout, dtype=self._operand, out=out)

    def _step(
        self,
        rows: Rows,
        pool: LayerPool,
        q: Tensor,
        kv: Tensor,
        entries: Tensor | None,
        *,
        keys: bool,
    ) -> Attended:
        self._store(rows, kv, rows.ring_R, self._ring(pool))
        ring = self._geometry.ring
        lists = [(pool.window_PB, _ring_slots(rows, self._window), ring)]
        if entries is not None and entries.shape[1]:
            assert pool.entries_PB is not None
            slots = rows.entry_slots(entries, rows.owner_R[:, None], self._ratio)
            lists.append((pool.entries_PB, slots, self._geometry.entries(self._ratio)))
        if not self._exact and self._splits:
            out = self._split(rows, lists, q)
            return Attended(out, *(self._gathered(lists) if keys else (None, None)))
        gathered, index = self._gathered(lists)
        return Attended(self._attend(rows, q, gathered, index), gathered, index)

    def _gathered(self, lists: list[PagedList]) -> tuple[Tensor, Tensor]:
        """Every token's own keys in a buffer, and its list of their rows."""
        parts, places, at = [], [], 0
        for pages, slots, layout in lists:
            flat = slots.flatten()
            parts.append(self._ops.dequantize_gather(pages, flat, layout, dtype=self._operand))
            row = torch.arange(at, at + flat.shape[0], device=flat.device, dtype=torch.int32)
            places.append(torch.where(slots < 0, -1, row.view(slots.shape)))
            at += flat.shape[0]
        return torch.cat(parts), torch.cat(places, 1)

    def _attend(self, rows: Rows, q: Tensor, keys: Tensor, index: Tensor) -> Tensor:
        w = self._w
        cos, sin = rows.cos_sin(w.freq_P)
        return self._ops.sparse_attention(q, keys, index, w.sink_H, cos, sin, scale=self._scale)

    def _attend_dense(self, rows: Rows, q: Tensor, keys: Tensor, index: Tensor) -> Tensor:
        """One sequence's window rows and entries as they lie in the buffer (class `fast`)."""
        w, (span,) = self._w, rows.spans
        return self._ops.dense_compressed_attention(
            q, keys, w.sink_H, *rows.cos_sin(w.freq_P), position=span.position,
            entries_at=self._window - 1 + span.count, window=self._window, ratio=self._ratio,
            scale=self._scale,
        )  # fmt: skip

    def _split(self, rows: Rows, lists: list[PagedList], q: Tensor) -> Tensor:
        """Straight over the pages, long lists cut into chunks (class `fast`)."""
        w = self._w
        wide = [(pages, _whole(slots), layout) for pages, slots, layout in lists]
        if len(wide) == 1:
            pages, slots, layout = wide[0]
            wide.append((pages, slots[:, :0].contiguous(), layout))
        units = rows.count * -(-self._heads // 32) * 2
        chunk = CHUNK if units >= _FEW_UNITS else 128
        return self._ops.decode_attention(
            q, *wide[0], *wide[1], w.sink_H, *rows.cos_sin(w.freq_P),
            scale=self._scale, chunk=chunk,
        )  # fmt: skip

    def _picked(self, q: Tensor, found: Attended, entries: Tensor, evidence: Tensor) -> Picked:
        assert found.keys_NC is not None and found.index_RK is not None
        masses = self._ops.entry_masses(
            q.index_select(0, evidence), found.keys_NC, found.index_RK.index_select(0, evidence),
            self._w.sink_H, scale=self._scale,
        )  # fmt: skip
        return Picked(entries.index_select(0, evidence), masses[:, self._window :].contiguous())


def _ring_slots(rows: Rows, window: int) -> Tensor:
    """int32 [R, window]: ring slots of each token's window, oldest first; -1 before position 0."""

    def make() -> Tensor:
        ring = rows.geometry.ring.page_rows
        back = torch.arange(1 - window, 1, device=rows.device)
        at = rows.positions_R[:, None] + back
        slots = rows.places_R[:, None] * ring + at % ring
        return torch.where(at < 0, -1, slots).to(torch.int32)

    return rows.once("ring slots", make)


def _all_entries(rows: Rows, ratio: int) -> Tensor:
    """int32 [R, K]: every visible entry of each token."""

    def make() -> Tensor:
        entry = torch.arange(rows.most_visible(ratio), device=rows.device, dtype=torch.int32)
        return torch.where(entry < rows.visible(ratio)[:, None], entry, -1)

    return rows.once(("all entries", ratio), make)


def _whole(slots_RK: Tensor) -> Tensor:
    """Lists a multiple of 64 wide, as `decode_attention` walks them."""
    missing = -slots_RK.shape[1] % _LIST_BLOCK
    return torch.nn.functional.pad(slots_RK, (0, missing), value=-1) if missing else slots_RK


@dataclass(frozen=True)
class SharedKeys:
    """Where a prompt pass's keys lie in its buffer: rows before the pass, its own, entries."""

    old_slots: Tensor
    own_slots: Tensor
    entry_slots: Tensor
    window_RK: Tensor
    """Buffer rows of each token's window; -1 before position 0."""
    entries_at_R: Tensor
    """Buffer row of entry 0 of each token's sequence."""
    total: int


def _shared_keys(rows: Rows, window: int, ratio: int) -> SharedKeys:
    return rows.once(("shared keys", ratio), lambda: _new_shared_keys(rows, window, ratio))


def _new_shared_keys(rows: Rows, window: int, ratio: int) -> SharedKeys:
    device, spans = rows.device, rows.spans
    ring, before, old = rows.geometry.ring.page_rows, window - 1, len(spans) * (window - 1)
    start_N = rows.spans_N4[:, 2].long()
    back = start_N[:, None] - before + torch.arange(before, device=device)
    place_N = rows.spans_N4[:, 3].long()
    old_slots = torch.where(back < 0, -1, place_N[:, None] * ring + back % ring)
    own_slots = torch.arange(rows.count, device=device, dtype=torch.int32)
    # A window position before the span's start lies among the old rows, else among its own.
    start_R, first_R = start_N[rows.owner_R], rows.spans_N4[:, 0].long()[rows.owner_R]
    at = rows.positions_R[:, None] - before + torch.arange(window, device=device)
    into = at - start_R[:, None]
    index = torch.where(
        into < 0, rows.owner_R[:, None] * before + before + into, old + first_R[:, None] + into
    )
    index = torch.where(at < 0, -1, index).to(torch.int32)
    counts = [span.end // ratio if ratio else 0 for span in spans]
    firsts = [old + rows.count + sum(counts[:n]) for n in range(len(spans))]
    entries_at = upload(np.asarray(firsts, np.int32), device)[rows.owner_R]
    slots = [
        rows.entry_slots(torch.arange(n, device=device), i, ratio)
        for i, n in enumerate(counts)
        if n
    ]
    empty = torch.empty(0, dtype=torch.int32, device=device)
    return SharedKeys(
        old_slots.flatten().to(torch.int32),
        own_slots,
        torch.cat(slots) if slots else empty,
        index,
        entries_at,
        old + rows.count + sum(counts),
    )
