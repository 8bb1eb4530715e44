"""Draw one token from one row of logits. Torch-free, float64, the same bits on every path.

The random number is a counter-based generator's: a keyed hash of (seed, choice, position). So a
stream that moves to another worker, or a draft that is verified later, draws exactly the token that
it would have drawn.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
import numpy.typing as npt

from penstock.request import Sampling

_TAG = b"penstock-sample-1"


def uniform(seed: int, choice: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits. `position` counts the tokens before the one that is
    drawn.
    """
    message = _TAG + struct.pack("<QQQ", seed, choice, position)
    bits = int.from_bytes(hashlib.blake2b(message, digest_size=8).digest(), "little")
    return float(bits >> 11) * 2.0**-53


def sample(
    row: memoryview | npt.NDArray[np.float32],
    sampling: Sampling,
    *,
    position: int,
    forbidden: frozenset[int] = frozenset(),
) -> int:
    """Token id drawn from `row` [V] float32. Ties go to the lowest id.

    `forbidden` ids are never drawn (min_tokens keeps the end token away). Raises ValueError if a
    logit is NaN.
    """
    logits = np.asarray(row, dtype=np.float64)
    if np.isnan(logits).any():
        raise ValueError("logits hold NaN: the model's weights or cache are damaged")
    if forbidden:
        logits = logits.copy()
        logits[list(forbidden)] = -np.inf
    if sampling.greedy:
        return int(np.argmax(logits))
    scaled = (logits - logits.max()) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if 0 < sampling.top_k < len(order):
        order = order[: sampling.top_k]
    weights = np.exp(scaled[order])
    cumulative = np.cumsum(weights)
    if sampling.top_p < 1.0:
        # The smallest set that reaches top_p; the first token always belongs to it.
        keep = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1])) + 1
        cumulative = cumulative[:keep]
    threshold = uniform(sampling.seed, sampling.choice, position) * cumulative[-1]
    index = int(np.searchsorted(cumulative, threshold, side="right"))
    return int(order[min(index, len(cumulative) - 1)])
