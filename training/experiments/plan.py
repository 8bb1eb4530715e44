"""What each experiment runs: one base, and what its variants change. Pure."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.config import TrainingConfig

STEPS = 70
_BASE: dict[str, Any] = {
    "seed": 1, "log_every": 5, "sinkhorn_iters": 4,
    "network": {
        "hidden_size": 64, "q_lora_rank": 64, "o_lora_rank": 64, "moe_intermediate_size": 64,
        "hc_mult": 2,
    },
    "stages": [{
        "name": "A", "shapes": [{"tokens": 160, "rows": 12, "facts": 4, "questions": 5}],
        "steps": STEPS, "warmup_steps": 10, "dense_steps": 50, "full_question": 0.0,
        "lr_muon": [0.02, 0.02], "lr_adamw": [5e-3, 5e-3],
    }],
}  # fmt: skip


def config(changes: Mapping[str, Any] | None = None) -> TrainingConfig:
    """The base with `changes`: dotted keys, `stages.0.lr_muon` and the like."""
    tree = copy.deepcopy(_BASE)
    for key, value in (changes or {}).items():
        *path, last = key.split(".")
        at: Any = tree
        for part in path:
            at = at[int(part)] if part.isdigit() else at.setdefault(part, {})
        at[last] = value
    return TrainingConfig.model_validate(tree)


def _muon(rate: float) -> dict[str, Any]:
    return {"stages.0.lr_muon": [rate, rate]}


def _adamw(rate: float) -> dict[str, Any]:
    return {"optimizer": "adamw", "stages.0.lr_adamw": [rate, rate]}


@dataclass(frozen=True)
class Experiment:
    """Variants by name; all read the same batches in the same order."""

    question: str
    variants: Mapping[str, Mapping[str, Any]]


_HOT = {"stages.0.lr_muon": [0.08, 0.08], "stages.0.lr_adamw": [2e-2, 2e-2]}

EXPERIMENTS: Mapping[str, Experiment] = {
    "muon": Experiment(
        "Muon or AdamW for the matrices, each at several rates",
        {
            "Muon 0.02": {},
            "AdamW 0.003": _adamw(3e-3),
            "AdamW 0.01": _adamw(1e-2),
            "Muon 0.04": _muon(0.04),
            "AdamW 0.001": _adamw(1e-3),
            "Muon 0.01": _muon(0.01),
            "AdamW 0.03": _adamw(3e-2),
        },
    ),
    "mhc": Experiment(
        "residual streams mixed by a doubly stochastic matrix, by a free one, or not at all",
        {
            "mHC": {},
            "free mixing": {"stabilisers.sinkhorn": False},
            "one stream": {"network.hc_mult": 1},
        },
    ),
    "sinks": Experiment(
        "attention sinks: attention that has nothing to find goes there",
        {"sinks": {}, "no sinks": {"stabilisers.sinks": False}},
    ),
    "balance": Experiment(
        "the routers' bias follows the load; and the sequence-wise loss",
        {
            "bias": {},
            "neither": {"stabilisers.balance_speed": 0.0},
            "bias and sequence loss": {"stabilisers.sequence_balance": 0.01},
        },
    ),
    "clamp": Experiment(
        "SwiGLU clamped at 10, at rates that are too high",
        {"clamp 10": _HOT, "no clamp": {**_HOT, "network.swiglu_limit": 1e9}},
    ),
    "anticipatory": Experiment(
        "routing indices of an older snapshot, at rates that are too high",
        {
            "never": _HOT,
            "after a spike": {
                **_HOT, "stabilisers.anticipatory": "spike", "stabilisers.spike": 1.3,
                "stabilisers.anticipatory_steps": 20,
            },
            "always": {**_HOT, "stabilisers.anticipatory": "on"},
        },
    ),
}  # fmt: skip
