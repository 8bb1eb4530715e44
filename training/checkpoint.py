"""Checkpoints of a training run: everything that the next step depends on, in one file.

A file is 12 magic bytes, the SHA-256 of what follows, then a safetensors image (no code can run
from it) whose metadata is JSON. It is written beside its place, flushed to the medium and renamed:
a full disk or a kill leaves the earlier checkpoint as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from training.errors import CheckpointError, TrainingError

_MAGIC = b"penstock-tr1"
_NAME = re.compile(r"checkpoint-(\d{8})\.train")
KEPT = 2
"""Newest checkpoints that stay in a folder."""


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name and plain facts; `step` counts over all stages, `config` is a digest."""

    step: int
    config: str
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


def path_of(folder: pathlib.Path, step: int) -> pathlib.Path:
    """Where the checkpoint of a step stands."""
    return folder / f"checkpoint-{step:08d}.train"


def known(folder: pathlib.Path) -> list[pathlib.Path]:
    """All checkpoints of a folder, oldest first. What was never renamed does not count."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def save(folder: pathlib.Path, checkpoint: Checkpoint) -> pathlib.Path:
    """Write it whole or not at all; older ones than the newest `KEPT` are deleted afterwards.

    Raises `TrainingError` if the disk does not take it; what was there stays.
    """
    head = {"step": checkpoint.step, "config": checkpoint.config, "facts": checkpoint.facts}
    tensors = {name: value.contiguous() for name, value in checkpoint.tensors.items()}
    body = safetensors.torch.save(tensors, {"penstock": json.dumps(head)})
    target = path_of(folder, checkpoint.step)
    half = target.with_suffix(".part")
    try:
        with half.open("wb") as file:
            file.write(_MAGIC + hashlib.sha256(body).digest())
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        half.replace(target)
    except OSError as error:
        half.unlink(missing_ok=True)
        left = known(folder)
        kept = f"{left[-1].name} is kept" if left else "there is no earlier one"
        raise TrainingError(
            f"cannot write the checkpoint of step {checkpoint.step}: {error.strerror}; {kept}; "
            "make room and go on with --resume"
        ) from error
    for old in known(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return target


def load(path: pathlib.Path, config: str) -> Checkpoint:
    """Read and verify. Raises `CheckpointError`: not there, not whole, another configuration."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read the checkpoint {path}: {error.strerror}; check --resume"
        ) from error
    at = len(_MAGIC)
    if data[:at] != _MAGIC:
        raise CheckpointError(f"{path} is no checkpoint of training; check --resume")
    body = data[at + 32 :]
    if hashlib.sha256(body).digest() != data[at : at + 32]:
        raise CheckpointError(
            f"the checkpoint {path} is damaged: its digest does not match; resume from an earlier "
            f"one{_earlier(path)}"
        )
    tensors = safetensors.torch.load(body)
    length = int.from_bytes(body[:8], "little")
    head = json.loads(json.loads(body[8 : 8 + length])["__metadata__"]["penstock"])
    if head["config"] != config:
        raise CheckpointError(
            f"the checkpoint {path} belongs to another configuration ({head['config'][:12]}, this "
            f"one is {config[:12]}); resume with the configuration that it was made with"
        )
    return Checkpoint(head["step"], config, tensors, head["facts"])


def _earlier(path: pathlib.Path) -> str:
    others = [each.name for each in known(path.parent) if each.name < path.name]
    return f" ({others[-1]})" if others else ""
