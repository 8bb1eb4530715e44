"""Blocks and states: what a sequence's compressed KV is cut into, described by a component table.

A *block* holds every layer's compressed rows of 256 consecutive tokens. A *state* at position p
holds all else that a sequence needs to resume at p: the last window of rows of every layer, the
compressors' carries, the compressed rows of the unfinished block, and the last token's outputs.
Both are described by a `CacheLayout`, which comes from the model's config, never from constants
(report 3; architecture.md).

An object's payload is its components' rows in table order, each component contiguous, no padding.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

BLOCK_TOKENS = 256
STATE_ALIGN_TOKENS = 128


class ComponentKind(StrEnum):
    """How many rows a component has in a block and in a state at position p."""

    COMPRESSED = "compressed"
    """One row per `ratio` tokens. Block: 256 / ratio rows. State: rows of the unfinished block."""
    WINDOW = "window"
    """The last min(p, ratio) tokens' rows, oldest first (`ratio` is the window). State only."""
    CARRY = "carry"
    """Raw rows of the unfinished compression window: p % ratio rows. State only."""
    CARRY_OVERLAP = "carry_overlap"
    """As CARRY, preceded by the previous full window's `ratio` rows if there is one. State only."""
    LAST = "last"
    """One row that belongs to the token at p - 1. State only."""


class ObjectKind(StrEnum):
    BLOCK = "block"
    STATE = "state"


@dataclass(frozen=True)
class Component:
    """One named array of fixed-size rows. `ratio` is the compression ratio or the window, in
    tokens.
    """

    name: str
    kind: ComponentKind
    ratio: int
    row_bytes: int

    def __post_init__(self) -> None:
        if self.ratio < 1 or self.row_bytes < 1:
            raise ValueError(f"component {self.name}: ratio and row_bytes must be positive")
        if self.kind is ComponentKind.COMPRESSED and BLOCK_TOKENS % self.ratio:
            raise ValueError(f"component {self.name}: ratio {self.ratio} does not divide 256")

    @property
    def block_rows(self) -> int:
        return BLOCK_TOKENS // self.ratio if self.kind is ComponentKind.COMPRESSED else 0

    def state_rows(self, position: int) -> int:
        """Rows of this component in a state at `position` (>= 1)."""
        match self.kind:
            case ComponentKind.COMPRESSED:
                return position % BLOCK_TOKENS // self.ratio
            case ComponentKind.WINDOW:
                return min(position, self.ratio)
            case ComponentKind.CARRY:
                return position % self.ratio
            case ComponentKind.CARRY_OVERLAP:
                return position % self.ratio + (self.ratio if position >= self.ratio else 0)
            case ComponentKind.LAST:
                return 1


@dataclass(frozen=True)
class Section:
    """Where one component's rows lie in a payload."""

    component: Component
    offset: int
    rows: int

    @property
    def size_bytes(self) -> int:
        return self.rows * self.component.row_bytes


@dataclass(frozen=True)
class CacheLayout:
    """The component table of one model in one KV format."""

    components: tuple[Component, ...]

    def __post_init__(self) -> None:
        names = [c.name for c in self.components]
        if len(set(names)) != len(names):
            raise ValueError("component names must be unique")

    def block_sections(self) -> tuple[Section, ...]:
        return _place((c, c.block_rows) for c in self.components)

    def state_sections(self, position: int) -> tuple[Section, ...]:
        if position < 1:
            raise ValueError(f"a state needs a position of at least 1, not {position}")
        return _place((c, c.state_rows(position)) for c in self.components)

    @property
    def block_bytes(self) -> int:
        return sum(s.size_bytes for s in self.block_sections())

    def state_bytes(self, position: int) -> int:
        return sum(s.size_bytes for s in self.state_sections(position))

    @property
    def bytes_per_token(self) -> float:
        """Growing KV per token of context, in bytes."""
        return self.block_bytes / BLOCK_TOKENS

    def to_json(self) -> str:
        """Canonical form: part of the fingerprint and of every stored object's header."""
        rows = [[c.name, c.kind.value, c.ratio, c.row_bytes] for c in self.components]
        return json.dumps(rows, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> CacheLayout:
        """Inverse of `to_json`. Raises ValueError for anything it does not know (never guesses)."""
        rows: Any = json.loads(text)
        try:
            return cls(tuple(Component(n, ComponentKind(k), int(r), int(b)) for n, k, r, b in rows))
        except (TypeError, ValueError) as error:
            raise ValueError(f"unknown or malformed component table: {error}") from error

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.to_json().encode()).digest()

    def without(self, kind: ComponentKind) -> CacheLayout:
        return replace(self, components=tuple(c for c in self.components if c.kind is not kind))


def _place(rows: Iterable[tuple[Component, int]]) -> tuple[Section, ...]:
    sections, offset = [], 0
    for component, count in rows:
        if count:
            sections.append(Section(component, offset, count))
            offset += count * component.row_bytes
    return tuple(sections)
