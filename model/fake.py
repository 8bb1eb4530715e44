"""`FakeEngine`: the `Engine` contract with no torch, deterministic tokens and settable latency.

It keeps what a real model keeps, in miniature: compressed rows (one digest per 4 tokens), a window
of token ids and a last row. The next token depends on the last digest *and* on a compressed row
picked by it, so a block that is lost, swapped or stale changes the answer, as it would with a
model.
"""

from __future__ import annotations

import hashlib
import struct
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from model.engine import (
    SEEKABLE_TOKENS,
    Buffer,
    DraftRequest,
    EngineInfo,
    Evidence,
    Segment,
    SegmentResult,
    Sequence,
)
from model.replay import check_replay
from model.sampler import sample
from penstock.blocks import BLOCK_TOKENS, CacheLayout, Component, ComponentKind
from penstock.identity import fingerprint

_RATIO = 4
_WINDOW = 128
_ROW = 32
_ROWS_PER_BLOCK = BLOCK_TOKENS // _RATIO
EOS = 256
VOCAB = 257
_ALPHABET = np.frombuffer(b" abcdefghijklmnopqrstuvwxyz,.", dtype=np.uint8)

LAYOUT = CacheLayout(
    (
        Component("fake.rows", ComponentKind.COMPRESSED, _RATIO, _ROW),
        Component("fake.window", ComponentKind.WINDOW, _WINDOW, 4),
        Component("fake.carry", ComponentKind.CARRY, _RATIO, 4),
        Component("fake.last", ComponentKind.LAST, 1, _ROW),
    )
)


