"""What the attention kernels share: one step of the running softmax, its end, and the epilogue.

Scores are in units of log 2, so that a weight is one exp2. The maximum of no key is -1e30, finite,
so that nothing is subtracted from itself as infinity.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.triton.numerals import rotated

LOG2_E = 1.4426950408889634


@triton.jit
def fold(score, top, norm):
    """Weights of one tile's scores (-inf where hidden), the new maximum and sum, and the factor of
    what was summed before.
    """
    new = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - new[:, None])
    keep = tl.exp2(top - new)
    return weight, new, norm * keep + tl.sum(weight, 1), keep


@triton.jit
def denominator(norm, top, sink_log2):
    """Sum of weights with the sink's; a row without any key gets an infinite one, hence 0."""
    return norm + tl.exp2(sink_log2 - top)


@triton.jit
def rotate_back(
    x, angle_row, cos, sin, ROWS: tl.constexpr, C: tl.constexpr, FIRST: tl.constexpr,
    D: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """x [ROWS, C], the channels from FIRST of D, with the last 2 PAIRS of D rotated by -angle."""
    pair = FIRST // 2 + tl.arange(0, C // 2) - (D // 2 - PAIRS)
    inside = (pair >= 0)[None, :]
    at = angle_row.to(tl.int64)[:, None] * PAIRS + pair[None, :]
    c = tl.load(cos + at, mask=inside, other=1.0)
    s = tl.load(sin + at, mask=inside, other=0.0)
    even, odd = tl.split(tl.reshape(x, (ROWS, C // 2, 2)))
    turned = rotated(even, odd, c, s, True, -1), rotated(odd, even, c, s, False, -1)
    return tl.reshape(tl.join(turned[0], turned[1]), (ROWS, C))
