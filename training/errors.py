"""What can stop a training run, as one sentence with the next step."""

from __future__ import annotations

from penstock.errors import PenstockError


class TrainingError(PenstockError):
    """A run that cannot go on. No checkpoint is lost by it."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be read, is not whole, or belongs to another configuration."""
