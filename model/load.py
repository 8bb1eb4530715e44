"""`load_engine`: from an official model folder and a user's choices to an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch

from kernels import ops as kernel_ops
from model.config import ModelConfig
from model.drafts.plan import plan_drafts
from model.layout import KvFormat
from model.options import DTYPES, NUMERICS, EngineOptions
from model.torch_engine import TorchEngine
from model.weights import has_draft_module, load_weights
from penstock.errors import ModelLoadError


def load_engine(
    folder: Path | str,
    *,
    kv_cache_dtype: str = "fp8",
    dtype: str = "auto",
    numerics: str = "exact",
    device: str = "cpu",
    max_model_len: int | None = None,
    draft_tokens: int | Literal["auto"] = 0,
    draft_confidence: float = 0.0,
) -> TorchEngine:
    """Load an official model folder. Raises `ModelLoadError` with one sentence.

    Class `exact` sets torch to one thread: a product split over threads may round differently.
    """
    kv = _choice("kv_cache_dtype", kv_cache_dtype, [k.value for k in KvFormat])
    chosen = _choice("dtype", dtype, ["auto", *DTYPES])
    numerics = _choice("numerics", numerics, list(NUMERICS))
    if device != "cpu":
        raise ModelLoadError(f"device {device!r} is not supported yet; use 'cpu'")
    try:
        ops = kernel_ops.load()
    except kernel_ops.BackendError as error:
        raise ModelLoadError(str(error)) from None
    config = ModelConfig.load(folder)
    limit = config.max_positions if max_model_len is None else max_model_len
    if not 0 < limit <= config.max_positions:
        raise ModelLoadError(
            f"max_model_len {limit} is outside 1..{config.max_positions}, "
            "the model's max_position_embeddings"
        )
    options = EngineOptions(
        kv=KvFormat(kv),
        dtype="float32" if chosen == "auto" else chosen,
        numerics=numerics,
        max_model_len=limit,
    )
    if draft_tokens == "auto" and not has_draft_module(folder):
        draft_tokens = 0
    drafts = plan_drafts(config, draft_tokens, confidence=draft_confidence)
    weights = load_weights(folder, config, drafts=drafts is not None)
    if numerics == "exact":
        torch.set_num_threads(1)
    return TorchEngine(
        config,
        weights.tensors,
        weights_digest=weights.digest,
        options=options,
        ops=ops,
        drafts=drafts,
    )


def _choice(name: str, value: str, allowed: list[str]) -> str:
    if value not in allowed:
        raise ModelLoadError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return value
