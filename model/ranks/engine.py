"""`RankedEngine`: the `Engine` contract over several ranks. Rank 0 speaks, the others do the same.

Every rank holds every sequence's whole cache (there is one KV head, T23) and makes the same calls
in the same order. Calls that need the other ranks' sums are sent first and then made here; the
others are made here first, so that only what was accepted is sent. What is asked of one rank alone
(exports, evidence) is not sent. Torch-free.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from typing import Any, TypeVar

from model.engine import (
    Buffer,
    DraftRequest,
    Engine,
    EngineInfo,
    Evidence,
    Logits,
    Segment,
    SegmentResult,
    Sequence,
)
from model.ranks.followers import Followers
from model.ranks.message import Pack
from penstock.errors import WorkerUnavailableError

T = TypeVar("T")
CALLS = frozenset(
    {
        "open",
        "grow",
        "release",
        "load_block",
        "load_state",
        "replay",
        "forward",
        "seek",
        "draft",
        "logits",
    }
)
"""What a follower may be told to call."""


class RankedEngine:
    """Rank 0's engine and its followers; both are closed with it."""

    def __init__(self, engine: Engine, followers: Followers) -> None:
        self._engine, self._followers = engine, followers
        # By id, with the sequence itself: an id is its own only while the object lives.
        self._numbers: dict[int, tuple[int, Sequence]] = {}
        self._opened = 0
        info = engine.info
        self._info = replace(info, description=f"{info.description}, rank 0 of several")

    @property
    def info(self) -> EngineInfo:
        return self._info

    def check(self) -> None:
        self._followers.check()
        self._engine.check()

    def bytes_for(self, tokens: int) -> int:
        return self._engine.bytes_for(tokens)

    def open(self, capacity: int) -> Sequence:
        sequence = self._here_first(self._engine.open, capacity, number=self._opened)
        self._numbers[id(sequence)] = (self._opened, sequence)
        self._opened += 1
        return sequence

    def grow(self, sequence: Sequence, capacity: int) -> None:
        self._here_first(self._engine.grow, sequence, capacity)

    def release(self, sequence: Sequence) -> None:
        known = id(sequence) in self._numbers
        self._engine.release(sequence)
        if known:
            # Ranks that are lost hold nothing any more; giving up must work all the same.
            with contextlib.suppress(WorkerUnavailableError):
                self._tell("release", (sequence,))
            del self._numbers[id(sequence)]

    def load_block(self, sequence: Sequence, index: int, payload: Buffer) -> None:
        self._here_first(self._engine.load_block, sequence, index, payload)

    def load_state(self, sequence: Sequence, position: int, payload: Buffer) -> None:
        self._here_first(self._engine.load_state, sequence, position, payload)

    def replay(self, sequence: Sequence, start: int) -> None:
        self._here_first(self._engine.replay, sequence, start)

    def forward(self, segments: Seq[Segment]) -> list[SegmentResult]:
        return self._together(
            self._engine.forward, [segment.sequence for segment in segments], list(segments)
        )

    def logits(self, sequences: Seq[Sequence]) -> Logits:
        return self._together(self._engine.logits, sequences, list(sequences))

    def seek(self, sequence: Sequence, position: int) -> None:
        self._here_first(self._engine.seek, sequence, position)

    def draft(self, requests: Seq[DraftRequest]) -> list[list[int]]:
        return self._together(
            self._engine.draft, [request.sequence for request in requests], list(requests)
        )

    def export_block(self, sequence: Sequence, index: int) -> bytes:
        return self._engine.export_block(sequence, index)

    def export_state(self, sequence: Sequence) -> bytes:
        return self._engine.export_state(sequence)

    def evidence(self, sequence: Sequence) -> list[Evidence]:
        return self._engine.evidence(sequence)

    def close(self) -> None:
        self._engine.close()
        self._followers.close()

    def _here_first(self, call: Callable[..., T], *arguments: Any, number: int | None = None) -> T:
        """Made here, then by all others. `number` names the sequence that it makes."""
        self._followers.check()
        made = call(*arguments)
        self._tell(call.__name__, arguments, number=number)
        return made

    def _together(self, call: Callable[..., T], sequences: Seq[Sequence], *arguments: Any) -> T:
        """Made by all ranks at once.

        Wrong arguments are refused by all alike, with `ValueError`; anything else loses the ranks.
        """
        self._followers.check()
        if all(id(sequence) in self._numbers for sequence in sequences):
            self._tell(call.__name__, arguments, together=True)
        # Else the call below refuses a sequence that is not ours before any rank is needed.
        try:
            return call(*arguments)
        except ValueError:
            raise
        except Exception as error:
            raise self._followers.lost(error) from error

    def _tell(
        self,
        name: str,
        arguments: Seq[Any],
        *,
        number: int | None = None,
        together: bool = False,
    ) -> None:
        pack = Pack(self._number_of)
        head = {
            "call": name,
            "arguments": [pack.value(argument) for argument in arguments],
            "number": number,
            "together": together,
        }
        self._followers.tell(head, pack.buffers)

    def _number_of(self, value: object) -> int | None:
        found = self._numbers.get(id(value))
        return None if found is None else found[0]
