"""Open the engine that a `ModelSpec` names: the one place that decides between fake and torch."""

from __future__ import annotations

from model.engine import Engine
from model.fake import FakeEngine, FakeSettings
from penstock.folder import model_folder
from penstock.worker import ModelSpec


def open_engine(spec: ModelSpec) -> Engine:
    """The engine of `spec`. torch is imported here and only for a real model."""
    folder = model_folder(spec.model)
    if folder is None:
        settings = FakeSettings(
            prefill_tokens_per_s=spec.fake_prefill_tokens_per_s,
            decode_step_ms=spec.fake_decode_step_ms,
            draft_tokens=(
                0 if spec.num_speculative_tokens == "auto" else spec.num_speculative_tokens
            ),
            draft_accuracy=spec.fake_draft_accuracy,
        )
        if spec.max_model_len is not None:
            settings = settings.model_copy(update={"max_model_len": spec.max_model_len})
        return FakeEngine(settings)
    import torch

    from model.load import load_engine

    torch.set_num_threads(spec.torch_threads)
    return load_engine(
        folder,
        kv_cache_dtype=spec.kv_cache_dtype,
        dtype=spec.dtype,
        rounding=spec.rounding,
        numerics=spec.numerics,
        device="cpu" if spec.device == "auto" else spec.device,
        max_model_len=spec.max_model_len,
        draft_tokens=spec.num_speculative_tokens,
        draft_confidence=spec.draft_confidence,
    )
