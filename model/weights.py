"""Loading an official model folder: every tensor checked by name, shape and type
(deepseek-v4.md 6).

bf16 and fp32 tensors only; FP8 and FP4 weights are refused by name until their loader exists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import ModelConfig
from model.tensors import Expected, Kind, expected_tensors
from penstock.errors import ModelLoadError

_FLOATS = {"BF16": torch.bfloat16, "F32": torch.float32}
_INTEGERS = {"I64": torch.int64, "I32": torch.int32}
_QUANTISED = {"F8_E4M3", "F8_E8M0", "I8", "U8", "F4"}
_INDEX_FILE = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """Tensors as stored, by official name, and a digest of all names, shapes, types and bytes."""

    tensors: dict[str, Tensor]
    digest: str


def load_weights(folder: Path | str, config: ModelConfig, *, drafts: bool = False) -> Weights:
    """Read and check all tensors. One `ModelLoadError` sentence names everything that is wrong."""
    root = Path(folder)
    expected = expected_tensors(config, drafts=drafts)
    problems: list[str] = []
    tensors: dict[str, Tensor] = {}
    for name, path in _locations(root).items():
        if name.startswith("mtp.") and not drafts:
            continue
        if name not in expected:
            if name.endswith(".scale") and name.removesuffix(".scale") + ".weight" in expected:
                problems.append(f"{name} is the scale of an FP8 or FP4 weight (not supported yet)")
            else:
                problems.append(f"{name} is unexpected")
            continue
        tensors |= _read(path, name, expected[name], problems)
    problems += [f"{name} is missing" for name in expected if name not in tensors]
    _refuse(root, problems, known=set(expected))
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            problems.append(f"{name} has values that are not finite")
        elif not tensor.is_floating_point() and not _within(tensor, config.experts):
            problems.append(f"{name} names experts outside 0..{config.experts - 1}")
    _refuse(root, problems, known=set(expected))
    return Weights(tensors, _digest(tensors))


def has_draft_module(folder: Path | str) -> bool:
    """Whether the folder holds any tensor of it; its config may name one that was left out."""
    return any(name.startswith("mtp.") for name in _locations(Path(folder)))


def _within(table: Tensor, experts: int) -> bool:
    return int(table.min()) >= 0 and int(table.max()) < experts


def _refuse(root: Path, problems: list[str], *, known: set[str]) -> None:
    if not problems:
        return
    # A tensor that was refused for its shape or type is not missing as well.
    named = {text.split(" ", 1)[0] for text in problems if not text.endswith("is missing")}
    kept = [t for t in problems if not (t.endswith("is missing") and t.split(" ", 1)[0] in named)]
    raise ModelLoadError(f"{root} does not fit its config.json: {'; '.join(kept)}")


def _locations(root: Path) -> dict[str, Path]:
    """Tensor name -> file: from the index if there is one; else `model.safetensors` alone if it is
    there (other files beside it, such as an oracle's, are not the model); else from every file.
    """
    index = root / _INDEX_FILE
    if index.exists():
        try:
            listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {str(name): root / str(file) for name, file in listed.items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ModelLoadError(f"{index} cannot be read as a tensor index: {error!r}") from None
    only = root / "model.safetensors"
    files = [only] if only.exists() else sorted(root.glob("*.safetensors"))
    found: dict[str, Path] = {}
    for path in files:
        for name in _names(path):
            if name in found:
                raise ModelLoadError(f"{name} is in both {found[name].name} and {path.name}")
            found[name] = path
    if not found:
        raise ModelLoadError(f"{root} holds no *.safetensors file with tensors")
    return found


def _names(path: Path) -> Iterator[str]:
    try:
        with safe_open(path, framework="pt") as file:
            yield from file.keys()
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path} is not a whole safetensors file: {error}") from None


def _read(path: Path, name: str, expected: Expected, problems: list[str]) -> dict[str, Tensor]:
    """{name: tensor}, or nothing and a line in `problems`."""
    try:
        with safe_open(path, framework="pt") as file:
            if name not in file.keys():  # noqa: SIM118 - a safetensors handle is not a mapping
                problems.append(f"{name} is listed in the index but not in {path.name}")
                return {}
            view = file.get_slice(name)
            kind, shape = view.get_dtype(), tuple(view.get_shape())
            integer = expected.kind is Kind.INT64
            allowed = _INTEGERS if integer else _FLOATS
            if kind in _QUANTISED and not integer:
                problems.append(f"{name} is {kind} (FP8 and FP4 weights are not supported yet)")
            elif kind not in allowed:
                problems.append(f"{name} is {kind}, not {' or '.join(allowed)}")
            elif shape != expected.shape:
                problems.append(f"{name} is {list(shape)}, not {list(expected.shape)}")
            else:
                return {name: file.get_tensor(name)}
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path} is not a whole safetensors file: {error}") from None
    return {}


def _digest(tensors: dict[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        total.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
