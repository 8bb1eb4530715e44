"""The training loop: stages, distractor bank, optimizers, router bias, checkpoints."""

from __future__ import annotations

import json
import pathlib
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from training import batches, losses
from training.config import Stage, TrainingConfig
from training.muon import Muon
from training.network import Distractors, Evidence, MoE, Network
from training.rounding import PLAIN, SERVED

HYPER_RATE = 0.25  # hyper-connection matrices see strongly correlated inputs: smaller Muon steps


def split_parameters(
    network: Network,
) -> tuple[list[tuple[Tensor, tuple[int, int, int], float]], list[nn.Parameter]]:
    """(matrices for Muon, everything else for AdamW), as in section 2.4 of the V4 report."""
    matrices: list[tuple[Tensor, tuple[int, int, int], float]] = []
    rest: list[nn.Parameter] = []
    for name, p in network.named_parameters():
        if p.ndim < 2 or name.endswith("ape") or name in ("embed.weight", "head.weight"):
            rest.append(p)
        elif "wo_a" in name:
            groups = network.cfg.o_groups
            matrices.append((p, (groups, p.shape[0] // groups, p.shape[1]), 1.0))
        else:
            rate = HYPER_RATE if "hc_" in name else 1.0
            matrices.append((p, (1, p.shape[0], p.shape[1]), rate))
    return matrices, rest


class Bank:
    """Detached entries of earlier steps, newest last, offered as distractors."""

    def __init__(self, network: Network) -> None:
        k, i = network.cfg.head_dim, network.cfg.index_head_dim
        self.csa, self.keys = torch.zeros(0, k), torch.zeros(0, i)
        self.hca, self.hca_position = torch.zeros(0, k), torch.zeros(0, dtype=torch.long)

    def add(self, task: batches.Task, evidence: Evidence, limit: int) -> None:
        """Keep the document entries of this step, at most `limit` CSA and limit/32 HCA entries."""
        csa, keys, batch = evidence.csa_BEK.detach(), evidence.keys_BEI.detach(), task.batch
        end = batch.document_end_B[:, None]
        inside = (torch.arange(csa.shape[1]) + 1)[None] * 4 <= end
        self.csa = torch.cat([self.csa, csa[inside]])[-limit:] if limit else self.csa[:0]
        self.keys = torch.cat([self.keys, keys[inside]])[-limit:] if limit else self.keys[:0]
        if evidence.hca_BEK is not None and limit:
            hca = evidence.hca_BEK.detach()
            inside = (torch.arange(hca.shape[1]) + 1)[None] * 128 <= end
            starts = batch.positions_BS[:, : hca.shape[1] * 128 : 128]
            keep = limit // 32
            self.hca = torch.cat([self.hca, hca[inside]])[-keep:]
            self.hca_position = torch.cat([self.hca_position, starts[inside]])[-keep:]

    def offer(self) -> Distractors:
        """The present content."""
        return Distractors(self.csa, self.keys, self.hca, self.hca_position)


def rate_at(pair: tuple[float, float], stage: Stage, step: int) -> float:
    """Learning rate of a step: warm-up, hold, then linear to the stage's end."""
    start, end = pair
    if step < stage.warmup_steps:
        return start * (step + 1) / stage.warmup_steps
    done = (step / stage.steps - stage.hold) / max(1e-9, 1 - stage.hold)
    return start + (end - start) * min(1.0, max(0.0, done))


@torch.no_grad()
def balance_routers(network: Network, speed: float) -> None:
    """Auxiliary-loss-free balancing: the selection bias follows the sign of the load error."""
    for moe in network.modules():
        if isinstance(moe, MoE) and not moe.gate.hashed and moe.load is not None:
            load = moe.load.float()
            moe.gate.get_buffer("bias").add_(speed * torch.sign(load.mean() - load))


@dataclass
class Meter:
    """Sums of outcomes between two log lines."""

    outcomes: list[losses.Outcome]

    def line(self) -> dict[str, float]:
        """Means and shares, ready for JSON."""
        n = len(self.outcomes)
        asked = sum(o.answerable for o in self.outcomes)
        absent = sum(o.unanswerable for o in self.outcomes)
        out = {
            "loss": sum(float(o.loss.detach()) for o in self.outcomes) / n,
            "em": sum(o.right for o in self.outcomes) / max(1, asked),
            "unknown": sum(o.refused_right for o in self.outcomes) / max(1, absent),
            "gold_mass": sum(o.gold_mass for o in self.outcomes) / n,
            "unknown_mass": sum(o.unknown_mass for o in self.outcomes) / n,
            "recall16": sum(o.recall for o in self.outcomes) / n,
        }
        self.outcomes.clear()
        return {key: round(value, 4) for key, value in out.items()}


def train(
    cfg: TrainingConfig,
    network: Network,
    tok: Tokenizer,
    out: pathlib.Path,
    *,
    start_stage: int = 0,
    on_stage_end: Callable[[Stage], None] = lambda stage: None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run all stages; returns the curve and writes it (and checkpoints) under `out`."""
    rng = random.Random(f"training {cfg.seed} {start_stage}")
    matrices, rest = split_parameters(network)
    muon = Muon(matrices)
    adamw = torch.optim.AdamW(rest, lr=1e-3, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    bank, meter = Bank(network), Meter([])
    curve: list[dict[str, Any]] = []
    began = saved = time.monotonic()
    tokens_seen = 0
    for stage in cfg.stages[start_stage:]:
        for step in range(stage.steps):
            shape = stage.shapes[step % len(stage.shapes)]
            task = batches.draw(
                rng, tok, shape, full=stage.full_question, unanswerable=cfg.unanswerable,
                gapless=rng.random() < stage.gapless,
                repeats=stage.repeats,
                near=stage.near,
            )  # fmt: skip
            logits, evidence = network(
                task.batch, distractors=bank.offer(), share_entries=True,
                dense=step < stage.dense_steps, sinkhorn_iters=cfg.sinkhorn_iters,
                cache=SERVED if rng.random() < stage.quantized else PLAIN,
            )  # fmt: skip
            outcome = losses.compute(logits, evidence, task, stage)
            if not torch.isfinite(outcome.loss):
                raise FloatingPointError(
                    f"the loss of stage {stage.name} step {step} is not finite"
                )
            outcome.loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(rest, 1.0)
            lr = rate_at(stage.lr_muon, stage, step)
            for group in adamw.param_groups:
                group["lr"] = rate_at(stage.lr_adamw, stage, step)
            muon.step(lr)
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            balance_routers(network, 0.003 * lr / stage.lr_muon[0])
            bank.add(task, evidence, stage.bank_entries)
            meter.outcomes.append(outcome)
            tokens_seen += shape.tokens * shape.rows
            now = time.monotonic()
            if (step + 1) % cfg.log_every == 0 or step + 1 == stage.steps:
                line = {"stage": stage.name, "step": step + 1, "seconds": round(now - began, 1),
                        "tokens": tokens_seen, **meter.line()}  # fmt: skip
                curve.append(line)
                say(json.dumps(line))
            if now - saved > cfg.checkpoint_every_s:
                torch.save(network.state_dict(), out / "checkpoint.pt")
                saved = now
        torch.save(network.state_dict(), out / f"stage-{stage.name}.pt")
        (out / "curve.json").write_text(json.dumps(curve, indent=0) + "\n", "ascii")
        on_stage_end(stage)
    return curve
