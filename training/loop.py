"""The training loop: stages, distractor bank, optimizers, router bias, checkpoints.

A run is a function of its configuration: after `--resume` from any checkpoint every later loss is
the same to the last bit as without the interruption (same machine, same number of threads).
"""

from __future__ import annotations

import json
import math
import pathlib
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from training import batches, checkpoint, losses
from training.anticipate import Anticipation, Spikes
from training.config import Stage, TrainingConfig
from training.curves import Sink
from training.errors import TrainingError
from training.meter import Meter
from training.muon import Muon
from training.network import Distractors, Evidence, Network
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
    for moe in network.routers():
        if not moe.gate.hashed and moe.load is not None:
            load = moe.load.float()
            moe.gate.get_buffer("bias").add_(speed * torch.sign(load.mean() - load))


class Run:
    """One training run and all of its state."""

    def __init__(
        self, cfg: TrainingConfig, network: Network, tok: Tokenizer, out: pathlib.Path, *,
        start_stage: int = 0,
    ) -> None:  # fmt: skip
        self.cfg, self.network, self.tok, self.out = cfg, network, tok, out
        self.rng = random.Random(f"training {cfg.seed} {start_stage}")
        matrices, rest = split_parameters(network)
        if cfg.optimizer == "adamw":
            rest, matrices = list(network.parameters()), []
        self.rest = rest
        self.muon = Muon(matrices, weight_decay=cfg.weight_decay)
        self.adamw = torch.optim.AdamW(
            rest, lr=1e-3, betas=(0.9, 0.95), eps=1e-10, weight_decay=cfg.weight_decay
        )
        settings = cfg.stabilisers
        self.anticipation, self.spikes = Anticipation(settings, network), Spikes(settings.spike)
        self._good: checkpoint.Checkpoint | None = None
        self.rollbacks = 0
        if not settings.sinks:
            for name, p in network.named_parameters():
                if name.endswith("attn_sink"):
                    p.data.fill_(-1e9)
        self.bank, self.meter = Bank(network), Meter()
        self.stage, self.step = start_stage, 0
        self.total, self.tokens_seen, self.seconds = 0, 0, 0.0
        self.curve: list[dict[str, Any]] = []

    def update(self, stage: Stage) -> losses.Outcome | None:
        """One step; None if it was a spike and the run was rolled back.

        Raises `TrainingError`, before anything changes, if the loss or gradient is not finite.
        """
        rng, shape = self.rng, stage.shapes[self.step % len(stage.shapes)]
        task = batches.draw(
            rng, self.tok, shape, full=stage.full_question, unanswerable=self.cfg.unanswerable,
            gapless=rng.random() < stage.gapless,
            repeats=stage.repeats,
            near=stage.near,
        )  # fmt: skip
        settings = self.cfg.stabilisers
        cache = SERVED if rng.random() < stage.quantized else PLAIN

        def forward(network: Network) -> tuple[Tensor, Evidence]:
            logits, evidence = network(
                task.batch, distractors=self.bank.offer(), share_entries=True, cache=cache,
                dense=self.step < stage.dense_steps,
                sinkhorn_iters=self.cfg.sinkhorn_iters if settings.sinkhorn else 0,
            )  # fmt: skip
            return logits, evidence

        self.anticipation.route(self.total, forward)
        logits, evidence = forward(self.network)
        outcome = losses.compute(logits, evidence, task, stage)
        if settings.sequence_balance:
            balance = losses.sequence_balance(self.network, task.batch)
            outcome = replace(outcome, loss=outcome.loss + settings.sequence_balance * balance)
        loss = float(outcome.loss.detach())
        if not math.isfinite(loss):
            raise self._stopped(stage, f"the loss is {loss}")
        if settings.anticipatory == "spike" and self.spikes.seen(loss) and self._good is not None:
            self._roll_back()
            return None
        outcome.loss.backward()  # type: ignore[no-untyped-call]
        norm = float(nn.utils.get_total_norm(
            [p.grad for p in self.network.parameters() if p.grad is not None]
        ))  # fmt: skip
        if not math.isfinite(norm):
            raise self._stopped(stage, f"the gradient's norm is {norm}")
        nn.utils.clip_grad_norm_(self.rest, 1.0)
        lr = rate_at(stage.lr_muon, stage, self.step)
        for group in self.adamw.param_groups:
            group["lr"] = rate_at(stage.lr_adamw, stage, self.step)
        self.muon.step(lr)
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        if not settings.sinks:
            for name, p in self.network.named_parameters():
                if name.endswith("attn_sink"):
                    p.data.fill_(-1e9)
        balance_routers(self.network, settings.balance_speed * lr / stage.lr_muon[0])
        self.bank.add(task, evidence, stage.bank_entries)
        self.meter.add(outcome)
        self.tokens_seen += shape.tokens * shape.rows
        self.step += 1
        self.total += 1
        if settings.anticipatory == "spike" and self.total % settings.rollback_every == 0:
            self._good = self.state()
        return outcome

    def _roll_back(self) -> None:
        """To the last state in memory, with anticipatory routing on and other batches than the
        ones that led here.
        """
        assert self._good is not None
        steps, rollbacks = self.total, self.rollbacks + 1
        self.restore(self._good)
        self.rollbacks = rollbacks
        self.rng = random.Random(f"training {self.cfg.seed} {steps} rollback {rollbacks}")
        self.anticipation.switch_on(steps)
        # One spike, one rollback: the next is only answered from a state behind this one.
        self._good = None

    def _stopped(self, stage: Stage, why: str) -> TrainingError:
        left = checkpoint.known(self.out)
        kept = f"the last good checkpoint is {left[-1].name}" if left else "no checkpoint was due"
        return TrainingError(
            f"{why} in stage {stage.name}, step {self.step + 1} ({self.total + 1} of the run); "
            f"training stopped and {kept}; lower the learning rate or look at that batch"
        )

    def save(self) -> pathlib.Path:
        """A checkpoint of now."""
        return checkpoint.save(self.out, self.state())

    def state(self) -> checkpoint.Checkpoint:
        """All of now, as copies."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"muon.{n}": value for n, value in self.muon.state_dict().items()}
        for number, state in self.adamw.state_dict()["state"].items():
            tensors |= {f"adamw.{number}.{key}": value for key, value in state.items()}
        tensors |= {f"bank.{name}": value for name, value in vars(self.bank).items()}
        for age, snapshot in enumerate(self.anticipation.snapshots):
            tensors |= {f"lag.{age}.{name}": value for name, value in snapshot.items()}
        tensors["torch_rng"] = torch.get_rng_state()
        version, internal, gauss = self.rng.getstate()
        facts = {
            "stage": self.stage, "step": self.step, "total": self.total,
            "tokens_seen": self.tokens_seen, "seconds": self.seconds, "curve": list(self.curve),
            "meter": self.meter.state(), "rng": [version, list(internal), gauss],
            "until": self.anticipation.until, "recent": list(self.spikes.recent),
            "rollbacks": self.rollbacks,
        }  # fmt: skip
        copies = {name: value.detach().clone() for name, value in tensors.items()}
        return checkpoint.Checkpoint(self.total, self.cfg.digest(), copies, facts)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Go on exactly where `saved` was taken."""
        names = ("network", "muon", "adamw", "bank", "lag")
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for name, value in saved.tensors.items():
            part, _, rest = name.partition(".")
            if rest:
                parts[part][rest] = value
        self.network.load_state_dict(parts["network"])
        self.muon.load_state_dict(parts["muon"])
        states: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["adamw"].items():
            number, _, key = name.partition(".")
            states.setdefault(int(number), {})[key] = value
        groups = self.adamw.state_dict()["param_groups"]
        self.adamw.load_state_dict({"state": states, "param_groups": groups})
        for name, value in parts["bank"].items():
            setattr(self.bank, name, value)
        snapshots: dict[int, dict[str, Tensor]] = {}
        for name, value in parts["lag"].items():
            age, _, key = name.partition(".")
            snapshots.setdefault(int(age), {})[key] = value
        self.anticipation.snapshots.clear()
        self.anticipation.snapshots.extend(snapshots[age] for age in sorted(snapshots))
        torch.set_rng_state(saved.tensors["torch_rng"])
        facts: Mapping[str, Any] = saved.facts
        version, internal, gauss = facts["rng"]
        self.rng.setstate((version, tuple(internal), gauss))
        self.stage, self.step, self.total = facts["stage"], facts["step"], facts["total"]
        self.tokens_seen, self.seconds = facts["tokens_seen"], facts["seconds"]
        self.anticipation.until, self.rollbacks = facts["until"], facts["rollbacks"]
        self.spikes.recent.clear()
        self.spikes.recent.extend(facts["recent"])
        self.curve = list(facts["curve"])
        self.meter = Meter.of(facts["meter"])


