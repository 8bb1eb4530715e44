"""Options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class LauncherKind(StrEnum):
    ray = "ray"
    local = "local"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class KvCacheDtype(StrEnum):
    fp8 = "fp8"
    bf16 = "bf16"
    fp32 = "fp32"


class Numerics(StrEnum):
    exact = "exact"
    fast = "fast"


class Dtype(StrEnum):
    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"


ConfigFile = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings in YAML.")
]
Launcher = Annotated[
    LauncherKind | None,
    typer.Option("--launcher", help="What starts the processes: a Ray cluster or subprocesses."),
]
TensorParallel = Annotated[
    int | None,
    typer.Option(
        "--tensor-parallel-size", min=1, help="Ranks that share heads and experts' widths."
    ),
]
ExpertParallel = Annotated[
    int | None,
    typer.Option("--expert-parallel-size", min=1, help="Ranks that share the routed experts."),
]
ContextParallel = Annotated[
    int | None,
    typer.Option(
        "--prefill-context-parallel-size", min=1, help="Ranks that share a prefill chunk's rows."
    ),
]
DeviceOption = Annotated[
    Device | None,
    typer.Option("--device", help="Where the model runs (auto: GPU if there is one)."),
]
KvCacheDtypeOption = Annotated[
    KvCacheDtype | None, typer.Option("--kv-cache-dtype", help="Format of the KV cache.")
]
RoundingOption = Annotated[
    str | None,
    typer.Option(
        "--rounding",
        metavar="auto|none|LIST",
        help="Rounding beside the cache: some of activations,index,scores; auto: as trained.",
    ),
]
NumericsOption = Annotated[
    Numerics | None,
    typer.Option("--numerics", help="exact: the same token whichever way it came; fast: faster."),
]
DraftTokensOption = Annotated[
    str | None,
    typer.Option(
        "--num-speculative-tokens",
        metavar="N|auto",
        help="Most tokens of a draft; auto: as the checkpoint was trained, 0: none.",
    ),
]
