"""Speculative decoding: how much to draft, and what of a draft stands.

A draft token is accepted if and only if it equals the sample that the target draws for that (seed,
position) (architecture.md, "Numerics classes"). So the tokens, their logits and their evidence are
those of the plain loop, greedy and sampled; a draft changes only how many steps they take.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from model.engine import DraftCost
from penstock.blocks import STATE_ALIGN_TOKENS

PROBE_STEPS = 16
"""After so many steps without a draft one token is tried again: texts change."""
_WEIGHT = 0.125


@dataclass(frozen=True)
class Acceptance:
    """How often the target agreed of late: a decaying mean over draft tokens, newest first."""

    rate: float = 0.75
    plain_steps: int = 0
    """Steps without a draft since the last one."""

    def after(self, drafted: int, accepted: int) -> Acceptance:
        """The next step drafted `drafted` tokens, of which the first `accepted` stood."""
        if not drafted:
            return Acceptance(self.rate, self.plain_steps + 1)
        rate = self.rate
        # What follows the first miss was never judged.
        for place in range(min(accepted + 1, drafted)):
            rate += _WEIGHT * ((place < accepted) - rate)
        return Acceptance(rate, 0)

    def length(self, most: int, cost: DraftCost) -> int:
        """Draft tokens for the next step, 0 to `most`: the number with the most expected tokens for
        its cost. A single one after `PROBE_STEPS` plain steps.
        """
        if most < 1:
            return 0
        best, best_value = 0, 1.0
        tokens, chance = 1.0, 1.0
        for count in range(1, most + 1):
            chance *= self.rate
            tokens += chance
            value = tokens / (1.0 + cost.start + cost.token * count)
            if value > best_value:
                best, best_value = count, value
        return best or int(self.plain_steps >= PROBE_STEPS)


@dataclass
class DraftCounts:
    """Counters with the meaning of vLLM's `spec_decode` metrics."""

    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    accepted_at: Counter[int] = field(default_factory=Counter)
    """By place in the draft, from 0."""

    def add(self, drafted: int, accepted: int) -> None:
        if drafted:
            self.drafts += 1
            self.draft_tokens += drafted
            self.accepted_tokens += accepted
            self.accepted_at.update(range(accepted))

    def metrics(self) -> dict[str, float]:
        prefix = "spec_decode_num_"
        values = {
            f"{prefix}drafts_total": float(self.drafts),
            f"{prefix}draft_tokens_total": float(self.draft_tokens),
            f"{prefix}accepted_tokens_total": float(self.accepted_tokens),
        }
        for place in sorted(self.accepted_at):
            name = f"{prefix}accepted_tokens_per_pos_{place}_total"
            values[name] = float(self.accepted_at[place])
        return values


def stand(draw: Callable[[int], int], drafts: Sequence[int]) -> list[int]:
    """Tokens of one step: `draw(i)` draws from the logits after the pending token and `i` drafts.

    One more than the drafts that stand: the draw that differs is itself right.
    """
    tokens = [draw(0)]
    while len(tokens) <= len(drafts) and tokens[-1] == drafts[len(tokens) - 1]:
        tokens.append(draw(len(tokens)))
    return tokens


def states_between(start: int, end: int) -> range:
    """Positions in (start, end] whose state is one to keep."""
    first = (start // STATE_ALIGN_TOKENS + 1) * STATE_ALIGN_TOKENS
    return range(first, end + 1, STATE_ALIGN_TOKENS)
