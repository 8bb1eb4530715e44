"""Cache memory of all sequences on a device: paged rows, rings and carries.

A page holds 256 tokens in every layer: their entries and index keys, so one page table serves all
layers, and a page is what a block of the store becomes. What a sequence needs besides (the newest
window rows, the compressors' carries) lies in its place: rings over positions, `SEEKABLE_TOKENS`
longer than attention needs, so that rejected drafts are taken back by moving the position alone.

Page 0 and place 0 belong to nobody: padded rows of a captured batch point there.

Shape suffixes: P pages or places, B bytes of a page, N places, S ring slots, X raw channels.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kernels.reference.lanes import round_up
from kernels.reference.pages import IndexPages, KvPages
from model.config import CSA_RATIO, ModelConfig
from model.engine import SEEKABLE_TOKENS
from model.layout import carry_channels
from penstock.blocks import BLOCK_TOKENS
from penstock.errors import ModelLoadError

_GROWTH = 1.25


@dataclass(frozen=True)
class Geometry:
    """Sizes that follow from the config alone."""

    config: ModelConfig
    ring: KvPages
    """The newest window rows of one place."""

    @classmethod
    def of(cls, config: ModelConfig) -> Geometry:
        """Raises `ModelLoadError` for rows that the paged FP8 format cannot hold."""
        rows = round_up(config.window + SEEKABLE_TOKENS, 8)
        try:
            ring = KvPages(page_rows=rows, dim=config.head_dim, nope=config.nope_dim)
        except ValueError as error:
            raise ModelLoadError(f"this model cannot run on a device: {error}") from None
        return cls(config, ring)

    def entries(self, ratio: int) -> KvPages:
        c = self.config
        return KvPages(page_rows=BLOCK_TOKENS // ratio, dim=c.head_dim, nope=c.nope_dim)

    def index(self) -> IndexPages:
        return IndexPages(page_rows=BLOCK_TOKENS // CSA_RATIO, dim=self.config.index_dim)

    def carry_rows(self, ratio: int) -> int:
        return ratio * (2 if ratio == CSA_RATIO else 1) + SEEKABLE_TOKENS

    @property
    def page_bytes(self) -> int:
        """One page in all layers."""
        ratios = [ratio for ratio in self.config.ratios if ratio]
        total = sum(self.entries(ratio).page_bytes for ratio in ratios)
        return total + ratios.count(CSA_RATIO) * (
            self.index().page_bytes if CSA_RATIO in ratios else 0
        )

    @property
    def place_bytes(self) -> int:
        """One place in all layers, and the last hidden row."""
        c = self.config
        total = len(c.ratios) * self.ring.page_bytes + 4 * c.hidden
        for ratio in c.ratios:
            if ratio:
                total += 4 * self.carry_rows(ratio) * carry_channels(ratio, c.head_dim)
            if ratio == CSA_RATIO:
                total += 4 * self.carry_rows(ratio) * carry_channels(ratio, c.index_dim)
        return total

    @staticmethod
    def pages_for(tokens: int) -> int:
        return -(-tokens // BLOCK_TOKENS)

    def bytes_for(self, tokens: int) -> int:
        return self.pages_for(tokens) * self.page_bytes + self.place_bytes


@dataclass
class LayerPool:
    """One layer's memory; what the layer has no use for is None."""

    ratio: int
    window_PB: Tensor
    entries_PB: Tensor | None = None
    index_PB: Tensor | None = None
    carry_NSX: Tensor | None = None
    index_carry_NSX: Tensor | None = None


@dataclass
class Pools:
    """Grows when sequences need more than is there, never shrinks; freed pages are used again.

    `generation` counts growths: whatever holds addresses (a captured graph) is stale afterwards.
    """

    geometry: Geometry
    device: torch.device
    layers: list[LayerPool] = field(init=False)
    pages: int = field(init=False, default=1)
    places: int = field(init=False, default=1)
    generation: int = field(init=False, default=0)
    _free_pages: list[int] = field(init=False, default_factory=list)
    _free_places: list[int] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.layers = [self._new_layer(ratio) for ratio in self.geometry.config.ratios]

    def take(self, tokens: int) -> tuple[int, list[int]]:
        """A place and pages for that many tokens. Raises what torch raises without memory; nothing
        is taken then.
        """
        count = self.geometry.pages_for(tokens)
        if len(self._free_pages) < count:
            self._grow_pages(count - len(self._free_pages))
        if not self._free_places:
            self._grow_places()
        return self._free_places.pop(), self.take_pages(count)

    def take_pages(self, count: int) -> list[int]:
        """So many pages more. Raises what torch raises without memory; nothing is taken then."""
        if len(self._free_pages) < count:
            self._grow_pages(count - len(self._free_pages))
        return [self._free_pages.pop() for _ in range(count)]

    def give_back(self, place: int, pages: list[int]) -> None:
        self._free_places.append(place)
        # The lowest are handed out first again, so that memory stays dense.
        self._free_pages = sorted({*self._free_pages, *pages}, reverse=True)

    def _new_layer(self, ratio: int) -> LayerPool:
        g, c = self.geometry, self.geometry.config
        layer = LayerPool(ratio, self._bytes(1, g.ring.page_bytes))
        if ratio:
            layer.entries_PB = self._bytes(1, g.entries(ratio).page_bytes)
            layer.carry_NSX = self._carry(ratio, c.head_dim)
        if ratio == CSA_RATIO:
            layer.index_PB = self._bytes(1, g.index().page_bytes)
            layer.index_carry_NSX = self._carry(ratio, c.index_dim)
        return layer

    def _bytes(self, count: int, size: int) -> Tensor:
        return torch.zeros((count, size), dtype=torch.uint8, device=self.device)

    def _carry(self, ratio: int, dim: int) -> Tensor:
        shape = (1, self.geometry.carry_rows(ratio), carry_channels(ratio, dim))
        return torch.zeros(shape, dtype=torch.float32, device=self.device)

    def _grow_pages(self, least: int) -> None:
        new = max(self.pages + least, int(self.pages * _GROWTH))
        for layer in self.layers:
            layer.entries_PB = _longer(layer.entries_PB, new)
            layer.index_PB = _longer(layer.index_PB, new)
        self._free_pages = sorted({*self._free_pages, *range(self.pages, new)}, reverse=True)
        self.pages = new
        self.generation += 1

    def _grow_places(self) -> None:
        new = max(self.places + 4, int(self.places * _GROWTH))
        for layer in self.layers:
            window = _longer(layer.window_PB, new)
            assert window is not None
            layer.window_PB = window
            layer.carry_NSX = _longer(layer.carry_NSX, new)
            layer.index_carry_NSX = _longer(layer.index_carry_NSX, new)
        self._free_places = sorted({*self._free_places, *range(self.places, new)}, reverse=True)
        self.places = new
        self.generation += 1


def _longer(x: Tensor | None, count: int) -> Tensor | None:
    """`x` with zeros behind it. One layer at a time: the peak is one tensor twice."""
    if x is None or x.shape[0] >= count:
        return x
    out = x.new_zeros((count, *x.shape[1:]))
    out[: x.shape[0]] = x
    return out
