"""Blocks and states of the store from and to a device's pages: the bytes that the CPU engine writes
(model/layout.py), moved and never recomputed.

A row of the store is a page's row of data with its scales behind it. One copy a payload crosses the
bus: sections are gathered on the device first.

Shape suffixes: R rows, B bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.reference.pages import IndexPages, KvPages
from model.cache import pack_evidence, split_name, unpack_evidence
from model.device.pools import LayerPool, Pools
from model.device.sequence import DeviceSequence
from model.engine import Buffer
from penstock.blocks import BLOCK_TOKENS, CacheLayout, Section


def _views(pages_PB: Tensor, layout: KvPages | IndexPages) -> tuple[Tensor, Tensor]:
    """Data [P, rows, bytes] and scales [P, rows, bytes] of all pages, as views."""
    count, stride = pages_PB.shape[0], pages_PB.stride(0)
    rows, size, scale = layout.page_rows, layout.data_bytes, layout.scale_bytes
    at = pages_PB.storage_offset()
    data = pages_PB.as_strided((count, rows, size), (stride, size, 1), at)
    scales = pages_PB.as_strided((count, rows, scale), (stride, scale, 1), at + rows * size)
    return data, scales


class Wire:
    """Payloads of one engine's sequences."""

    def __init__(self, layout: CacheLayout, pools: Pools) -> None:
        self._layout, self._pools = layout, pools
        self._device = pools.device

    def export_block(self, sequence: DeviceSequence, index: int) -> bytes:
        return self._gathered(sequence, self._layout.block_sections(), index)

    def export_state(self, sequence: DeviceSequence) -> bytes:
        sections = self._layout.state_sections(sequence.position)
        return self._gathered(sequence, sections, sequence.position // BLOCK_TOKENS)

    def load_block(self, sequence: DeviceSequence, index: int, payload: memoryview) -> None:
        self._scatter(sequence, self._layout.block_sections(), payload, block=index, position=0)
        sequence.loaded_blocks = index + 1

    def load_state(self, sequence: DeviceSequence, position: int, payload: memoryview) -> None:
        sections, block = self._layout.state_sections(position), position // BLOCK_TOKENS
        self._scatter(sequence, sections, payload, block=block, position=position)
        sequence.position = position

    def _gathered(
        self, sequence: DeviceSequence, sections: tuple[Section, ...], block: int
    ) -> bytes:
        parts: list[Tensor] = []
        tail = b""
        for section in sections:
            if split_name(section.component.name)[1] == "evidence":
                tail = pack_evidence(sequence.evidence)
            else:
                parts.append(self._section(sequence, section, block))
        # Evidence is the last component of every layout that has it.
        return _to_host(torch.cat(parts)) + tail

    def _section(self, sequence: DeviceSequence, section: Section, block: int) -> Tensor:
        """uint8 of one component's rows, flat."""
        where, what = split_name(section.component.name)
        if what == "hidden":
            assert sequence.hidden_D is not None
            return _flat(sequence.hidden_D.float())
        layer, count = self._pools.layers[where], section.rows
        if what in ("carry", "index_carry"):
            ring = layer.carry_NSX if what == "carry" else layer.index_carry_NSX
            assert ring is not None
            at = self._newest(sequence.position, count, ring.shape[1])
            return _flat(ring[sequence.place].index_select(0, at))
        pages, layout = self._paged(layer, what)
        data, scales = _views(pages, layout)
        if what == "window":
            at = self._newest(sequence.position, count, layout.page_rows)
            rows = (part[sequence.place].index_select(0, at) for part in (data, scales))
        else:
            rows = (part[sequence.pages[block], :count] for part in (data, scales))
        return _flat(torch.cat(tuple(rows), 1))

    def _scatter(
        self,
        sequence: DeviceSequence,
        sections: tuple[Section, ...],
        payload: Buffer,
        *,
        block: int,
        position: int,
    ) -> None:
        # A copy: the caller keeps the buffer, and the transfer may still run when this returns.
        whole = torch.frombuffer(bytearray(payload), dtype=torch.uint8).to(self._device)
        for section in sections:
            where, what = split_name(section.component.name)
            first, size = section.offset, section.size_bytes
            if what == "evidence":
                sequence.know(unpack_evidence(memoryview(payload)[first : first + size]))
                continue
            raw = whole[first : first + size].clone()
            if what == "hidden":
                sequence.hidden_D = raw.view(torch.float32)
            else:
                self._place(sequence, what, raw.view(section.rows, -1), where, block, position)

    def _place(
        self,
        sequence: DeviceSequence,
        what: str,
        rows_RB: Tensor,
        where: int,
        block: int,
        position: int,
    ) -> None:
        layer, count = self._pools.layers[where], rows_RB.shape[0]
        if what in ("carry", "index_carry"):
            ring = layer.carry_NSX if what == "carry" else layer.index_carry_NSX
            assert ring is not None
            at = self._newest(position, count, ring.shape[1])
            ring[sequence.place].index_copy_(0, at, rows_RB.view(torch.float32))
            return
        pages, layout = self._paged(layer, what)
        size = layout.data_bytes
        parts = rows_RB[:, :size], rows_RB[:, size : size + layout.scale_bytes]
        for view, part in zip(_views(pages, layout), parts, strict=True):
            if what == "window":
                at = self._newest(position, count, layout.page_rows)
                view[sequence.place].index_copy_(0, at, part.contiguous())
            else:
                view[sequence.pages[block], :count] = part

    def _paged(self, layer: LayerPool, what: str) -> tuple[Tensor, KvPages | IndexPages]:
        g = self._pools.geometry
        if what == "window":
            return layer.window_PB, g.ring
        pages = layer.entries_PB if what == "kv" else layer.index_PB
        assert pages is not None
        return pages, g.entries(layer.ratio) if what == "kv" else g.index()

    def _newest(self, position: int, count: int, ring: int) -> Tensor:
        """Ring slots of the `count` positions before `position`."""
        return torch.arange(position - count, position, device=self._device) % ring


def _flat(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def _to_host(x: Tensor) -> bytes:
    return x.cpu().numpy().tobytes()
