"""What the torch-free part of the stack reads in a model folder: its small JSON files."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from penstock.errors import ModelLoadError

SHIPPED = ("ledger",)
FAKE = "fake"
LARGEST_JSON_BYTES = 256 << 20


def model_folder(model: str) -> Path | None:
    """Folder of a shipped model's name or of a path; None for the fake, which has no folder.

    Raises `ModelLoadError` if there is nothing at the path.
    """
    if model == FAKE:
        return None
    if model in SHIPPED:
        return Path(str(files("penstock").joinpath("shipped", model)))
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelLoadError(
            f"no model at '{model}': it is neither a folder with a config.json nor one of "
            f"{', '.join((*SHIPPED, FAKE))}; fetch a hub model with `hf download NAME --local-dir "
            "FOLDER` and name the folder"
        )
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, {} if there is no such file. Raises `ModelLoadError` that names it."""
    try:
        if path.stat().st_size > LARGEST_JSON_BYTES:
            raise ModelLoadError(f"{path} is larger than any file of its kind")
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} does not hold a JSON object")
    return value


def eos_ids(folder: Path) -> frozenset[int]:
    """End tokens that the folder's own files name: generation_config.json, else config.json."""
    for name in ("generation_config.json", "config.json"):
        ids = read_json(folder / name).get("eos_token_id")
        if isinstance(ids, int):
            return frozenset({ids})
        if isinstance(ids, list) and ids:
            return frozenset(int(i) for i in ids)
    return frozenset()


def sampling_defaults(model: str) -> dict[str, float]:
    """temperature, top_p and top_k of the model's generation_config.json, where it gives them."""
    folder = model_folder(model)
    if folder is None:
        return {}
    given = read_json(folder / "generation_config.json")
    wanted = {key: given[key] for key in ("temperature", "top_p", "top_k") if key in given}
    if given.get("do_sample") is False:
        wanted["temperature"] = 0.0
    return {key: float(value) for key, value in wanted.items() if value is not None}
