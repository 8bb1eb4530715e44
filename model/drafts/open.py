"""From a plan to the draft module that it names."""

from __future__ import annotations

from model.config import DraftConfig, DraftKind
from model.drafts.drafter import Drafter, Parts
from model.drafts.dspark import DsparkDrafter
from model.drafts.mtp import MtpDrafter
from model.drafts.plan import DraftPlan


def open_drafter(parts: Parts, config: DraftConfig | None, plan: DraftPlan) -> Drafter:
    """`config` is the checkpoint's own; a plan is made only if there is one."""
    if config is None:
        raise ValueError("a checkpoint without a draft module cannot draft")
    if config.kind is DraftKind.MTP:
        return MtpDrafter(parts)
    return DsparkDrafter(parts, config, plan)
