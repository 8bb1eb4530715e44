"""Requests to simulate: read from a trace, or drawn by seed.

A trace has one request a line, as the Mooncake traces do (Qin et al., FAST 2025): `timestamp` in
ms, `input_length` and `output_length` in tokens, `hash_ids`, one id for each block of 512 tokens of
the prompt, equal ids for equal prefixes.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from kvstore.policy.replay import TRACE_BLOCK_TOKENS
from penstock.blocks import BLOCK_TOKENS
from penstock.errors import UsageError
from penstock.settings import Section, validated

GENERATED = "generated:"


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request. `blocks`: ids of the prompt's full blocks, each a function of all before it."""

    number: int
    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[bytes, ...]


@dataclass(frozen=True)
class Trace:
    """Requests by time of arrival. `block_tokens`: tokens that one id stands for."""

    name: str
    requests: tuple[SimRequest, ...]
    block_tokens: int = BLOCK_TOKENS

    @property
    def prompt_tokens(self) -> int:
        return sum(request.prompt_tokens for request in self.requests)

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last."""
        return self.requests[-1].arrival_s - self.requests[0].arrival_s if self.requests else 0.0

    @property
    def unique_blocks(self) -> int:
        return len({id_ for request in self.requests for id_ in request.blocks})

    def scaled(self, *, speed: float = 1.0, shrink: int = 1, limit: int | None = None) -> Trace:
        """The first `limit` requests, arriving `speed` times as fast, all lengths divided by
        `shrink` (a divisor of the block).
        """
        if self.block_tokens % shrink:
            raise UsageError(
                f"--shrink {shrink} does not divide the trace's blocks of {self.block_tokens} "
                "tokens; use a power of two"
            )
        kept = self.requests[:limit]
        first = kept[0].arrival_s if kept else 0.0
        requests = tuple(
            replace(
                request,
                arrival_s=(request.arrival_s - first) / speed,
                prompt_tokens=max(1, request.prompt_tokens // shrink),
                output_tokens=max(1, request.output_tokens // shrink),
            )
            for request in kept
        )
        return Trace(self.name, requests, self.block_tokens // shrink)

    def in_blocks(self) -> Trace:
        """With the store's own blocks. A smaller one's id stands for all that is before it, so the
        last one of a group names the group; a larger one's parts are named after it.
        """
        requests: tuple[SimRequest, ...] = self.requests
        if self.block_tokens < BLOCK_TOKENS and BLOCK_TOKENS % self.block_tokens == 0:
            step = BLOCK_TOKENS // self.block_tokens
            requests = tuple(replace(r, blocks=r.blocks[step - 1 :: step]) for r in requests)
        elif self.block_tokens % BLOCK_TOKENS == 0:
            parts = [bytes([part]) for part in range(self.block_tokens // BLOCK_TOKENS)]
            requests = tuple(
                replace(r, blocks=tuple(part + id_[1:] for id_ in r.blocks for part in parts))
                for r in requests
            )
        else:
            raise UsageError(
                f"blocks of {self.block_tokens} tokens cannot be made blocks of {BLOCK_TOKENS}"
            )
        return Trace(self.name, requests)


class Drawn(Section):
    """A trace drawn by seed: conversations of several turns that come as a Poisson process."""

    requests: int = Field(default=1000, ge=1, le=10_000_000)
    rate: float = Field(default=10.0, gt=0)
    """Requests a second, in the mean."""
    prompt: int = Field(default=4096, ge=1)
    """Tokens of a first turn, in the mean; lengths are log-normal."""
    answer: int = Field(default=256, ge=1)
    """Tokens of an answer, in the mean."""
    spread: float = Field(default=0.8, ge=0, le=3)
    """Sigma of the logarithm of both; 0: all alike."""
    turns: int = Field(default=1, ge=1)
    """Turns of a conversation; each one's prompt begins with all of the one before."""
    pause: float = Field(default=30.0, ge=0)
    """Seconds between two turns, in the mean."""
    period: float = Field(default=0.0, ge=0)
    """Seconds of a day: the rate swings between 0.2 and 1.8 of its mean; 0: constant."""
    burst: float = Field(default=1.0, ge=1)
    """The rate is so many times higher in the middle tenth of the trace."""


