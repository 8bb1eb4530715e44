"""`Engine`: the seam between the workers and a model (or the fake). Torch-free on purpose.

Ownership and calling rules, which every implementation and the shared contract test follow:
- An engine is driven by one thread at a time (workers use one executor thread); it starts no
  threads itself.
- A `Sequence` belongs to the engine that made it. `release` gives its memory back, may be called
  twice, and any later use of the sequence raises `ValueError`. Cancelling = releasing between two
  calls.
- `forward` is all or nothing: if it raises, the sequences it was given must be released by the
  caller.
- `seek` takes rejected draft tokens back: afterwards a sequence is, to the bit, as if it had never
  been given them (deepseek-v4.md 2.6, T18).
- In numerics class `exact` the outputs of a token depend on its prefix alone: bitwise the same for
  every split into chunks, every batch, and after any export/load round trip.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Protocol

from penstock.blocks import CacheLayout
from penstock.request import Sampling

Buffer = bytes | bytearray | memoryview
SEEKABLE_TOKENS = 64


@dataclass(frozen=True)
class DraftCost:
    """What drafts cost, in plain decode steps: each draft, and each token of it (its own
    computation and one more row to verify).
    """

    start: float = 0.0
    token: float = 0.05


@dataclass(frozen=True)
class EngineInfo:
    """What the rest of the cluster must know of an engine."""

    fingerprint: bytes
    layout: CacheLayout
    vocab_size: int
    max_model_len: int
    eos_token_ids: frozenset[int]
    numerics: str
    description: str = ""
    draft_tokens: int = 0
    """Most tokens that `draft` proposes at once; 0: the engine does not draft."""
    draft_cost: DraftCost = DraftCost()
    replay_tokens: int = 0
    """Tokens that `replay` must absorb again before a sequence is exact; 0: the engine cannot."""


class Sequence(Protocol):
    """One sequence's cache inside an engine."""

    @property
    def position(self) -> int:
        """Tokens absorbed so far."""

    @property
    def capacity(self) -> int:
        """Most tokens this sequence may absorb; `Engine.grow` raises it."""


@dataclass(frozen=True)
class Segment:
    """`tokens` to absorb next into `sequence`; states wanted at the positions in `states_at`.

    `states_at` are absolute positions in (position, position + len(tokens)], ascending.
    """

    sequence: Sequence
    tokens: Seq[int]
    states_at: tuple[int, ...] = ()
    all_logits: bool = False
    """Return next-token logits after every one of `tokens`, not only on demand after the last."""
    seekable: bool = False
    """Allow `seek` to any position of this segment until the sequence's next forward. At most
    `SEEKABLE_TOKENS` tokens, and no `states_at`: seek there and export.
    """


@dataclass(frozen=True)
class DraftRequest:
    """Propose up to `count` tokens to follow `token`, which was drawn but is not yet absorbed.

    Drafts are drawn with `sampling` at their own positions, by the generator that the target will
    draw with, so that a good draft is also the same draw. `forbidden` ids are kept out of the first
    `forbidden_for` drafts.
    """

    sequence: Sequence
    token: int
    count: int
    sampling: Sampling
    forbidden: frozenset[int] = frozenset()
    forbidden_for: int = 0

    def forbidden_at(self, index: int) -> frozenset[int]:
        """What draft number `index` must not be."""
        return self.forbidden if index < self.forbidden_for else frozenset()


@dataclass(frozen=True)
class Evidence:
    """Which compressed entries the last layer's attention selected for a token's prediction.

    `start`/`end` are token positions (half-open); `mass` is the attention probability, averaged
    over heads.
    """

    start: int
    end: int
    mass: float


@dataclass(frozen=True)
class SegmentResult:
    """States by position as payload bytes in `layout.state_sections(p)` order."""

    states: dict[int, bytes] = field(default_factory=dict)
    logits: Logits | None = None
    """One row a token, if the segment asked for `all_logits`."""


class Engine(Protocol):
    @property
    def info(self) -> EngineInfo: ...

    def bytes_for(self, tokens: int) -> int:
        """Memory that a sequence of this capacity takes, in bytes (for admission)."""

    def open(self, capacity: int) -> Sequence:
        """A new empty sequence at position 0. Memory for `capacity` tokens is taken now."""

    def release(self, sequence: Sequence) -> None: ...

    def grow(self, sequence: Sequence, capacity: int) -> None:
        """Room for `capacity` tokens, at least what it has. What it holds stays as it is, to the
        bit. Raises as `open`; the sequence is then as before.
        """

    def load_block(self, sequence: Sequence, index: int, payload: Buffer) -> None:
        """Attach block `index` (in order: 0, 1, ...). Takes a copy; the caller keeps the buffer."""

    def load_state(self, sequence: Sequence, position: int, payload: Buffer) -> None:
        """Attach the state at `position`; blocks 0 .. position // 256 - 1 must have been
        attached.
        """

    def replay(self, sequence: Sequence, start: int) -> None:
        """Stand at `start`, a multiple of 128, with blocks attached beyond it but no state.

        Forwards up to the end of the attached blocks change nothing of them and may ask for no
        state on the way. What stands there after at least `info.replay_tokens` tokens is, to the
        bit, what one undisturbed pass leaves: each layer's window needs the window of the layer
        below, so the error of an empty one dies out after as many windows as there are layers.
        """

    def forward(self, segments: Seq[Segment]) -> list[SegmentResult]:
        """Absorb each segment's tokens. One result a segment, in order."""

    def seek(self, sequence: Sequence, position: int) -> None:
        """Stand at `position` inside the sequence's last forward, whose segment was seekable:
        after at least one and at most all of its tokens. May be called again, also forwards.
        """

    def draft(self, requests: Seq[DraftRequest]) -> list[list[int]]:
        """Tokens proposed for each request: at most `count`, perhaps none. Changes no sequence.

        Every sequence must stand at a position of at least 1; `count` is at most
        `info.draft_tokens`.
        """

    def export_block(self, sequence: Sequence, index: int) -> bytes:
        """Payload of a completed block (256 (index + 1) <= position)."""

    def export_state(self, sequence: Sequence) -> bytes:
        """Payload of the state at the sequence's current position (>= 1)."""

    def logits(self, sequences: Seq[Sequence]) -> Logits:
        """Next-token logits after each sequence's last token. Every position must be >= 1."""

    def evidence(self, sequence: Sequence) -> list[Evidence]:
        """Evidence behind the next token's prediction, heaviest first; [] if the model cannot
        tell.
        """

    def check(self) -> None:
        """Raises WorkerUnavailableError once the engine can serve no more, because another rank of
        it is lost. May be called from any thread, also during a call.
        """

    def close(self) -> None: ...


class Logits(Protocol):
    """Rows of float32 logits that stay where the engine keeps them until a row is sampled."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> memoryview:
        """[V] float32 as a read-only memoryview with format 'f' (numpy and torch can wrap it
        without a copy).
        """
