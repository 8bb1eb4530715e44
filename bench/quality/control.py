"""A control model: the shipped weights with the rows of the head permuted. Imports torch."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from penstock.errors import UsageError
from penstock.folder import model_folder


def permuted_head(model: str, target: Path, *, seed: int) -> None:
    """Copies the folder of `model` to `target`; each token's row of the head becomes another's.

    A system that answers from anything but the model's own output would not notice.
    """
    source = model_folder(model)
    if source is None or not (source / "model.safetensors").exists():
        raise UsageError(
            f"the control needs a folder with model.safetensors, and '{model}' has none; use "
            "`ledger` or such a folder"
        )
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and path.name != "model.safetensors":
            shutil.copy(path, target / path.name)
    tensors = load_file(source / "model.safetensors")
    head = tensors["head.weight"]
    order = torch.randperm(len(head), generator=torch.Generator().manual_seed(seed))
    tensors["head.weight"] = head[order].contiguous()
    save_file(tensors, target / "model.safetensors")