def open_trace(source: str, *, seed: int) -> Trace:
    """A trace file, or `generated:requests=500,rate=20,...`. Raises UsageError for neither."""
    if not source.startswith(GENERATED):
        return read_trace(Path(source))
    given = source.removeprefix(GENERATED)
    pairs = [part.partition("=") for part in given.split(",") if part.strip()]
    values = {name.strip(): value.strip() for name, _, value in pairs}
    wanted = validated(Drawn, values, dict.fromkeys(values, "the trace"))
    return draw(wanted, seed=seed, name=source)


def read_trace(path: Path) -> Trace:
    """Raises UsageError with the line that cannot be read."""
    try:
        with path.open(encoding="utf-8") as lines:
            found = list(_parse(lines, path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UsageError(f"the trace {path} cannot be read: {reason}") from error
    if not found:
        raise UsageError(f"the trace {path} holds no request")
    found.sort(key=lambda request: request.arrival_s)
    return Trace(path.name, _numbered(found), TRACE_BLOCK_TOKENS)


def _parse(lines: Iterator[str], path: Path) -> Iterator[SimRequest]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row: Any = json.loads(line)
            arrival_s = float(row["timestamp"]) / 1e3
            prompt, output = int(row["input_length"]), int(row["output_length"])
            ids = [int(id_).to_bytes(32, "big") for id_ in row["hash_ids"]]
            if prompt < 1 or output < 0 or not math.isfinite(arrival_s):
                raise ValueError("lengths or time that cannot be")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise UsageError(
                f"line {number} of {path} is no request of a trace: it needs timestamp (ms), "
                f"input_length, output_length and hash_ids, all numbers ({type(error).__name__})"
            ) from error
        blocks = tuple(ids[: prompt // TRACE_BLOCK_TOKENS])
        yield SimRequest(number, arrival_s, prompt, max(1, output), blocks)


def draw(wanted: Drawn, *, seed: int, name: str = "generated") -> Trace:
    """The same trace for the same values and seed, anywhere."""
    dice = random.Random(seed)
    starts = -(-wanted.requests // wanted.turns)
    span_s = wanted.requests / wanted.rate
    found: list[SimRequest] = []
    clock_s = 0.0
    for conversation in range(starts):
        clock_s += dice.expovariate(_rate_at(wanted, clock_s, span_s) / wanted.turns)
        at_s, context = clock_s, 0
        for _ in range(min(wanted.turns, wanted.requests - len(found))):
            context += _length(
                dice, wanted.prompt if not context else wanted.prompt // 4 + 1, wanted
            )
            answer = _length(dice, wanted.answer, wanted)
            blocks = tuple(
                _block_id(seed, conversation, index) for index in range(context // BLOCK_TOKENS)
            )
            found.append(SimRequest(0, at_s, context, answer, blocks))
            context += answer
            at_s += dice.expovariate(1 / wanted.pause) if wanted.pause else 0.0
    found.sort(key=lambda request: request.arrival_s)
    return Trace(name, _numbered(found), BLOCK_TOKENS)


def _rate_at(wanted: Drawn, at_s: float, span_s: float) -> float:
    rate = wanted.rate
    if wanted.period:
        rate *= 1 - 0.8 * math.cos(2 * math.pi * at_s / wanted.period)
    if 0.45 * span_s <= at_s <= 0.55 * span_s:
        rate *= wanted.burst
    return rate


def _length(dice: random.Random, mean: int, wanted: Drawn) -> int:
    """Log-normal with this mean, at most 64 times of it."""
    sigma = wanted.spread
    drawn = math.exp(dice.gauss(math.log(mean) - sigma * sigma / 2, sigma)) if sigma else mean
    return max(1, min(round(drawn), 64 * mean))


def _block_id(seed: int, conversation: int, index: int) -> bytes:
    return hashlib.sha256(f"{seed}/{conversation}/{index}".encode()).digest()


def _numbered(requests: Sequence[SimRequest]) -> tuple[SimRequest, ...]:
    first = requests[0].arrival_s
    return tuple(
        replace(request, number=number, arrival_s=request.arrival_s - first)
        for number, request in enumerate(requests)
    )
