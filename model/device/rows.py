"""What one pass computes: its tokens, where they stand, and which windows they complete.

A *prompt* pass has any spans and is laid out on the host. A *step* has one token of each sequence
and is laid out on the device from four tensors, so that a captured graph can be replayed with new
ones: nothing in it depends on a number that only the host knows.

Shape suffixes: R rows (tokens), N spans, T places of a page table, B windows, P rotated
pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kernels.reference.lanes import full_lanes
from model.device.pools import Geometry
from model.device.sequence import DeviceSequence
from penstock.blocks import BLOCK_TOKENS

Integers = npt.NDArray[np.int32]
T = TypeVar("T")


@dataclass(frozen=True)
class Span:
    """`count` consecutive tokens of one sequence, first at `position`, in rows from `row` on."""

    sequence: DeviceSequence
    row: int
    count: int
    position: int

    @property
    def end(self) -> int:
        return self.position + self.count

    @property
    def rows(self) -> slice:
        return slice(self.row, self.row + self.count)


@dataclass(frozen=True)
class Windows:
    """Completed compressor windows (`kernels.reference.compress`): the list, the position of each
    window's own first token, and the slot of its entry.
    """

    windows_B4: Tensor
    first_B: Tensor
    slots_B: Tensor


@dataclass
class Rows:
    """Tensors of a pass on the device. `places_R` and `tables_NT` say where sequences lie;
    `owner_R` which span (row of the table) a row belongs to.
    """

    geometry: Geometry
    tokens_R: Tensor
    positions_R: Tensor
    places_R: Tensor
    owner_R: Tensor
    tables_NT: Tensor
    spans_N4: Tensor
    ring_R: Tensor
    """Ring slot that keeps each row's window row; -1: a later row of the pass takes it."""
    spans: tuple[Span, ...] = ()
    """Of a prompt pass."""
    longest: int = 0
    """Bound on positions + 1: of a step that of its bucket."""
    _made: dict[object, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        return self.tokens_R.shape[0]

    @property
    def device(self) -> torch.device:
        return self.tokens_R.device

    @property
    def is_step(self) -> bool:
        return not self.spans

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What several layers of a pass share is made by the first."""
        if key not in self._made:
            self._made[key] = make()
        found: T = self._made[key]
        return found

    def cos_sin(self, freq_P: Tensor) -> tuple[Tensor, Tensor]:
        """fp32 [R, P] of the rows' positions."""
        return self.once(id(freq_P), lambda: angles(self.positions_R, freq_P))

    def window_angles(self, windows: Windows, freq_P: Tensor) -> tuple[Tensor, Tensor]:
        """Of the windows' own first tokens (T13)."""
        key = (id(windows), id(freq_P))
        return self.once(key, lambda: angles(windows.first_B, freq_P))

    def visible(self, ratio: int) -> Tensor:
        """int32 [R]: entries that each row may see."""
        return ((self.positions_R + 1) // ratio).to(torch.int32)

    def most_visible(self, ratio: int) -> int:
        return self.longest // ratio

    def windows(self, ratio: int) -> Windows | None:
        """None: no window of this ratio ends in the pass."""
        make = self._step_windows if self.is_step else self._prompt_windows
        return self.once(("windows", ratio), lambda: make(ratio))

    def entry_slots(self, entries: Tensor, owner: Tensor | int, ratio: int) -> Tensor:
        """int32 slots of entries of the spans `owner` (broadcast); -1 stays -1."""
        rows = BLOCK_TOKENS // ratio
        known = entries.clamp_min(0).long()
        page = self.tables_NT[owner, known // rows]
        slots = page * rows + (known % rows).to(torch.int32)
        return torch.where(entries < 0, -1, slots).to(torch.int32)

    def _step_windows(self, ratio: int) -> Windows:
        row = torch.arange(self.count, device=self.device)
        position = self.positions_R
        ends = ((position + 1) % ratio == 0) & (self.places_R > 0)
        last = torch.where(ends, row, -1)
        parts = (last, torch.zeros_like(row), position, self.places_R)
        entry = position // ratio
        slots = self.entry_slots(torch.where(ends, entry, -1), self.owner_R, ratio)
        return Windows(torch.stack(parts, 1).to(torch.int32), entry * ratio, slots)

    def _prompt_windows(self, ratio: int) -> Windows | None:
        rows = BLOCK_TOKENS // ratio
        lists: list[Integers] = []
        for span in self.spans:
            entry = np.arange(span.position // ratio, span.end // ratio)
            last = (entry + 1) * ratio - 1
            pages = np.asarray(span.sequence.pages)[entry // rows]
            before = last - span.position
            place = np.full_like(last, span.sequence.place)
            parts = (span.row + before, before, last, place, entry * ratio)
            lists.append(
                np.stack((*parts, pages * rows + entry % rows), 1).astype(np.int32, copy=False)
            )
        every = np.concatenate(lists)
        if not len(every):
            return None
        found = upload(every, self.device)
        first, slots = found[:, 4].contiguous(), found[:, 5].contiguous()
        return Windows(found[:, :4].contiguous(), first, slots)


def angles(positions: Tensor, freq_P: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin fp32 [R, P]. On a CPU without a scalar tail, which may differ by an ulp."""
    angle = positions.to(torch.float32)[:, None] * freq_P
    if angle.is_cuda:
        return torch.cos(angle), torch.sin(angle)
    return full_lanes(torch.cos, angle), full_lanes(torch.sin, angle)


def upload(values: npt.NDArray[np.generic], device: torch.device) -> Tensor:
    """To the device without waiting for it."""
    host = torch.from_numpy(np.ascontiguousarray(values))
    if device.type != "cuda":
        return host.clone()
    return host.pin_memory().to(device, non_blocking=True)


def step_rows(
    geometry: Geometry, tokens: Tensor, positions: Tensor, places: Tensor, tables_NT: Tensor
) -> Rows:
    """One token of each sequence; all four are on the device (int64, int64, int64, int32).

    A row of place 0 is padding: it writes nothing.
    """
    row = torch.arange(tokens.shape[0], device=tokens.device)
    ring, real = geometry.ring.page_rows, places > 0
    spans = torch.stack((row, real.long(), positions, places), 1)
    return Rows(
        geometry=geometry,
        tokens_R=tokens,
        positions_R=positions,
        places_R=places,
        owner_R=row,
        tables_NT=tables_NT,
        spans_N4=spans.to(torch.int32),
        ring_R=torch.where(real, places * ring + positions % ring, -1).to(torch.int32),
        longest=tables_NT.shape[1] * BLOCK_TOKENS,
    )


def prompt_rows(
    geometry: Geometry, spans: Sequence[Span], tokens: Sequence[int], device: torch.device
) -> Rows:
    """Any spans, each of another sequence, laid out on the host."""
    counts = np.asarray([span.count for span in spans])
    owner = np.repeat(np.arange(len(spans)), counts)
    positions = np.concatenate([np.arange(span.position, span.end) for span in spans])
    places = np.asarray([span.sequence.place for span in spans])[owner]
    ends = np.asarray([span.end for span in spans])[owner]
    ring = geometry.ring.page_rows
    slots = np.where(positions >= ends - ring, places * ring + positions % ring, -1)
    tables = np.zeros((len(spans), max(len(span.sequence.pages) for span in spans)), np.int32)
    for table, span in zip(tables, spans, strict=True):
        table[: len(span.sequence.pages)] = span.sequence.pages
    starts = [(span.row, span.count, span.position, span.sequence.place) for span in spans]
    return Rows(
        geometry=geometry,
        tokens_R=upload(np.asarray(tokens, np.int64), device),
        positions_R=upload(positions, device),
        places_R=upload(places, device),
        owner_R=upload(owner, device),
        tables_NT=upload(tables, device),
        spans_N4=upload(np.asarray(starts, np.int32), device),
        ring_R=upload(slots.astype(np.int32), device),
        spans=tuple(spans),
        longest=int(ends.max()),
    )
