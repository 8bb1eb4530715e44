"""What the network and the engine need of a draft module, whichever it is.

Shape suffixes: R rows, S streams, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.ops import ReferenceOps
from model.cache import SequenceCache
from model.engine import DraftRequest
from model.layers.block import Block
from model.layers.head import HeadCollapse
from model.linear import Linear
from model.rows import Rows
from model.sampler import sample


@dataclass(frozen=True)
class Asked:
    """A request and the cache of its sequence."""

    cache: SequenceCache
    request: DraftRequest

    def draw(self, row_V: Tensor, index: int) -> int:
        """Draft number `index`: drawn as the target will draw at that position."""
        return sample(
            row_V.numpy(),
            self.request.sampling,
            position=self.cache.position + 1 + index,
            forbidden=self.request.forbidden_at(index),
        )


class Drafter(Protocol):
    """A draft module. Its windows belong to the caches; itself it keeps nothing of a sequence."""

    @property
    def taps(self) -> frozenset[int]:
        """Backbone layers whose output it reads."""

    @property
    def tail(self) -> int:
        """Of how many last rows of a span."""

    def absorb(self, rows: Rows, tapped: Mapping[int, Tensor], tokens_R: Tensor) -> None:
        """The backbone has absorbed a pass: update the windows.

        `rows`: the last `tail` rows of each span (all, if the sequence leaves a trail), `tokens_R`
        their tokens, `tapped` their streams [R, S, D] after each of `taps`. The caches' positions
        are still those before the pass.
        """

    def draft(self, asked: Sequence[Asked]) -> list[list[int]]:
        """Up to `request.count` (>= 1) tokens for each. Changes no cache."""


@dataclass(frozen=True)
class Parts:
    """What a draft module shares with the backbone or is built from."""

    ops: ReferenceOps
    blocks: tuple[Block, ...]
    head: HeadCollapse
    linear: Callable[[str], Linear]
    """By the weight's name below `mtp.`"""
    vector: Callable[[str], Tensor]
    embed: Callable[[Tensor], Tensor]
    """Token ids [R] -> [R, D]."""
    logits: Callable[[Tensor], Tensor]
    """Collapsed and normalised rows [R, D] -> [R, V] fp32."""
    dtype: torch.dtype
    """Of activations."""
    streams: int
    window: int
    norm_eps: float
    first_layer: int
    """Where the blocks' windows lie in a cache: after the backbone's layers."""
