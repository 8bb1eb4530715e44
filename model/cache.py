"""One sequence's cache in memory, and its payloads (blocks and states).

Shape suffixes: E entries, W window rows, C channels, D model width.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kernels.reference.indexer import KEY_TILE as INDEX_TILE
from kernels.reference.lanes import round_up
from model.codec import RowCodec, fp32_bytes, fp32_rows
from model.config import CSA_RATIO, ModelConfig
from model.drafts.plan import DraftPlan
from model.engine import Buffer
from model.layout import EVIDENCE_PAIRS, carry_channels
from model.ranks.share import Share
from penstock.blocks import BLOCK_TOKENS, CacheLayout, Section

ENTRY_TILE = 128
NO_ENTRY = 0xFFFFFFFF


@dataclass
class LayerTrail:
    """What a layer knew in a seekable forward: the rows before it, then its own."""

    window_WC: Tensor
    carry: Tensor
    index_carry: Tensor


@dataclass
class Trail:
    """A seekable forward of `count` tokens from `start` on: enough to stand at any of them.

    Compressed entries need no trail: those beyond the position are never visible, and are written
    again before they could be (deepseek-v4.md 2.6).
    """

    start: int
    count: int
    hidden_RD: Tensor | None = None
    streams_RSD: Tensor | None = None
    evidence: list[list[tuple[int, float]]] = field(default_factory=list)


@dataclass
class LayerCache:
    """Rows of one layer. `entries_EC` and `index_EC` have room for the whole capacity."""

    ratio: int
    window_WC: Tensor
    """The last W rows, oldest first; zeros before position 0."""
    entries_EC: Tensor
    index_EC: Tensor
    carry: Tensor
    """Raw compressor rows not yet pooled; CSA: preceded by the previous window's rows."""
    index_carry: Tensor
    trail: LayerTrail | None = None
    """Filled by a seekable forward."""
    attached: int = 0
    """Tokens whose entries came with blocks: a replay leaves them as they are."""

    def push(self, rows_RC: Tensor, share: Share | None = None) -> Tensor:
        """Add window rows; returns all known ones, oldest first, that end with them.

        Of a `share` they are this plane's rows: afterwards the window is that of the whole pass.
        """
        known = torch.cat((self.window_WC, rows_RC))
        if share is not None:
            tail, counts = known[rows_RC.shape[0] :], [self.window_WC.shape[0]] * len(share.counts)
            before, self.window_WC = share.before_and_after(self.window_WC, tail, counts)
            return torch.cat((before, rows_RC))
        # A copy: a view would keep the whole chunk's rows alive.
        self.window_WC = known[rows_RC.shape[0] :].clone()
        if self.trail is not None:
            self.trail.window_WC = known
        return known

    def fork(self) -> LayerCache:
        """A copy whose window may be pushed to without changing this one."""
        return replace(self, trail=None)

    def seek(self, start: int, count: int, position: int) -> None:
        """After a forward of `count` tokens from `start`: stand at `position` inside it."""
        trail, done = self.trail, position - start
        if trail is None:
            raise ValueError("this layer has no trail")
        window = self.window_WC.shape[0]
        self.window_WC = trail.window_WC[done : done + window]
        if self.ratio:
            pooled = (position // self.ratio - start // self.ratio) * self.ratio
            rest = count - done
            self.carry = trail.carry[pooled : trail.carry.shape[0] - rest]
            if self.ratio == CSA_RATIO:
                self.index_carry = trail.index_carry[pooled : trail.index_carry.shape[0] - rest]


def no_previous_window(ratio: int, dim: int) -> Tensor:
    """Carry of an empty CSA compressor: value 0 and score -inf (T12)."""
    carry = torch.zeros(ratio, carry_channels(ratio, dim))
    carry[:, 2 * dim :] = float("-inf")
    return carry


class SequenceCache:
    """Cache of one sequence; fulfils the `Sequence` protocol. Memory is taken at construction."""

    def __init__(
        self, config: ModelConfig, capacity: int, *, owner: object, drafts: DraftPlan | None = None
    ) -> None:
        self._capacity = capacity
        self.owner = owner
        self._config = config
        self.position = 0
        self.loaded_blocks = 0
        self.released = False
        self.layers = [_new_layer(config, ratio, capacity) for ratio in config.ratios]
        # A draft's blocks have a window and nothing else.
        self.layers += [
            _new_layer(config, 0, capacity) for _ in range(drafts.stages if drafts else 0)
        ]
        self.hidden_D = torch.zeros(config.hidden)
        self.streams_SD: Tensor | None = None
        """The last token's streams, if the draft module reads them again."""
        self.evidence: list[tuple[int, float]] = []
        self.trail: Trail | None = None
        """Of the last forward, if it was seekable."""

    @property
    def capacity(self) -> int:
        return self._capacity

    def grow(self, capacity: int) -> None:
        """Room for more entries behind those that are there, one layer after the other."""
        for layer in self.layers:
            csa = layer.ratio == CSA_RATIO
            layer.entries_EC = _longer(
                layer.entries_EC, entry_rows(layer.ratio, capacity, ENTRY_TILE)
            )
            layer.index_EC = _longer(
                layer.index_EC, entry_rows(layer.ratio * csa, capacity, INDEX_TILE)
            )
        self._capacity = capacity

    def release(self) -> None:
        self.released = True
        self.layers = []
        self.trail = None

    def leave_trail(self, count: int | None) -> None:
        """Call before a forward: of `count` tokens that may be taken back, or None."""
        self.trail = None if count is None else Trail(self.position, count)
        for layer in self.layers:
            known = LayerTrail(layer.window_WC, layer.carry, layer.index_carry)
            layer.trail = None if count is None else known

    def seek(self, position: int) -> None:
        """See `Engine.seek`."""
        trail = self.trail
        if trail is None or not 0 < position - trail.start <= trail.count:
            raise ValueError(f"position {position} is not inside the last seekable forward")
        at = position - trail.start - 1
        for layer in self.layers:
            layer.seek(trail.start, trail.count, position)
        if trail.hidden_RD is not None:
            self.hidden_D = trail.hidden_RD[at]
        if trail.streams_RSD is not None:
            self.streams_SD = trail.streams_RSD[at]
        self.evidence = trail.evidence[at] if trail.evidence else []
        self.position = position

    def replay(self, start: int) -> None:
        """See `Engine.replay`."""
        self._reset()
        self.evidence, self.trail = [], None
        for layer in self.layers:
            layer.attached = self.loaded_blocks * BLOCK_TOKENS
        self.position = start

    @property
    def replays_until(self) -> int:
        """The end of what a replay may not export; 0 without one."""
        return max((layer.attached for layer in self.layers), default=0)

    def export_block(self, layout: CacheLayout, codec: RowCodec, index: int) -> bytes:
        first = index * BLOCK_TOKENS
        return b"".join(
            self._encode(section, codec, first=first) for section in layout.block_sections()
        )

    def export_state(self, layout: CacheLayout, codec: RowCodec) -> bytes:
        first = self.position // BLOCK_TOKENS * BLOCK_TOKENS
        sections = layout.state_sections(self.position)
        return b"".join(self._encode(section, codec, first=first) for section in sections)

    def _encode(self, section: Section, codec: RowCodec, *, first: int) -> bytes:
        """Rows of one component; compressed rows start at token `first`."""
        where, what = split_name(section.component.name)
        if what == "hidden":
            return fp32_bytes(self.hidden_D)
        if what == "streams":
            assert self.streams_SD is not None
            return fp32_bytes(self.streams_SD)
        if what == "evidence":
            return pack_evidence(self.evidence)
        layer = self.layers[where]
        match what:
            case "kv" | "index":
                rows = layer.entries_EC if what == "kv" else layer.index_EC
                at = first // layer.ratio
                return codec.encode(rows[at : at + section.rows], index=what == "index")
            case "window":
                rows = layer.window_WC
                return codec.encode(rows[rows.shape[0] - section.rows :], index=False)
            case _:
                carry = layer.carry if what == "carry" else layer.index_carry
                return fp32_bytes(carry[carry.shape[0] - section.rows :])

    def load_block(
        self, layout: CacheLayout, codec: RowCodec, index: int, payload: memoryview
    ) -> None:
        for section in layout.block_sections():
            self._decode(section, codec, payload, first=index * BLOCK_TOKENS)
        self.loaded_blocks = index + 1

    def load_state(
        self, layout: CacheLayout, codec: RowCodec, position: int, payload: memoryview
    ) -> None:
        self._reset()
        first = position // BLOCK_TOKENS * BLOCK_TOKENS
        for section in layout.state_sections(position):
            self._decode(section, codec, payload, first=first)
        self.position = position

    def _reset(self) -> None:
        for layer in self.layers:
            layer.window_WC.zero_()
            layer.carry = _empty_carry(layer.ratio, self._config.head_dim)
            layer.index_carry = _empty_carry(layer.ratio, self._config.index_dim)

    def _decode(
        self, section: Section, codec: RowCodec, payload: memoryview, *, first: int
    ) -> None:
        part: Buffer = payload[section.offset : section.offset + section.size_bytes]
        where, what = split_name(section.component.name)
        count = section.rows
        if what == "hidden":
            self.hidden_D = fp32_rows(part, 1)[0]
            return
        if what == "streams":
            self.streams_SD = fp32_rows(part, self._config.streams)
            return
        if what == "evidence":
            self.evidence = unpack_evidence(part)
            return
        layer = self.layers[where]
        match what:
            case "kv" | "index":
                rows = layer.entries_EC if what == "kv" else layer.index_EC
                at = first // layer.ratio
                rows[at : at + count] = codec.decode(part, count, index=what == "index")
            case "window":
                window = layer.window_WC
                window[window.shape[0] - count :] = codec.decode(part, count, index=False)
            case "carry":
                layer.carry = _with_previous(layer.carry, fp32_rows(part, count), layer.ratio)
            case _:
                known = fp32_rows(part, count)
                layer.index_carry = _with_previous(layer.index_carry, known, layer.ratio)


def split_name(name: str) -> tuple[int, str]:
    """`layers.3.kv` -> (3, kv); `last.hidden` -> (-1, hidden)."""
    group, *rest = name.split(".")
    return (int(rest[0]), rest[1]) if group == "layers" else (-1, rest[0])


def _with_previous(empty: Tensor, known: Tensor, ratio: int) -> Tensor:
    """A CSA carry from before the first full window is preceded by the empty previous window."""
    if ratio != CSA_RATIO or known.shape[0] >= ratio:
        return known
    return torch.cat((empty, known))


def _empty_carry(ratio: int, dim: int) -> Tensor:
    if ratio == CSA_RATIO:
        return no_previous_window(ratio, dim)
    return torch.zeros(0, carry_channels(ratio, dim))


def entry_rows(ratio: int, capacity: int, tile: int) -> int:
    """Rows kept for `capacity` tokens: whole tiles, at least one."""
    return max(round_up(capacity // ratio, tile), tile) if ratio else 0


def _new_layer(config: ModelConfig, ratio: int, capacity: int) -> LayerCache:
    csa = ratio == CSA_RATIO
    return LayerCache(
        ratio=ratio,
        window_WC=torch.zeros(config.window, config.head_dim),
        entries_EC=torch.zeros(entry_rows(ratio, capacity, ENTRY_TILE), config.head_dim),
        index_EC=torch.zeros(entry_rows(ratio * csa, capacity, INDEX_TILE), config.index_dim),
        carry=_empty_carry(ratio, config.head_dim),
        index_carry=_empty_carry(ratio * csa, config.index_dim),
    )


def _longer(rows: Tensor, count: int) -> Tensor:
    if rows.shape[0] >= count:
        return rows
    out = rows.new_zeros((count, *rows.shape[1:]))
    out[: rows.shape[0]] = rows
    return out


def cache_bytes(config: ModelConfig, capacity: int, drafts: DraftPlan | None = None) -> int:
    """Memory of a `SequenceCache`, from the shapes above."""
    floats = config.hidden
    if drafts is not None:
        floats += drafts.stages * config.window * config.head_dim
        floats += config.streams * config.hidden * drafts.keeps_streams
    for ratio in config.ratios:
        csa = ratio == CSA_RATIO
        rows = entry_rows(ratio, capacity, ENTRY_TILE)
        floats += (config.window + rows) * config.head_dim
        floats += entry_rows(ratio * csa, capacity, INDEX_TILE) * config.index_dim
        if ratio:
            floats += 2 * ratio * carry_channels(ratio, config.head_dim)
        if csa:
            floats += 2 * ratio * carry_channels(ratio, config.index_dim)
    return 4 * floats


def pack_evidence(pairs: list[tuple[int, float]]) -> bytes:
    filled = pairs + [(NO_ENTRY, 0.0)] * (EVIDENCE_PAIRS - len(pairs))
    return b"".join(struct.pack("<If", entry, mass) for entry, mass in filled)


def unpack_evidence(payload: Buffer) -> list[tuple[int, float]]:
    pairs = struct.iter_unpack("<If", payload)
    return [(entry, mass) for entry, mass in pairs if entry != NO_ENTRY]
