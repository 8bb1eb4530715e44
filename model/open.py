"""Open the engine that a `ModelSpec` names: the one place that decides between fake and torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from model.engine import Engine
from model.fake import FakeEngine, FakeSettings
from model.ranks.check import check_ranks
from model.ranks.followers import ChildRank, Order, RankStarter
from model.ranks.replica import follow, open_replica
from penstock.folder import model_folder
from penstock.worker import ModelSpec, RankSpec

if TYPE_CHECKING:
    from model.ranks.communicator import Communicator


def open_engine(
    spec: ModelSpec,
    ranks: RankSpec | None = None,
    *,
    host: str = "127.0.0.1",
    start: RankStarter = ChildRank,
) -> Engine:
    """The engine of `spec`. torch is imported here and only for a real model.

    Over several ranks this process is rank 0; `start` starts the others, which reach it at `host`.
    """
    ranks = ranks or RankSpec()
    check_ranks(spec, ranks)
    if ranks.world == 1:
        return _open_part(spec, None)
    return open_replica(
        lambda comm: _open_part(spec, comm),
        spec,
        ranks,
        host=host,
        start=start,
        exchanges=model_folder(spec.model) is not None,
    )


def follow_rank(order: Order) -> None:
    """The life of another rank of a replica; returns when rank 0 hangs up."""
    spec = order.model
    exchanges = model_folder(spec.model) is not None
    follow(order, lambda comm: _open_part(spec, comm), exchanges=exchanges)


def _open_part(spec: ModelSpec, comm: Communicator | None) -> Engine:
    """One rank's engine."""
    folder = model_folder(spec.model)
    return _open_fake(spec) if folder is None else _open_torch(spec, folder, comm)


def _open_fake(spec: ModelSpec) -> FakeEngine:
    settings = FakeSettings(
        prefill_tokens_per_s=spec.fake_prefill_tokens_per_s,
        decode_step_ms=spec.fake_decode_step_ms,
        draft_tokens=0 if spec.num_speculative_tokens == "auto" else spec.num_speculative_tokens,
        draft_accuracy=spec.fake_draft_accuracy,
    )
    if spec.max_model_len is not None:
        settings = settings.model_copy(update={"max_model_len": spec.max_model_len})
    return FakeEngine(settings)


def _open_torch(spec: ModelSpec, folder: Path, comm: Communicator | None) -> Engine:
    import torch

    from model.device.check import find_device
    from model.load import load_device_engine, load_engine

    torch.set_num_threads(spec.torch_threads)
    if find_device(spec.device).type == "cpu":
        return load_engine(
            folder,
            kv_cache_dtype=spec.kv_cache_dtype,
            dtype=spec.dtype,
            rounding=spec.rounding,
            numerics=spec.numerics,
            max_model_len=spec.max_model_len,
            draft_tokens=spec.num_speculative_tokens,
            draft_confidence=spec.draft_confidence,
            comm=comm,
        )
    return load_device_engine(
        folder,
        device="cuda" if spec.device == "auto" else spec.device,
        kv_cache_dtype=spec.kv_cache_dtype,
        dtype=spec.dtype,
        rounding=spec.rounding,
        numerics=spec.numerics,
        max_model_len=spec.max_model_len,
        draft_tokens=spec.num_speculative_tokens,
        grid=None if comm is None else comm.grid,
    )