class FakeSettings(BaseModel):
    """Latency of the fake (zero means as fast as it goes) and its drafts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill_tokens_per_s: float = Field(default=0.0, ge=0.0)
    decode_step_ms: float = Field(default=0.0, ge=0.0)
    max_model_len: int = Field(default=1 << 20, ge=1)
    draft_tokens: int = Field(default=0, ge=0, lt=SEEKABLE_TOKENS)
    """Most tokens of a draft; 0: no drafts."""
    draft_accuracy: float = Field(default=0.7, ge=0.0, le=1.0)
    """Share of draft tokens that are right."""


@dataclass(frozen=True)
class _Mark:
    """A sequence as it stood before some tokens, and those tokens."""

    position: int
    digest: bytes
    window: tuple[int, ...]
    row_bytes: int
    tokens: tuple[int, ...] = ()


@dataclass
class FakeSequence:
    """Rows of `_ROW` bytes, the last tokens, and the running digest after `position` tokens."""

    capacity: int
    position: int = 0
    digest: bytes = hashlib.sha256(b"fake").digest()
    rows: bytearray = field(default_factory=bytearray)
    window: list[int] = field(default_factory=list)
    released: bool = False
    replays_until: int = 0
    """The end of what a replay may not export."""
    trail: _Mark | None = None
    """Set by a seekable segment, until the next one."""

    def mark(self, tokens: Seq[int] = ()) -> _Mark:
        return _Mark(self.position, self.digest, tuple(self.window), len(self.rows), tuple(tokens))

    def return_to(self, mark: _Mark) -> None:
        """Nothing after `mark` may have been loaded, only absorbed."""
        self.position, self.digest, self.window = mark.position, mark.digest, list(mark.window)
        del self.rows[mark.row_bytes :]

    def absorb(self, token: int) -> None:
        self.digest = hashlib.sha256(self.digest + struct.pack("<I", token)).digest()
        self.position += 1
        self.window.append(token)
        if len(self.window) > _WINDOW:
            del self.window[0]
        # A replay has its rows already.
        if self.position % _RATIO == 0 and len(self.rows) < self.position // _RATIO * _ROW:
            self.rows += self.digest


class FakeLogits:
    def __init__(self, rows: list[npt.NDArray[np.float32]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> memoryview:
        return memoryview(self._rows[index].data).toreadonly()


class FakeEngine:
    """See the module. Fulfils `Engine` in numerics class `exact`."""

    def __init__(self, settings: FakeSettings | None = None) -> None:
        self._settings = settings or FakeSettings()
        self._open: set[int] = set()
        self._info = EngineInfo(
            fingerprint=fingerprint({"model": "fake", "layout": LAYOUT.to_json(), "version": 1}),
            layout=LAYOUT,
            vocab_size=VOCAB,
            max_model_len=self._settings.max_model_len,
            eos_token_ids=frozenset({EOS}),
            numerics="exact",
            description="fake engine (no torch)",
            draft_tokens=self._settings.draft_tokens,
            replay_tokens=_WINDOW,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def open_sequences(self) -> int:
        return len(self._open)

    def bytes_for(self, tokens: int) -> int:
        return -(-tokens // BLOCK_TOKENS) * LAYOUT.block_bytes + 4 * _WINDOW

    def open(self, capacity: int) -> FakeSequence:
        if not 0 < capacity <= self._info.max_model_len:
            raise ValueError(f"capacity {capacity} is outside 1..{self._info.max_model_len}")
        sequence = FakeSequence(capacity)
        self._open.add(id(sequence))
        return sequence

    def grow(self, sequence: Sequence, capacity: int) -> None:
        mine = _live(sequence)
        if not mine.capacity <= capacity <= self._info.max_model_len:
            raise ValueError(
                f"capacity {capacity} is outside {mine.capacity}..{self._info.max_model_len}"
            )
        mine.capacity = capacity

    def release(self, sequence: Sequence) -> None:
        mine = _mine(sequence)
        mine.released = True
        mine.rows.clear()
        self._open.discard(id(mine))

    def load_block(self, sequence: Sequence, index: int, payload: Buffer) -> None:
        mine = _live(sequence)
        if len(payload) != LAYOUT.block_bytes:
            raise ValueError(f"a block has {LAYOUT.block_bytes} bytes, not {len(payload)}")
        if mine.position or len(mine.rows) != index * LAYOUT.block_bytes:
            raise ValueError(f"block {index} is out of order")
        mine.rows += payload

    def load_state(self, sequence: Sequence, position: int, payload: Buffer) -> None:
        mine = _live(sequence)
        if len(payload) != LAYOUT.state_bytes(position):
            raise ValueError(
                f"this state has {LAYOUT.state_bytes(position)} bytes, not {len(payload)}"
            )
        blocks = position // BLOCK_TOKENS
        if len(mine.rows) < blocks * LAYOUT.block_bytes:
            raise ValueError(f"state at {position} needs {blocks} blocks first")
        parts = {
            s.component.name: bytes(payload[s.offset : s.offset + s.size_bytes])
            for s in LAYOUT.state_sections(position)
        }
        del mine.rows[blocks * LAYOUT.block_bytes :]
        mine.rows += parts.get("fake.rows", b"")
        mine.window = list(struct.unpack(f"<{min(position, _WINDOW)}I", parts["fake.window"]))
        mine.digest = parts["fake.last"]
        mine.position, mine.trail = position, None

    def replay(self, sequence: Sequence, start: int) -> None:
        """A row holds the digest up to its end, so only the window has to be read again."""
        mine = _live(sequence)
        blocks = len(mine.rows) // LAYOUT.block_bytes
        check_replay(self._info, start, position=mine.position, blocks=blocks)
        if start:
            end = start // _RATIO * _ROW
            mine.digest = bytes(mine.rows[end - _ROW : end])
        mine.position, mine.trail, mine.replays_until = start, None, blocks * BLOCK_TOKENS

    def forward(self, segments: Seq[Segment]) -> list[SegmentResult]:
        results = []
        for segment in segments:
            mine = _live(segment.sequence)
            if mine.position + len(segment.tokens) > mine.capacity:
                raise ValueError("the sequence's capacity is exceeded")
            if segment.seekable and (segment.states_at or len(segment.tokens) > SEEKABLE_TOKENS):
                raise ValueError(
                    f"a seekable segment has at most {SEEKABLE_TOKENS} tokens and no states_at"
                )
            if segment.states_at and segment.states_at[0] < mine.replays_until:
                raise ValueError(f"a replay has no exact state before {mine.replays_until}")
            if segment.tokens:
                mine.trail = mine.mark(segment.tokens) if segment.seekable else None
            states: dict[int, bytes] = {}
            wanted = set(segment.states_at)
            rows: list[npt.NDArray[np.float32]] = []
            for token in segment.tokens:
                if not 0 <= token < VOCAB:
                    raise ValueError(f"token id {token} is outside the vocabulary of {VOCAB}")
                mine.absorb(token)
                if mine.position in wanted:
                    states[mine.position] = self.export_state(mine)
                if segment.all_logits:
                    rows.append(_logits(mine))
            results.append(SegmentResult(states, FakeLogits(rows) if rows else None))
        self._pretend_to_work(segments)
        return results

    def _pretend_to_work(self, segments: Seq[Segment]) -> None:
        tokens = sum(len(s.tokens) for s in segments)
        if all(len(s.tokens) == 1 or s.seekable for s in segments):
            time.sleep(self._settings.decode_step_ms / 1e3)
        elif self._settings.prefill_tokens_per_s:
            time.sleep(tokens / self._settings.prefill_tokens_per_s)

    def seek(self, sequence: Sequence, position: int) -> None:
        mine = _live(sequence)
        trail = mine.trail
        if trail is None or not 0 < position - trail.position <= len(trail.tokens):
            raise ValueError(f"position {position} is not inside the last seekable forward")
        mine.return_to(trail)
        for token in trail.tokens[: position - trail.position]:
            mine.absorb(token)

    def draft(self, requests: Seq[DraftRequest]) -> list[list[int]]:
        return [self._draft(request) for request in requests]

    def _draft(self, request: DraftRequest) -> list[int]:
        """The very tokens that the target will draw, each made wrong by a coin of its own."""
        mine, most = _live(request.sequence), self._settings.draft_tokens
        if mine.position < 1 or not 0 <= request.count <= most:
            raise ValueError(f"a draft needs a position of at least 1 and 0..{most} tokens")
        before = mine.mark()
        count = min(request.count, mine.capacity - mine.position - 1)
        token, drafts = request.token, list[int]()
        while len(drafts) < count:
            mine.absorb(token)
            banned = request.forbidden_at(len(drafts))
            token = sample(
                _logits(mine), request.sampling, position=mine.position, forbidden=banned
            )
            if mine.digest[-1] >= 256 * self._settings.draft_accuracy:
                token = next(t for t in range(VOCAB) if t != token and t not in banned)
            drafts.append(token)
        mine.return_to(before)
        return drafts

    def export_block(self, sequence: Sequence, index: int) -> bytes:
        mine = _live(sequence)
        if (index + 1) * BLOCK_TOKENS > mine.position:
            raise ValueError(f"block {index} is not complete at position {mine.position}")
        return bytes(mine.rows[index * LAYOUT.block_bytes : (index + 1) * LAYOUT.block_bytes])

    def export_state(self, sequence: Sequence) -> bytes:
        mine = _live(sequence)
        if mine.position < 1:
            raise ValueError("an empty sequence has no state")
        carry = mine.position % _RATIO
        return b"".join(
            (
                bytes(mine.rows[mine.position // BLOCK_TOKENS * LAYOUT.block_bytes :]),
                struct.pack(f"<{len(mine.window)}I", *mine.window),
                struct.pack(f"<{carry}I", *mine.window[len(mine.window) - carry :]),
                mine.digest,
            )
        )

    def logits(self, sequences: Seq[Sequence]) -> FakeLogits:
        return FakeLogits([_logits(_live(s)) for s in sequences])

    def evidence(self, sequence: Sequence) -> list[Evidence]:
        mine = _live(sequence)
        rows = len(mine.rows) // _ROW
        if not rows:
            return []
        picked = _picked_row(mine.digest, rows)
        return [Evidence(picked * _RATIO, (picked + 1) * _RATIO, 1.0)]

    def check(self) -> None:
        return

    def close(self) -> None:
        self._open.clear()


def _picked_row(digest: bytes, rows: int) -> int:
    return int.from_bytes(digest[:8], "little") % rows


def _logits(sequence: FakeSequence) -> npt.NDArray[np.float32]:
    if sequence.position < 1:
        raise ValueError("an empty sequence has no next-token logits")
    rows = len(sequence.rows) // _ROW
    mixed = sequence.digest
    if rows:
        at = _picked_row(sequence.digest, rows) * _ROW
        mixed = hashlib.sha256(mixed + sequence.rows[at : at + _ROW]).digest()
    raw = np.frombuffer(hashlib.shake_128(mixed).digest(2 * VOCAB), dtype="<u2")
    spread = raw.astype(np.float32) * np.float32(8.0 / 65536.0)
    out = np.full(VOCAB, -30.0, dtype=np.float32)
    out[_ALPHABET] = spread[_ALPHABET]
    # About one token in sixty ends the answer.
    out[EOS] = 9.0 if mixed[0] < 4 else -30.0
    return out


def _mine(sequence: Sequence) -> FakeSequence:
    if not isinstance(sequence, FakeSequence):
        raise ValueError("this sequence belongs to another engine")
    return sequence


def _live(sequence: Sequence) -> FakeSequence:
    mine = _mine(sequence)
    if mine.released:
        raise ValueError("this sequence has been released")
    return mine
