"""`load_engine`: from an official model folder and a user's choices to an engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal

import torch

from kernels import ops as kernel_ops
from model.cache import cache_bytes
from model.config import ModelConfig
from model.drafts.plan import plan_drafts
from model.grid import Grid
from model.layout import KvFormat
from model.options import DTYPES, NUMERICS, EngineOptions
from model.plan import Need, check_fit, free_host_bytes, weight_bytes, work_bytes
from model.progress import Progress
from model.ranks.communicator import Communicator, alone
from model.rounding import Rounding, rounded_inputs
from model.tensors import Expected, check_grid
from model.torch_engine import TorchEngine
from model.weights import Checkpoint, open_checkpoint, read_weights, stored_bytes
from penstock.errors import ModelLoadError


def load_engine(
    folder: Path | str,
    *,
    kv_cache_dtype: str = "fp8",
    dtype: str = "auto",
    rounding: str = "auto",
    numerics: str = "exact",
    device: str = "cpu",
    max_model_len: int | None = None,
    draft_tokens: int | Literal["auto"] = 0,
    draft_confidence: float = 0.0,
    comm: Communicator | None = None,
) -> TorchEngine:
    """Load an official model folder. Raises `ModelLoadError` with one sentence.

    `dtype` auto: bfloat16 for a quantised checkpoint, float32 for a plain one. `rounding`: see
    `Rounding.choose`. `comm`: this rank's place among several; it holds its part of the weights.
    Class `exact` sets torch to one thread: a product split over threads may round differently.
    """
    kv = KvFormat(_choice("kv_cache_dtype", kv_cache_dtype, [k.value for k in KvFormat]))
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
    grid = Grid() if comm is None else comm.grid
    checkpoint = open_checkpoint(folder, config)
    with checkpoint.shards:
        quantised = checkpoint.precision.quantised
        if chosen == "auto":
            chosen = "bfloat16" if quantised else "float32"
        options = EngineOptions(
            rounding=Rounding.choose(kv, rounding, quantised=quantised),
            dtype=chosen,
            numerics=numerics,
            max_model_len=limit,
        )
        check_grid(config, grid, rounding=options.rounding.activations)
        if draft_tokens == "auto" and not checkpoint.has_drafts:
            draft_tokens = 0
        drafts = plan_drafts(config, draft_tokens, confidence=draft_confidence)
        if drafts is not None and not checkpoint.has_drafts:
            raise ModelLoadError(
                f"{folder} holds no draft module (mtp.* tensors); use --num-speculative-tokens 0"
            )
        table = checkpoint.backbone if drafts is None else checkpoint.table
        _check_fit(
            checkpoint, table, grid, options, lambda tokens: cache_bytes(config, tokens, drafts)
        )
        shown: AbstractContextManager[Progress | None] = nullcontext()
        if grid.rank == 0:
            total = stored_bytes(checkpoint, table, grid)
            shown = Progress(f"Loading {Path(folder).name}", total)
        with shown as bar:
            weights = read_weights(
                checkpoint, dtype=DTYPES[chosen], grid=grid, drafts=drafts is not None, progress=bar
            )
    if numerics == "exact":
        torch.set_num_threads(1)
    return TorchEngine(
        config,
        weights.tensors,
        weights_digest=weights.digest_of((comm or alone()).plane_numbers(weights.share)),
        options=options,
        ops=ops,
        rounded=rounded_inputs(table),
        drafts=drafts,
        comm=comm,
    )


def _check_fit(
    checkpoint: Checkpoint,
    table: dict[str, Expected],
    grid: Grid,
    options: EngineOptions,
    cache_of: Callable[[int], int],
) -> None:
    free = free_host_bytes()
    if free is None:
        return
    need = Need(
        weights=weight_bytes(table, grid, element_bytes=DTYPES[options.dtype].itemsize),
        cache=cache_of(options.max_model_len),
        work=work_bytes(checkpoint.config, grid),
    )
    check_fit(
        str(checkpoint.shards.root),
        need,
        grid,
        free=free,
        max_model_len=options.max_model_len,
        cache_of=cache_of,
    )


def _choice(name: str, value: str, allowed: list[str]) -> str:
    if value not in allowed:
        raise ModelLoadError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
    return value
