"""Sampling without a sort; meaning in kernels/reference/sample.py.

A token's place in the order is found from outside: the key t for which the mass of all larger keys
is still too small. Each launch narrows t by five bits: every program sums its 2,048 tokens' mass
above 32 candidates, and the next launch adds the programs' sums in order. Top-k (mass 1 a token),
top-p and the draw are the same search with another mass and target; between them, a launch cuts
the mass that does not belong. All sums are float64 in a fixed order, nothing waits for the host.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.launch import Case, launch, meta

_CHUNK = 2048
_STEP = 64
_SHIFTS = (30, 25, 20, 15, 10, 5, 0)
_CANDIDATES = tl.constexpr(32)
_COUNT, _MASS, _DRAW = 0, 1, 2


@triton.jit
def ordered(logits):
    """int64 keys 0 .. 2^32 - 1 in the order of the fp32 logits; both zeros are one."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 2147483648


@triton.jit
def _chunk_max(logits, top, size, CHUNK: tl.constexpr):
    row, chunk = tl.program_id(0), tl.program_id(1)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    at = logits + row.to(tl.int64) * size + token
    value = tl.load(at, mask=token < size, other=float("-inf"))
    tl.store(top + row * tl.num_programs(1) + chunk, tl.max(value, 0))


@triton.jit
def _weigh(
    logits, top, temperature, weight, size, chunks, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):
    row = tl.program_id(0)
    part = tl.arange(0, CHUNKS)
    best = tl.load(top + row * chunks + part, mask=part < chunks, other=float("-inf"))
    best = tl.max(best, 0).to(tl.float64)
    heat = tl.load(temperature + row)
    token = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    start = row.to(tl.int64) * size
    value = tl.load(logits + start + token, mask=token < size, other=float("-inf")).to(tl.float64)
    safe = tl.where(heat > 0, heat, 1.0)
    warm = tl.exp((value - best) / safe)
    cold = tl.where(value == best, 1.0, 0.0)
    tl.store(weight + start + token, tl.where(heat > 0, warm, cold), mask=token < size)


