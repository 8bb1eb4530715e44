"""What cannot run on a device, said in one sentence before anything large is read."""

from __future__ import annotations

import torch

from kernels.device import ReferenceDeviceOps
from kernels.dispatch import load_device
from kernels.double import DoubleDeviceOps
from kernels.ops import BackendError
from model.config import CSA_RATIO, ModelConfig
from model.device.pools import Geometry
from model.device.weights import ExpertFormat
from model.grid import Grid
from model.layout import KvFormat
from model.options import EngineOptions
from model.plan import Need, check_fit, work_bytes
from model.tensors import Kind, Precision, held_in_fp32
from model.weights import Checkpoint
from penstock.errors import ModelLoadError

_GROUP = 128
_EXPERT_BITS = {ExpertFormat.PLAIN: 16, ExpertFormat.E4M3: 9, ExpertFormat.MXFP4: 5}
"""A number with its share of the scale, rounded up."""


def find_device(asked: str) -> torch.device:
    """`cuda`, `cuda:N`, `cpu`, or `auto`: CUDA where there is one. Raises `ModelLoadError`."""
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(asked)
    except RuntimeError:
        raise ModelLoadError(f"device is {asked!r}; it must be auto, cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise ModelLoadError(f"device is {asked!r}; it must be auto, cpu or cuda")
    if device.type == "cuda":
        _check_cuda(device)
        if device.index is None:
            # With its number, so that it is equal to the device of the tensors on it.
            device = torch.device("cuda", torch.cuda.current_device())
    return device


def _check_cuda(device: torch.device) -> None:
    if torch.version.cuda is None:
        raise ModelLoadError(
            f"device {str(device)!r} needs a CUDA build of torch, and {torch.__version__} is none; "
            "install one or use --device cpu"
        )
    if not torch.cuda.is_available():
        raise ModelLoadError(
            f"device {str(device)!r} was asked for and torch finds no CUDA device here; "
            "use --device cpu"
        )
    count = torch.cuda.device_count()
    if device.index is not None and device.index >= count:
        raise ModelLoadError(f"device {str(device)!r} was asked for and there are {count} here")


def device_ops(
    device: torch.device, *, exact: bool, backend: str | None = None
) -> ReferenceDeviceOps:
    """The ops of `device`; the reference in float64 where rows must not depend on each other.

    Raises `ModelLoadError`.
    """
    try:
        ops = load_device(device, backend)
    except BackendError as error:
        raise ModelLoadError(str(error)) from None
    return DoubleDeviceOps() if exact and type(ops) is ReferenceDeviceOps else ops


def expert_format(precision: Precision, options: EngineOptions) -> ExpertFormat:
    """FP8 experts are multiplied as such only with activations that are rounded as well."""
    if precision.experts is Kind.FP4:
        return ExpertFormat.MXFP4
    if precision.experts is Kind.FP8 and options.rounding.activations:
        return ExpertFormat.E4M3
    return ExpertFormat.PLAIN


def check_model(
    config: ModelConfig, options: EngineOptions, ops: ReferenceDeviceOps, grid: Grid, drafts: int
) -> None:
    """Raises `ModelLoadError` for a model or options that this engine does not serve."""
    c = config
    if grid.world > 1:
        raise ModelLoadError(
            "an engine on a device runs on one rank so far; use parallel degrees of 1 or "
            "--device cpu"
        )
    if drafts:
        raise ModelLoadError(
            "an engine on a device does not draft so far; use --num-speculative-tokens 0"
        )
    if options.kv is not KvFormat.FP8 or options.rounding.index_rows is not KvFormat.FP8:
        raise ModelLoadError(
            f"an engine on a device keeps its cache in fp8 rows and fp4 index keys; use "
            f"--kv-cache-dtype fp8 and a rounding with index (they are {options.kv.value} and "
            f"{options.rounding.index_rows.value})"
        )
    Geometry.of(config)
    problems: list[str] = []
    if options.rounding.activations:
        widths = {
            "hidden_size": c.hidden,
            "q_lora_rank": c.q_rank,
            "o_groups x o_lora_rank": c.o_groups * c.o_rank,
            "moe_intermediate_size": c.expert_width,
        }
        problems += [
            f"{name} {width} is no multiple of {_GROUP}, the group in which activations are rounded"
            for name, width in widths.items()
            if width % _GROUP
        ]
    if not isinstance(ops, DoubleDeviceOps) and type(ops) is not ReferenceDeviceOps:
        if options.dtype != "bfloat16":
            problems.append(f"Triton's kernels compute in bfloat16, not {options.dtype}")
        if c.streams not in (2, 4):
            problems.append(f"Triton's kernels take 2 or 4 streams (hc_mult), not {c.streams}")
        powers = {"head_dim": c.head_dim}
        if c.last_csa_layer is not None:
            powers["index_head_dim"] = c.index_dim
        problems += [
            f"Triton's kernels take a power of two from 64 on as {name}, not {size}"
            for name, size in powers.items()
            if size < 64 or size & (size - 1)
        ]
    if problems:
        raise ModelLoadError(f"this model cannot run on a device: {'; '.join(problems)}")


def check_memory(
    checkpoint: Checkpoint, options: EngineOptions, experts: ExpertFormat, device: torch.device
) -> None:
    """Raises `ModelLoadError` if weights, one longest sequence and a pass do not fit the device."""
    if device.type != "cuda":
        return
    config, geometry = checkpoint.config, Geometry.of(checkpoint.config)
    bits = _EXPERT_BITS[experts]
    weights = 0
    for name, weight in checkpoint.backbone.items():
        wide = 32 if held_in_fp32(name, weight) else 16
        weights += weight.numbers * (bits if weight.expert is not None else wide) // 8
    # A pass decodes the entries of its sequences into one buffer beside its own rows.
    decoded = 2 * config.head_dim * options.max_model_len // CSA_RATIO
    need = Need(
        weights=weights,
        cache=geometry.bytes_for(options.max_model_len),
        work=work_bytes(config, Grid()) + decoded,
    )
    check_fit(
        str(checkpoint.shards.root),
        need,
        Grid(),
        free=torch.cuda.mem_get_info(device)[0],
        max_model_len=options.max_model_len,
        cache_of=geometry.bytes_for,
        where=f"device {str(device)!r}",
    )


def platform_facts(device: torch.device, ops: ReferenceDeviceOps, tile: int) -> dict[str, object]:
    """What changes the numbers of class `exact` besides the model and its options."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {"device": name, "torch": torch.__version__, "kernels": ops.name, "tile": tile}
