"""What evidence costs a running answer: the same answer with and without it, turn by turn.

Through HTTP, so what is compared is everything that a client would notice: naming the entries, the
events, their JSON. The mass on the entries themselves is computed for every answer, because a state
in the store carries it: that share is in both sides (docs/evidence.md has it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.client import Answer, Client
from bench.procs import cpu_by, part_of
from bench.prompts import prompt
from bench.report import Row
from bench.stats import finite, median, ratio

TOKENS = 256
_PARTS = ("decode", "front")


@dataclass(frozen=True)
class Turn:
    """One answer with evidence or without."""

    decode_s: float
    """For each token behind the first event."""
    cpu_s: float
    """Of decode worker and front, for each token."""


async def measure(client: Client, *, chars: int, pairs: int, seed: int) -> Row:
    """One row. The cluster's processes must be children of this one."""
    text = prompt(chars, seed=seed)
    told = Answer(0.0)
    sides: dict[bool, list[Turn]] = {False: [], True: []}
    # The first of each side pays for the prompt and for code paths that are not warm.
    for number in range(pairs + 1):
        # Whoever comes first in a pair must not always be the same.
        for wanted in (False, True) if number % 2 else (True, False):
            answer, turn = await _turn(client, text, wanted)
            told = answer if wanted else told
            if number:
                sides[wanted].append(turn)
    return row(told, sides[False], sides[True])


async def _turn(client: Client, text: str, wanted: bool) -> tuple[Answer, Turn]:
    before = _cpu_s()
    more: dict[str, Any] = {"evidence": True} if wanted else {}
    answer = await client.chat(text, max_tokens=TOKENS, ignore_eos=True, **more)
    cpu_s = _cpu_s() - before
    behind = max(answer.completion_tokens - 1, 1)
    decode_s = (answer.ended_s - answer.event_times_s[0]) / behind
    return answer, Turn(decode_s, cpu_s / answer.completion_tokens)


def _cpu_s() -> float:
    spent = cpu_by(part_of)
    return sum(spent.get(part, 0.0) for part in _PARTS)


def row(answer: Answer, off: Sequence[Turn], on: Sequence[Turn]) -> Row:
    """Medians of both sides and of the pairs' ratios. Pure."""
    pairs = list(zip(off, on, strict=True))
    cpu = [turn.cpu_s for turn in off], [turn.cpu_s for turn in on]
    return {
        "prompt_tokens": answer.prompt_tokens,
        "n_pairs": len(pairs),
        "decoded_tokens": answer.completion_tokens,
        "spans_per_token": finite(answer.evidence_spans / answer.completion_tokens),
        "decode_ms_per_token": finite(median([turn.decode_s for turn in off]) * 1e3),
        "decode_ms_per_token_with_evidence": finite(median([turn.decode_s for turn in on]) * 1e3),
        "ratio": finite(median([b.decode_s / a.decode_s for a, b in pairs])),
        # The clock of the processes has ticks of 10 ms: sums, not single answers.
        "cpu_ms_per_1000_tokens": finite(sum(cpu[0]) / len(pairs) * 1e6),
        "cpu_ms_per_1000_tokens_with_evidence": finite(sum(cpu[1]) / len(pairs) * 1e6),
        "cpu_ratio": ratio(sum(cpu[1]), sum(cpu[0])),
    }
