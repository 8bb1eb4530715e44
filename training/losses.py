"""What is minimized: the answer, the evidence, and the indexer (ledger-trial-2.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.batches import DOT, FIRST, LATER, REFUSAL, Task
from training.config import Stage
from training.network import Evidence

TINY = 1e-6


@dataclass(frozen=True)
class Outcome:
    """The loss and counts of one batch; shares are taken over many batches by the caller."""

    loss: Tensor
    cross_entropy: float
    right: int
    answerable: int
    refused_right: int
    unanswerable: int
    gold_mass: float
    unknown_mass: float
    recall: float


def gold_mass(evidence: Evidence, gold_R2: Tensor) -> Tensor:
    """[R] share of the last layer's attention (mean over heads) on the two gold entries."""
    is_gold = (evidence.chosen_RC[:, :, None] == gold_R2[:, None]).any(-1)
    return (evidence.mass_HRC.mean(0) * is_gold).sum(-1)


def _index_losses(evidence: Evidence, gold_R2: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the index on gold, and KL(attention -> index) on the chosen entries."""
    has = gold_R2[:, 0] >= 0
    score = evidence.index_RE[has]
    index_ce = (score.logsumexp(-1) - score.gather(1, gold_R2[has]).logsumexp(-1)).mean()
    p = (evidence.mass_HRC.detach().sum(0) * evidence.valid_RC).clamp_min(0)
    p = p / (p.sum(-1, keepdim=True) + TINY)
    chosen = evidence.index_RE.gather(1, evidence.chosen_RC)
    log_q = chosen.masked_fill(~evidence.valid_RC, -1e4).log_softmax(-1)
    kl = (p * ((p + TINY).log() - log_q)).sum(-1).mean()
    return index_ce, kl


def right_questions(logits_RV: Tensor, task: Task, kinds: tuple[int, ...]) -> tuple[int, int]:
    """(questions answered entirely right, questions) among those with rows of `kinds`."""
    hit = logits_RV.argmax(-1) == task.targets_R
    of_kind = torch.isin(task.kinds_R, torch.tensor(kinds))
    asked = task.question_R[of_kind]
    wrong = torch.unique(asked[~hit[of_kind]])
    count = len(torch.unique(asked))
    return count - len(wrong), count


def compute(logits_RV: Tensor, evidence: Evidence, task: Task, stage: Stage) -> Outcome:
    """All losses of one batch, weighted by the stage."""
    weights = torch.ones(4)
    weights[FIRST], weights[REFUSAL] = stage.first_weight, stage.unknown_weight
    weights[LATER], weights[DOT] = stage.digit_weight, 0.3
    w_R = weights[task.kinds_R]
    ce = F.cross_entropy(logits_RV, task.targets_R, reduction="none")
    cross_entropy = (w_R * ce).sum() / w_R.sum()

    has = task.gold_R2[:, 0] >= 0
    gold = gold_mass(evidence, task.gold_R2)[has]
    w_gold = torch.where(task.kinds_R[has] == FIRST, stage.first_weight, stage.digit_weight)
    attention = (w_gold * -(gold + TINY).log()).sum() / w_gold.sum()
    refusal = task.kinds_R == REFUSAL
    spurious = evidence.mass_HRC.mean(0)[refusal].sum(-1)
    unknown = -(1 - spurious + TINY).log().mean() if len(spurious) else torch.zeros(())
    index_ce, kl = _index_losses(evidence, task.gold_R2)
    loss = (
        cross_entropy
        + stage.evidence * (attention + stage.unknown * unknown)
        + 0.2 * index_ce
        + 1.0 * kl
    )
    with torch.no_grad():
        right, answerable = right_questions(logits_RV, task, (FIRST, LATER))
        refused, unanswerable = right_questions(logits_RV, task, (REFUSAL,))
        first = task.kinds_R == FIRST
        top = evidence.index_RE[first].topk(min(16, evidence.index_RE.shape[1])).indices
        recalled = (top[:, :, None] == task.gold_R2[first][:, None]).any(-1).any(-1)
    return Outcome(
        loss, float(cross_entropy.detach()), right, answerable, refused, unanswerable,
        float(gold.detach().mean()), float(spurious.detach().mean()) if len(spurious) else 0.0,
        float(recalled.float().mean()),
    )  # fmt: skip
