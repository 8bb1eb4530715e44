"""Draw one token from one row of logits. Torch-free, float64, the same bits on every path.

The random number is a counter-based generator's: a keyed hash of (seed, choice, position). So a
stream that moves to another worker, or a draft that is verified later, draws exactly the token that
it would have drawn.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from penstock.request import Sampling, TokenLogprobs

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
    adjust: Mapping[int, float] | None = None,
    allowed: npt.NDArray[np.bool_] | None = None,
) -> int:
    """Token id drawn from `row` [V] float32. Ties go to the lowest id.

    `forbidden` ids are never drawn (min_tokens keeps the end token away); `adjust` is added to the
    logits of its ids (bias and penalties); `allowed` [V] is all that a grammar leaves. Raises
    ValueError if a logit is NaN, or if nothing is left to draw.
    """
    logits = np.asarray(row, dtype=np.float64)
    if np.isnan(logits).any():
        raise ValueError("logits hold NaN: the model's weights or cache are damaged")
    if forbidden or adjust or allowed is not None:
        logits = logits.copy()
        for token, amount in (adjust or {}).items():
            logits[token] += amount
        logits[list(forbidden)] = -np.inf
        if allowed is not None:
            logits[~allowed] = -np.inf
            if np.isneginf(logits.max()):
                raise ValueError("the grammar leaves no token to draw")
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


def logprobs(row: memoryview | npt.NDArray[np.float32], token: int, *, top: int) -> TokenLogprobs:
    """Of `token` and of the `top` likeliest ids under the softmax of `row` [V] float32, in
    float64. Every id has one: a probability that float64 cannot hold is below e^-700.
    """
    logits = np.asarray(row, dtype=np.float64)
    shifted = logits - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    best: tuple[tuple[int, float], ...] = ()
    if top:
        count = min(top, len(shifted))
        # All that tie with the last place, so that ties go to the lowest id as they do in `sample`.
        least = np.partition(shifted, len(shifted) - count)[len(shifted) - count]
        ids = np.flatnonzero(shifted >= least)
        order = ids[np.argsort(-shifted[ids], kind="stable")][:count]
        best = tuple((int(i), float(shifted[i])) for i in order)
    return TokenLogprobs(float(shifted[token]), best)
