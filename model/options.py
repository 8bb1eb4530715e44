"""How a model is opened, and which of that changes the stored numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from model.config import ModelConfig
from model.grid import Grid
from model.layout import LAYOUT_VERSION, KvFormat
from model.rounding import Rounding
from penstock.blocks import BLOCK_TOKENS

NUMERICS = ("exact", "fast")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class EngineOptions:
    rounding: Rounding
    dtype: str
    numerics: str
    max_model_len: int

    @property
    def kv(self) -> KvFormat:
        """Format of cache rows."""
        return self.rounding.kv


def fingerprint_facts(
    config: ModelConfig,
    options: EngineOptions,
    weights_digest: str,
    layout: str,
    kernel_set: str,
    row_tile: int | None,
    grid: Grid,
    platform: dict[str, object] | None = None,
) -> dict[str, object]:
    """All that changes the stored numbers (architecture.md). Class `fast` leaves the platform
    out. `platform`: of an engine that does not compute on the CPU.
    """
    facts: dict[str, object] = {
        "weights": weights_digest,
        "config": config.facts(),
        "rounding": options.rounding.facts(),
        "dtype": options.dtype,
        "numerics": options.numerics,
        "layout": layout,
        "layout_version": LAYOUT_VERSION,
        "block_tokens": BLOCK_TOKENS,
    }
    if options.numerics == "exact":
        # Context parallel moves rows and splits no sum (model.grid).
        facts["parallel"] = {"tp": grid.tp, "ep": grid.ep}
        facts["platform"] = platform or {
            "device": "cpu",
            "isa": torch.backends.cpu.get_cpu_capability(),
            "torch": torch.__version__,
            "kernels": kernel_set,
            "row_tile": row_tile or 0,
        }
    return facts
