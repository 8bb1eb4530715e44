"""What this process itself routed: prompts being read now, and who was given which blocks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from penstock.blocks import BLOCK_TOKENS

MOST_SEEN_BLOCKS = 1 << 19
WORTH_WAITING_TOKENS = 2_048
"""A prompt with less to compute is not worth waiting for: nobody looks for duplicates of it."""
_SEEN_WORKERS = 8
"""Workers remembered for each block."""


@dataclass(frozen=True, eq=False, slots=True)
class Reading:
    """One prompt that a prefill worker has been given."""

    worker_id: str
    blocks: tuple[bytes, ...]


class InFlight:
    """Prompts between their decision and their end. As large as their block ids."""

    def __init__(self) -> None:
        self._by_block: dict[bytes, Reading | tuple[Reading, ...]] = {}
        """A block has one reader, most of the time."""

    def __len__(self) -> int:
        """Blocks that somebody reads."""
        return len(self._by_block)

    def begin(self, worker_id: str, blocks: tuple[bytes, ...]) -> Reading:
        reading = Reading(worker_id, blocks)
        by_block = self._by_block
        if by_block.keys().isdisjoint(blocks):
            by_block.update(dict.fromkeys(blocks, reading))
        else:
            for id_ in blocks:
                others = self._readers(id_)
                by_block[id_] = (*others, reading) if others else reading
        return reading

    def end(self, reading: Reading) -> None:
        """Idempotent."""
        by_block = self._by_block
        for id_ in reading.blocks:
            readers = by_block.get(id_)
            if readers is reading:
                del by_block[id_]
            elif isinstance(readers, tuple):
                rest = tuple(each for each in readers if each is not reading)
                by_block[id_] = rest[0] if len(rest) == 1 else rest

    def _readers(self, id_: bytes) -> tuple[Reading, ...]:
        readers = self._by_block.get(id_, ())
        return readers if isinstance(readers, tuple) else (readers,)

    def near(self, blocks: Sequence[bytes]) -> Mapping[str, int]:
        """Worker id -> leading tokens of a prompt of these blocks that it is reading: it keeps a
        state where a prompt that waits for it parts from the one that it reads.
        """
        found: dict[str, int] = {}
        live = self._readers(blocks[0]) if blocks else ()
        index = 0
        while live:
            index += 1
            for reading in live:
                found[reading.worker_id] = index * BLOCK_TOKENS
            here = self._readers(blocks[index]) if index < len(blocks) else ()
            live = tuple(reading for reading in live if reading in here)
        return found


class Seen:
    """Which workers were given which blocks, most recent first to stay: what `block-overlap` routes
    by. Bounded; the longest unseen block goes first.
    """

    def __init__(self, *, most_blocks: int = MOST_SEEN_BLOCKS) -> None:
        self._most = most_blocks
        self._by_block: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_block)

    def note(self, worker_id: str, blocks: Sequence[bytes]) -> None:
        by_block = self._by_block
        # The prompt's end goes first into the order, so that it is also forgotten first.
        for id_ in reversed(blocks):
            others = tuple(w for w in by_block.pop(id_, ()) if w != worker_id)
            by_block[id_] = (worker_id, *others[: _SEEN_WORKERS - 1])
        while len(by_block) > self._most:
            by_block.popitem(last=False)

    def seen(self, blocks: Sequence[bytes]) -> Mapping[str, int]:
        """Worker id -> leading tokens of a prompt of these blocks that it was given before."""
        found: dict[str, int] = {}
        live: set[str] | None = None
        for index, id_ in enumerate(blocks, 1):
            here = self._by_block.get(id_, ())
            live = set(here) if live is None else live.intersection(here)
            if not live:
                break
            for worker_id in live:
                found[worker_id] = index * BLOCK_TOKENS
        return found
