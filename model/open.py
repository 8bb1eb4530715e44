"""Open the engine that a `ModelSpec` names. The only place that decides between the fake and torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from model.engine import Engine
from model.fake import FakeEngine, FakeSettings
from penstock.errors import ModelLoadError
from penstock.worker import ModelSpec

SHIPPED = ("ledger",)


def model_folder(model: str) -> Path:
    """Folder of a shipped model's name or of a path. Raises `ModelLoadError` if it is not there."""
    if model in SHIPPED:
        return Path(str(files("penstock").joinpath("shipped", model)))
    folder = Path(model).expanduser()
    if not (folder / "config.json").is_file():
        raise ModelLoadError(
            f"no model at '{model}': it is neither a folder with a config.json nor one of "
            f"{', '.join((*SHIPPED, 'fake'))}"
        )
    return folder


def open_engine(spec: ModelSpec) -> Engine:
    """The engine of `spec`. torch is imported here and only for a real model."""
    if spec.model == "fake":
        settings = FakeSettings(
            prefill_tokens_per_s=spec.fake_prefill_tokens_per_s,
            decode_step_ms=spec.fake_decode_step_ms,
        )
        if spec.max_model_len is not None:
            settings = settings.model_copy(update={"max_model_len": spec.max_model_len})
        return FakeEngine(settings)
    folder = model_folder(spec.model)
    import torch

    from model.torch_engine import load_engine

    torch.set_num_threads(spec.torch_threads)
    return load_engine(
        folder,
        kv_cache_dtype=spec.kv_cache_dtype,
        dtype=spec.dtype,
        numerics=spec.numerics,
        device=spec.device,
        max_model_len=spec.max_model_len,
    )
