"""`DraftPlan`: whether and how much an engine drafts, from the checkpoint and the user's choice.
Torch-free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from model.config import DraftKind, ModelConfig
from model.engine import DraftCost
from penstock.errors import ModelLoadError

MTP_OWN_TOKENS = 1
VERIFY_SHARE = 0.06
"""One more row in a decode forward, in forwards: measured on CPU, 1 to 12 rows (docs/drafts.md)."""


@dataclass(frozen=True)
class DraftPlan:
    """An open draft module. Its blocks follow the backbone's layers: their windows are
    `layers.{L}.window` and on.
    """

    kind: DraftKind
    stages: int
    tokens: int
    """Most tokens of a draft."""
    confidence: float = 0.0
    """DSpark: a draft ends before the first token that is trusted less."""

    def cost(self, layers: int) -> DraftCost:
        """For a backbone of `layers`: a block costs what a layer does. MTP runs its block for each
        token, DSpark all its stages once a draft.
        """
        share = 1.0 / layers
        if self.kind is DraftKind.MTP:
            return DraftCost(0.0, share + VERIFY_SHARE)
        return DraftCost(self.stages * share, VERIFY_SHARE)

    @property
    def keeps_streams(self) -> bool:
        """MTP reads the last token's streams again when the next token is known (1.6)."""
        return self.kind is DraftKind.MTP


def plan_drafts(
    config: ModelConfig, asked: int | Literal["auto"], *, confidence: float = 0.0
) -> DraftPlan | None:
    """None: no drafts, which is also what `auto` means for a checkpoint without a draft module.

    Raises `ModelLoadError` if drafts are asked for that the checkpoint cannot give.
    """
    found = config.draft
    if asked == 0 or (asked == "auto" and found is None):
        return None
    if found is None:
        raise ModelLoadError(
            f"{asked} draft tokens were asked for but config.json names no draft module "
            "(num_nextn_predict_layers is 0 and there are no dspark_* keys); "
            "use --num-speculative-tokens 0"
        )
    if found.kind is DraftKind.MTP:
        # Further tokens come from the one block again, fed with its own output.
        own = MTP_OWN_TOKENS
        return DraftPlan(found.kind, 1, own if asked == "auto" else asked)
    if asked != "auto" and asked > found.block_size:
        raise ModelLoadError(
            f"{asked} draft tokens were asked for but the checkpoint's dspark_block_size is "
            f"{found.block_size}; use --num-speculative-tokens {found.block_size} or less"
        )
    tokens = found.block_size if asked == "auto" else asked
    return DraftPlan(found.kind, found.stages, tokens, confidence)
