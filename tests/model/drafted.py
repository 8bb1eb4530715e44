"""Tiny random checkpoints with a draft module: a model of `oracle` and random `mtp.*` tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.tensors import expected_tensors
from tests.model import oracle

MTP: dict[str, Any] = {"num_nextn_predict_layers": 1}
DSPARK: dict[str, Any] = {
    # As the release has it: the key says 1 though `mtp.*` is DSpark (T21).
    "num_nextn_predict_layers": 1,
    "dspark_block_size": 5,
    "dspark_noise_token_id": 127,
    "dspark_target_layer_ids": [1, 3, 2],
    "dspark_markov_rank": 16,
}
KINDS = {"mtp": (MTP, 1), "dspark": (DSPARK, 3)}


def add_drafts(source: Path, target: Path, kind: str, *, words: int | None = None) -> Path:
    """`source` with a draft module in `target`. With `words` only so many tokens are ever likely,
    so that drafts are often right.
    """
    keys, stages = KINDS[kind]
    raw = json.loads((source / "config.json").read_text()) | keys
    layers = raw["num_hidden_layers"]
    raw["compress_ratios"] = raw["compress_ratios"][:layers] + [0] * stages
    config = ModelConfig.parse(raw)
    target.mkdir(parents=True, exist_ok=True)
    (target / "config.json").write_text(json.dumps(raw))
    tensors = load_file(source / "model.safetensors")
    torch.manual_seed(11)
    for name, want in expected_tensors(config, drafts=True).items():
        if name.startswith("mtp."):
            tensors[name] = _random(name, want.shape)
    if words is not None:
        head = tensors["head.weight"]
        head[torch.randperm(head.shape[0])[words:]] = 0
    save_file(tensors, target / "model.safetensors")
    return target


def _random(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """No term may be zero or one: it would hide a mistake."""
    value = torch.randn(shape)
    if "norm" in name:
        value = 1 + 0.2 * value
    elif "hc_" in name and name.endswith("scale"):
        value = 0.5 + torch.rand(shape)
    elif not ("sink" in name or name.endswith("base")):
        value = 0.15 * value
    fp32 = any(part in name for part in ("attn_sink", "hc_", "gate.bias", "confidence"))
    rounded = value.to(torch.bfloat16)
    return rounded.float() if fp32 else rounded


def folder_of(
    root: Path, source: oracle.OracleModel, kind: str, *, words: int | None = None
) -> Path:
    """Written once."""
    target = root / f"{source.folder.name}-{kind}-{words or 'all'}"
    return target if target.exists() else add_drafts(source.folder, target, kind, words=words)
