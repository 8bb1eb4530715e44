"""The digest of a checkpoint's numbers: over every byte that is loaded, in the one read that loads
it, and the same for every layout of ranks.

Two checkpoints that differ in one byte must not share blocks, so a sample of the bytes will not do
(one changed row of the embedding would escape it). A hash of the whole files would cost each rank a
read of what it does not hold. So the digest is a sum that ranks can share: every word of 8 bytes is
mixed with a key of its tensor and place, all are added modulo 2^64 in two independent lanes, and a
rank adds only what it has read. The sum of the ranks' shares, with names, types and shapes, goes
through SHA-256. Two different checkpoints agree by accident with probability about 2^-120; it is no
defence against someone who makes weights to collide (who could as well make bad weights).

Shape suffixes: N rows, W words of a row.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint64]

LANES = 2
_PIECE_WORDS = 1 << 15
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_STEP, _MIX_1, _MIX_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
Share = tuple[int, ...]


class TensorSum:
    """Adds up one tensor, given in any pieces that do not overlap."""

    def __init__(self, name: str, row_bytes: int) -> None:
        self._word = math.gcd(row_bytes, 8)
        seeds = hashlib.blake2b(name.encode(), digest_size=16 * LANES).digest()
        keys = np.frombuffer(seeds, np.uint64)
        self._rows, self._columns = keys[:LANES], keys[LANES:]
        self.share: list[int] = [0] * LANES

    def add(self, raw: Bytes, *, row: int, byte: int = 0) -> None:
        """Bytes [N, B] whose first one is byte `byte` of row `row`."""
        if byte % self._word or raw.shape[1] % self._word:
            raise ValueError(f"a cut at byte {byte} goes through a word of {self._word} bytes")
        words = np.ascontiguousarray(raw).view(_WORDS[self._word])
        count, width = words.shape
        step = max(_PIECE_WORDS // max(width, 1), 1)
        for lane in range(LANES):
            column_keys = _keys(self._columns[lane], byte // self._word, width)
            row_keys = _keys(self._rows[lane], row, count)
            total = 0
            for at in range(0, count, step):
                mixed = words[at : at + step] * column_keys
                mixed ^= mixed >> np.uint64(32)
                sums = mixed.sum(1, dtype=np.uint64) * row_keys[at : at + step]
                total += int(sums.sum(dtype=np.uint64))
            self.share[lane] = (self.share[lane] + total) % (1 << 64)


def _keys(seed: np.uint64, first: int, count: int) -> Words:
    """Odd keys of the places first .. first + count - 1 (splitmix64)."""
    at = np.arange(first + 1, first + count + 1, dtype=np.uint64)
    z = at * np.uint64(_STEP) + seed
    z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX_2)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def add_shares(shares: Iterable[Share]) -> Share:
    """The sum of what several ranks (or tensors) have read."""
    return tuple(sum(lane) % (1 << 64) for lane in zip(*shares, strict=True)) or (0,) * LANES


def finish(headers: Iterable[tuple[str, str, tuple[int, ...]]], total: Share) -> str:
    """Hex digest of names, types, shapes and the sum of all shares."""
    text = "\n".join(f"{name} {dtype} {list(shape)}" for name, dtype, shape in sorted(headers))
    return hashlib.sha256(f"{text}\n{total}".encode()).hexdigest()