@triton.jit
def resolved(
    sums, wanted, low, target, row, chunks, shift, FIRST: tl.constexpr,
    MODE: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Lower bound and target of a row after the launch whose candidates lie 2 ** shift apart."""
    part, digit = tl.arange(0, CHUNKS), tl.arange(0, _CANDIDATES)
    at = sums + (row * chunks + part)[:, None] * _CANDIDATES + digit[None, :]
    mass = tl.sum(tl.load(at, mask=(part < chunks)[:, None], other=0.0), 0)
    if FIRST:
        goal = tl.load(wanted + row)
        if MODE != 0:
            # A uniform number next to 1 may round to the whole mass, which nothing exceeds.
            whole = tl.max(mass, 0)
            below = (whole.to(tl.int64, bitcast=True) - 1).to(tl.float64, bitcast=True)
            goal = goal * whole
            if MODE == 2:
                goal = tl.minimum(goal, below)
        bound = tl.zeros([], tl.int64)
    else:
        goal = tl.load(target + row)
        bound = tl.load(low + row)
    # The draw takes the first token whose cumulated mass exceeds the target, a cut the first that
    # reaches it.
    enough = (mass > goal) if MODE == 2 else (mass >= goal)
    chosen = tl.max(tl.where(enough, digit, 0), 0)
    return bound + (chosen.to(tl.int64) << shift), goal


@triton.jit
def _narrow(
    logits, weight, sums, wanted, low, target, new_sums, new_low, new_target, size, chunks,
    shift, last_shift, FIRST: tl.constexpr, SECOND: tl.constexpr,
    MODE: tl.constexpr, CHUNK: tl.constexpr, STEP: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Resolve the launch before (unless FIRST), then sum the mass above 32 candidates."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    bound = tl.zeros([], tl.int64)
    if not FIRST:
        bound, goal = resolved(
            sums, wanted, low, target, row, chunks, last_shift, SECOND, MODE, CHUNKS
        )
        if chunk == 0:
            tl.store(new_low + row, bound)
            tl.store(new_target + row, goal)
    digit = tl.arange(0, _CANDIDATES)
    candidate = bound + (digit.to(tl.int64) << shift)
    total = tl.zeros([STEP, _CANDIDATES], tl.float64)
    for start in tl.range(0, CHUNK, STEP):
        token = chunk * CHUNK + start + tl.arange(0, STEP)
        at = row.to(tl.int64) * size + token
        key = ordered(tl.load(logits + at, mask=token < size, other=float("-inf")))
        mass = tl.load(weight + at, mask=token < size, other=0.0)
        if MODE == 0:
            mass = tl.where(token < size, 1.0, 0.0).to(tl.float64)
        above = key[:, None] >= candidate[None, :]
        total += tl.where(above, mass[:, None], 0.0)
    at = new_sums + (row * chunks + chunk) * _CANDIDATES + digit
    tl.store(at, tl.sum(total, 0))


@triton.jit
def _ties(
    logits, weight, sums, wanted, low, target, key_out, goal_out, above, tied, each, size, chunks,
    MODE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """The key itself, and of each chunk: mass above it, number of tokens at it, mass of one."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    bound, goal = resolved(sums, wanted, low, target, row, chunks, 0, False, MODE, CHUNKS)
    if chunk == 0:
        tl.store(key_out + row, bound)
        tl.store(goal_out + row, goal)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    at = row.to(tl.int64) * size + token
    key = ordered(tl.load(logits + at, mask=token < size, other=float("-inf")))
    mass = tl.load(weight + at, mask=token < size, other=0.0)
    equal = (key == bound) & (mass > 0.0)
    if MODE == 0:
        equal = (key == bound) & (token < size)
        mass = tl.where(token < size, 1.0, 0.0).to(tl.float64)
    place = row * chunks + chunk
    tl.store(above + place, tl.sum(tl.where(key > bound, mass, 0.0), 0))
    tl.store(tied + place, tl.sum(equal.to(tl.int32), 0))
    tl.store(each + place, tl.max(tl.where(equal, mass, 0.0), 0))


@triton.jit
def _cut(
    logits, weight, key_in, goal_in, above, tied, each, tokens, size, chunks,
    MODE: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Take away the mass behind the last token that belongs, or store the token that is drawn."""
    row, chunk = tl.program_id(0), tl.program_id(1)
    bound, goal = tl.load(key_in + row), tl.load(goal_in + row)
    part = tl.arange(0, CHUNKS)
    real = part < chunks
    larger = tl.sum(tl.load(above + row * chunks + part, mask=real, other=0.0), 0)
    counts = tl.load(tied + row * chunks + part, mask=real, other=0)
    one = tl.max(tl.load(each + row * chunks + part, mask=real, other=0.0), 0)
    missing = (goal - larger) / tl.where(one > 0.0, one, 1.0)
    if MODE == 2:
        needed = tl.floor(missing).to(tl.int32) + 1
    else:
        needed = tl.ceil(missing).to(tl.int32)
    needed = tl.maximum(1, tl.minimum(needed, tl.sum(counts, 0)))
    before = tl.sum(tl.where(part < chunk, counts, 0), 0)
    token = chunk * CHUNK + tl.arange(0, CHUNK)
    at = row.to(tl.int64) * size + token
    key = ordered(tl.load(logits + at, mask=token < size, other=float("-inf")))
    mass = tl.load(weight + at, mask=token < size, other=0.0)
    equal = (key == bound) & (mass > 0.0)
    if MODE == 0:
        equal = (key == bound) & (token < size)
    rank = before + tl.cumsum(equal.to(tl.int32), 0)
    if MODE == 2:
        tl.store(tokens + row + token * 0, token, mask=equal & (rank == needed))
    else:
        kept = (key > bound) | (equal & (rank <= needed))
        tl.store(weight + at, tl.where(kept, mass, 0.0), mask=token < size)


class _Search:
    """Buffers and launches of one batch of rows."""

    def __init__(self, logits: Tensor, weight: Tensor) -> None:
        self.logits, self.weight = logits, weight
        self.rows, self.size = logits.shape
        # The vocabulary fixes it, never the batch: it takes part in the order of summation.
        self.chunk = min(_CHUNK, max(_STEP, triton.next_power_of_2(self.size)))
        self.chunks = triton.cdiv(self.size, self.chunk)
        self.width = triton.next_power_of_2(self.chunks)
        self.tokens = self.empty(self.rows, kind=torch.int32)

    def empty(self, *shape: int, kind: torch.dtype = torch.float64) -> Tensor:
        return torch.empty(shape, dtype=kind, device=self.logits.device)

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows, self.chunks

    def run(self, wanted_R: Tensor, mode: int) -> None:
        sums: Tensor | None = None
        low: Tensor | None = None
        target: Tensor | None = None
        for level, shift in enumerate(_SHIFTS):
            new = self.empty(self.rows, self.chunks, _CANDIDATES.value)
            new_low = self.empty(self.rows, kind=torch.int64)
            new_target = self.empty(self.rows)
            launch(
                _narrow, self.grid, self.logits, self.weight, sums, wanted_R, low, target,
                new, new_low, new_target, self.size, self.chunks,
                shift, _SHIFTS[max(level - 1, 0)], FIRST=level == 0,
                SECOND=level == 1, MODE=mode, CHUNK=self.chunk, STEP=_STEP, CHUNKS=self.width,
                num_warps=4, num_stages=2,
            )  # fmt: skip
            sums, low, target = new, new_low, new_target
        key, goal = self.empty(self.rows, kind=torch.int64), self.empty(self.rows)
        above, each = self.empty(self.rows, self.chunks), self.empty(self.rows, self.chunks)
        tied = self.empty(self.rows, self.chunks, kind=torch.int32)
        launch(
            _ties, self.grid, self.logits, self.weight, sums, wanted_R, low, target,
            key, goal, above, tied, each, self.size, self.chunks,
            MODE=mode, CHUNK=self.chunk, CHUNKS=self.width, num_warps=4,
        )  # fmt: skip
        launch(
            _cut, self.grid, self.logits, self.weight, key, goal, above, tied, each,
            self.tokens, self.size, self.chunks,
            MODE=mode, CHUNK=self.chunk, CHUNKS=self.width, num_warps=4,
        )  # fmt: skip


def sample(
    logits_RV: Tensor,
    uniform_R: Tensor,
    temperature_R: Tensor,
    *,
    top_k_R: Tensor | None = None,
    top_p_R: Tensor | None = None,
) -> Tensor:
    logits = logits_RV.contiguous()
    weight = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
    search = _Search(logits, weight)
    top = search.empty(search.rows, search.chunks, kind=torch.float32)
    launch(_chunk_max, search.grid, logits, top, search.size, CHUNK=search.chunk, num_warps=4)
    launch(
        _weigh, search.grid, logits, top, temperature_R, weight, search.size, search.chunks,
        CHUNK=search.chunk, CHUNKS=search.width, num_warps=4,
    )  # fmt: skip
    if top_k_R is not None:
        most = torch.where(top_k_R > 0, top_k_R, search.size).clamp_max(search.size)
        search.run(most.double(), _COUNT)
    if top_p_R is not None:
        search.run(top_p_R, _MASS)
    search.run(torch.where(temperature_R > 0, uniform_R, 0.0), _DRAW)
    return search.tokens


def _case() -> None:
    rows = 64
    numbers = meta(rows, dtype=torch.float64)
    sample(
        meta(rows, 129280, dtype=torch.float32), numbers, numbers,
        top_k_R=meta(rows, dtype=torch.int32), top_p_R=numbers,
    )  # fmt: skip


CASES = (Case("sample, 129280", _case),)
