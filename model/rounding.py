"""Where numbers are rounded on purpose, as the release was trained (deepseek-v4.md 5.2-5.4).

Four points, each of which can be switched off:
- cache rows: window and compressed rows to e4m3 and bf16 (`kv`, `--kv-cache-dtype`);
- `index`: index queries and keys to FP4 behind the Hadamard rotation;
- `scores`: index scores to bf16 before the top-k;
- `activations`: the input of every linear with FP8 or FP4 weights to e4m3, per row and 128
  channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from model.layout import KvFormat
from model.tensors import Expected
from penstock.errors import ModelLoadError

POINTS = ("activations", "index", "scores")


@dataclass(frozen=True)
class Rounding:
    """The rounding points of one engine; part of the fingerprint."""

    kv: KvFormat = KvFormat.FP8
    index: bool = True
    scores: bool = False
    activations: bool = False

    @classmethod
    def choose(cls, kv: KvFormat, asked: str, *, quantised: bool) -> Rounding:
        """`asked`: `auto`, `none`, or some of `POINTS` with commas between.

        `auto` follows the checkpoint: a quantised one was trained with every point, a plain one is
        rounded in its cache only, and without an FP8 cache nothing is rounded. Raises
        `ModelLoadError`.
        """
        if asked == "auto":
            full = kv is KvFormat.FP8
            return cls(kv, index=full, scores=full and quantised, activations=full and quantised)
        points = [] if asked == "none" else [part.strip() for part in asked.split(",")]
        if unknown := [point for point in points if point not in POINTS]:
            raise ModelLoadError(
                f"rounding is {asked!r}; {unknown[0]!r} is none of {', '.join(POINTS)} "
                "(or auto or none alone)"
            )
        chosen = cls(kv, **{point: point in points for point in POINTS})
        if chosen.index and kv is KvFormat.FP32:
            raise ModelLoadError(
                "rounding 'index' needs a rounded cache; use kv_cache_dtype fp8 or leave it out"
            )
        if chosen.scores and not chosen.index:
            raise ModelLoadError("rounding 'scores' goes with rounding 'index'; ask for both")
        if chosen.activations and not quantised:
            raise ModelLoadError(
                "rounding 'activations' is for FP8 and FP4 weights, and this checkpoint has none"
            )
        return chosen

    @property
    def index_rows(self) -> KvFormat:
        """Format of index keys: that of the cache, or bf16 in an FP8 cache without FP4 keys."""
        if self.index:
            return KvFormat.FP8
        return KvFormat.BF16 if self.kv is KvFormat.FP8 else self.kv

    def facts(self) -> dict[str, object]:
        """Plain values for the fingerprint."""
        return {"kv": self.kv.value, **{point: getattr(self, point) for point in POINTS}}


def rounded_inputs(table: Mapping[str, Expected]) -> frozenset[str]:
    """Weights before which activations are rounded: FP8 and FP4 ones but `wo_a`, which the
    reference uses in bf16 (5.2, T20).
    """
    return frozenset(
        name
        for name, weight in table.items()
        if weight.kind.scaled and not name.endswith("wo_a.weight")
    )
