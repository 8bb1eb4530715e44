"""`load_engine`: from an official model folder and a user's choices to an engine."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from kernels import ops as kernel_ops
from model.cache import cache_bytes
from model.config import ModelConfig
from model.device.check import check_memory, check_model, device_ops, expert_format, find_device
from model.device.engine import DeviceEngine
from model.device.steps import Recorder
from model.drafts.plan import DraftPlan, plan_drafts
from model.grid import Grid
from model.layout import KvFormat
from model.options import DTYPES, NUMERICS, EngineOptions
from model.plan import Need, check_fit, free_host_bytes, weight_bytes, work_bytes
from model.progress import Progress
from model.ranks.communicator import Communicator, alone
from model.rounding import Rounding, rounded_inputs
from model.tensors import Expected, check_grid
from model.torch_engine import TorchEngine
from model.weights import Checkpoint, Weights, open_checkpoint, read_weights, stored_bytes
from penstock.errors import ModelLoadError


@dataclass(frozen=True)
class Opened:
    """A checked folder and what its user chose; no weight has been read."""

    checkpoint: Checkpoint
    options: EngineOptions
    drafts: DraftPlan | None

    @property
    def config(self) -> ModelConfig:
        return self.checkpoint.config

    @property
    def table(self) -> dict[str, Expected]:
        """The weights that an engine needs."""
        return self.checkpoint.backbone if self.drafts is None else self.checkpoint.table


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
    """Load an official model folder for this machine's CPU. Raises `ModelLoadError` with one
    sentence. Other devices: `load_device_engine`.

    `dtype` auto: bfloat16 for a quantised checkpoint, float32 for a plain one. `rounding`: see
    `Rounding.choose`. `comm`: this rank's place among several; it holds its part of the weights.
    Class `exact` sets torch to one thread: a product split over threads may round differently.
    """
    if device != "cpu":
        raise ModelLoadError(f"device {device!r} is not this engine's; use 'cpu'")
    try:
        ops = kernel_ops.load()
    except kernel_ops.BackendError as error:
        raise ModelLoadError(str(error)) from None
    grid = Grid() if comm is None else comm.grid
    opened = _open(
        folder,
        grid,
        kv_cache_dtype=kv_cache_dtype,
        dtype=dtype,
        rounding=rounding,
        numerics=numerics,
        max_model_len=max_model_len,
        draft_tokens=draft_tokens,
        draft_confidence=draft_confidence,
    )
    config, table = opened.config, opened.table
    with opened.checkpoint.shards:
        _check_fit(opened, grid, lambda tokens: cache_bytes(config, tokens, opened.drafts))
        weights = _read(opened, grid)
    if numerics == "exact":
        torch.set_num_threads(1)
    return TorchEngine(
        config,
        weights.tensors,
        weights_digest=weights.digest_of((comm or alone()).plane_numbers(weights.share)),
        options=opened.options,
        ops=ops,
        rounded=rounded_inputs(table),
        drafts=opened.drafts,
        comm=comm,
    )


def load_device_engine(
    folder: Path | str,
    *,
    device: str = "cuda",
    backend: str | None = None,
    kv_cache_dtype: str = "fp8",
    dtype: str = "auto",
    rounding: str = "auto",
    numerics: str = "exact",
    max_model_len: int | None = None,
    draft_tokens: int | Literal["auto"] = 0,
    grid: Grid | None = None,
    recorder: Recorder | None = None,
) -> DeviceEngine:
    """The same folder for the engine over device ops. Raises `ModelLoadError` with one sentence.

    `device` cpu is for tests and for comparison: the reference ops, or Triton's interpreter with
    `backend` triton. `dtype` auto is bfloat16; `draft_tokens` auto is 0, since it does not draft.
    """
    where = find_device(device)
    ops = device_ops(where, exact=numerics == "exact", backend=backend)
    grid = grid or Grid()
    opened = _open(
        folder,
        grid,
        kv_cache_dtype=kv_cache_dtype,
        dtype="bfloat16" if dtype == "auto" else dtype,
        rounding=rounding,
        numerics=numerics,
        max_model_len=max_model_len,
    )
    asked = 0 if draft_tokens == "auto" else draft_tokens
    experts = expert_format(opened.checkpoint.precision, opened.options)
    with opened.checkpoint.shards:
        check_model(opened.config, opened.options, ops, grid, asked)
        _check_fit(opened, grid, lambda tokens: 0)
        check_memory(opened.checkpoint, opened.options, experts, where)
        weights = _read(opened, grid)
    return DeviceEngine(
        opened.config,
        weights.tensors,
        weights_digest=weights.digest,
        options=opened.options,
        ops=ops,
        device=where,
        experts=experts,
        rounded=rounded_inputs(opened.table),
        recorder=recorder,
    )


def _open(
    folder: Path | str,
    grid: Grid,
    *,
    kv_cache_dtype: str,
    dtype: str,
    rounding: str,
    numerics: str,
    max_model_len: int | None,
    draft_tokens: int | Literal["auto"] = 0,
    draft_confidence: float = 0.0,
) -> Opened:
    """Check the choices, the config and all headers. The caller closes the checkpoint's shards."""
    kv = KvFormat(_choice("kv_cache_dtype", kv_cache_dtype, [k.value for k in KvFormat]))
    chosen = _choice("dtype", dtype, ["auto", *DTYPES])
    numerics = _choice("numerics", numerics, list(NUMERICS))
    config = ModelConfig.load(folder)
    limit = config.max_positions if max_model_len is None else max_model_len
    if not 0 < limit <= config.max_positions:
        raise ModelLoadError(
            f"max_model_len {limit} is outside 1..{config.max_positions}, "
            "the model's max_position_embeddings"
        )
    checkpoint = open_checkpoint(folder, config)
    try:
        quantised = checkpoint.precision.quantised
        if chosen == "auto":
            chosen = "bfloat16" if quantised else "float32"
        options = EngineOptions(
            rounding=Rounding.choose(kv, rounding, quantised=quantised),
            dtype=chosen,
            numerics=numerics,
            max_model_len=limit,
        )
        check_grid(config, grid)
        if draft_tokens == "auto" and not checkpoint.has_drafts:
            draft_tokens = 0
        drafts = plan_drafts(config, draft_tokens, confidence=draft_confidence)
        if drafts is not None and not checkpoint.has_drafts:
            raise ModelLoadError(
                f"{folder} holds no draft module (mtp.* tensors); use --num-speculative-tokens 0"
            )
    except BaseException:
        checkpoint.shards.close()
        raise
    return Opened(checkpoint, options, drafts)


def _read(opened: Opened, grid: Grid) -> Weights:
    """All weights of this rank, with a progress bar on rank 0."""
    checkpoint, table = opened.checkpoint, opened.table
    shown: AbstractContextManager[Progress | None] = nullcontext()
    if grid.rank == 0:
        name = checkpoint.shards.root.name
        shown = Progress(f"Loading {name}", stored_bytes(checkpoint, table, grid))
    with shown as bar:
        return read_weights(
            checkpoint,
            dtype=DTYPES[opened.options.dtype],
            grid=grid,
            drafts=opened.drafts is not None,
            progress=bar,
        )


def _check_fit(opened: Opened, grid: Grid, cache_of: Callable[[int], int]) -> None:
    """Against the host's memory."""
    free = free_host_bytes()
    if free is None:
        return
    options = opened.options
    need = Need(
        weights=weight_bytes(opened.table, grid, element_bytes=DTYPES[options.dtype].itemsize),
        cache=cache_of(options.max_model_len),
        work=work_bytes(opened.config, grid),
    )
    check_fit(
        str(opened.checkpoint.shards.root),
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