def train(
    cfg: TrainingConfig,
    network: Network,
    tok: Tokenizer,
    out: pathlib.Path,
    *,
    start_stage: int = 0,
    resume: pathlib.Path | None = None,
    sink: Sink | None = None,
    on_stage_end: Callable[[Stage], None] = lambda stage: None,
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Run all stages; returns the curve and writes it (and checkpoints) under `out`.

    `resume`: a checkpoint of this configuration. `on_step` is told the number of the step in the
    run and its loss. Raises `TrainingError`; the newest checkpoint is then still there.
    """
    run = Run(cfg, network, tok, out, start_stage=start_stage)
    if resume is not None:
        run.restore(checkpoint.load(resume, cfg.digest()))
    sink = sink or Sink(out)
    last = saved = time.monotonic()
    while run.stage < len(cfg.stages):
        stage = cfg.stages[run.stage]
        while run.step < stage.steps:
            outcome = run.update(stage)
            if outcome is None:
                stage = cfg.stages[run.stage]
                say(json.dumps({"spike": run.rollbacks, "back_to": run.total}))
                continue
            now = time.monotonic()
            run.seconds, last = run.seconds + now - last, now
            on_step(run.total, float(outcome.loss.detach()))
            sink.step(cfg, run.total, run.tokens_seen, stage.name)
            if run.step % cfg.log_every == 0 or run.step == stage.steps:
                line = {"stage": stage.name, "step": run.step, "seconds": round(run.seconds, 1),
                        "tokens": run.tokens_seen, **run.meter.line()}  # fmt: skip
                run.curve.append(line)
                say(json.dumps(line))
            due = cfg.checkpoint_every_steps and run.total % cfg.checkpoint_every_steps == 0
            if due or now - saved > cfg.checkpoint_every_s:
                run.save()
                saved = time.monotonic()
        run.anticipation.release()
        sink.curve(run.curve)
        on_stage_end(stage)
        run.stage, run.step = run.stage + 1, 0
        run.save()
    sink.close()
    return run.curve
