"""What is minimized: the answer, the evidence, and the indexer (ledger-trial-2.md section 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.batches import DOT, FIRST, LATER, REFUSAL, Task
from training.config import Stage
from training.network import Batch, Evidence, Network

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
    citation: float


def gold_mass(evidence: Evidence, gold_R2: Tensor) -> Tensor:
    """[R] share of the last layer's attention (mean over heads) on the two gold entries."""
    is_gold = (evidence.chosen_RC[:, :, None] == gold_R2[:, None]).any(-1)
    return (evidence.mass_HRC.mean(0) * is_gold).sum(-1)


def _index_losses(evidence: Evidence, gold_R2: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy of the index on gold, and KL(attention -> index) on the chosen entries."""
    has = gold_R2[:, 0] >= 0
    score = evidence.index_RE[has]
    ranked = score.logsumexp(-1) - score.gather(1, gold_R2[has]).logsumexp(-1)
    # A batch may ask for absent names only: nothing is gold then, and nothing is to be learnt.
    index_ce = ranked.sum() / max(1, len(ranked))
    p = (evidence.mass_HRC.detach().sum(0) * evidence.valid_RC).clamp_min(0)
    p = p / (p.sum(-1, keepdim=True) + TINY)
    chosen = evidence.index_RE.gather(1, evidence.chosen_RC)
    log_q = chosen.masked_fill(~evidence.valid_RC, -1e4).log_softmax(-1)
    kl = (p * ((p + TINY).log() - log_q)).sum(-1).mean()
    return index_ce, kl


def sequence_balance(network: Network, batch: Batch) -> Tensor:
    """Sum over routers and mean over sequences of sum_e f_e P_e (V3's sequence-wise loss): f_e the
    share of tokens of expert e times E / k, P_e its mean normalized score. 1 a router at balance.
    """
    b, s = batch.tokens_BS.shape
    total = torch.zeros(())
    for moe in network.routers():
        if moe.gate.hashed or moe.ids is None or moe.scores is None:
            continue
        count, k = moe.scores.shape[1], moe.ids.shape[1]
        whole = len(moe.ids) == b * s
        owner = torch.arange(b).repeat_interleave(s) if whole else batch.rows_R // s
        tokens = torch.bincount(owner, minlength=b).clamp_min(1)[:, None]
        chosen = F.one_hot(moe.ids, count).sum(1).float()
        share = moe.scores / moe.scores.sum(-1, keepdim=True)
        f = torch.zeros(b, count).index_add(0, owner, chosen) * count / (k * tokens)
        p = torch.zeros(b, count).index_add(0, owner, share) / tokens
        total = total + (f * p).sum(-1).mean()
    return total


def right_questions(logits_RV: Tensor, task: Task, kinds: tuple[int, ...]) -> tuple[int, int]:
    """(questions answered entirely right, questions) among those with rows of `kinds`."""
    hit = logits_RV.argmax(-1) == task.targets_R
    of_kind = torch.isin(task.kinds_R, torch.tensor(kinds))
    asked = task.question_R[of_kind]
    wrong = torch.unique(asked[~hit[of_kind]])
    count = len(torch.unique(asked))
    return count - len(wrong), count


def _mean(values_R: Tensor) -> float:
    """Mean (share of true rows); 0 without rows."""
    return float(values_R.float().mean()) if len(values_R) else 0.0


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
    attention = (w_gold * -(gold + TINY).log()).sum() / w_gold.sum().clamp_min(TINY)
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
        heaviest = evidence.mass_HRC.mean(0)[first].argmax(-1, keepdim=True)
        cited = evidence.chosen_RC[first].gather(1, heaviest) == task.gold_R2[first]
    return Outcome(
        loss, float(cross_entropy.detach()), right, answerable, refused, unanswerable,
        _mean(gold.detach()), _mean(spurious.detach()), _mean(recalled), _mean(cited.any(-1)),
    )  # fmt: skip
