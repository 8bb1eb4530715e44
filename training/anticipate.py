"""Anticipatory routing (deepseek-v4.md 8): experts are chosen by an older snapshot of the weights.

At step t the features are today's, the routing indices those of step t - lag. Outlier tokens and
the router then cannot push each other up within a step. It costs a forward pass, so it is on only
for a while after a detected spike, together with a short rollback; or always, or never.
"""

from __future__ import annotations

import copy
import statistics
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from training.config import Stabilisers
from training.network import Network

_RECENT = 20


class Spikes:
    """Detects a loss far above the recent median. Pure, given the losses."""

    def __init__(self, factor: float) -> None:
        self._factor = factor
        self.recent: deque[float] = deque(maxlen=_RECENT)

    def seen(self, loss: float) -> bool:
        """Whether this loss is a spike; it then does not count for later ones."""
        known = len(self.recent) == _RECENT
        if known and loss > self._factor * statistics.median(self.recent):
            return True
        self.recent.append(loss)
        return False


class Anticipation:
    """The snapshots of a run and whether they route at present."""

    def __init__(self, settings: Stabilisers, network: Network) -> None:
        self._settings, self._network = settings, network
        self.until = 0
        """Anticipation is on before this step of the run, in mode `spike`."""
        self.snapshots: deque[dict[str, Tensor]] = deque(maxlen=settings.lag + 1)
        self._shadow: Network | None = None

    def active(self, step: int) -> bool:
        """Whether step `step` (of the run) takes indices from a snapshot."""
        mode = self._settings.anticipatory
        return mode == "on" or (mode == "spike" and step < self.until)

    def switch_on(self, step: int) -> None:
        """After a spike, from `step` on."""
        self.until = step + self._settings.anticipatory_steps

    def route(self, step: int, forward: Callable[[Network], object]) -> None:
        """Have the network's routers take the indices that the snapshot chooses for this batch.

        `forward` runs a network on the batch. Before there is a snapshot as old as `lag` the oldest
        one is taken.
        """
        if not self.active(step):
            self.snapshots.clear()
            self.release()
            return
        state = {name: value.clone() for name, value in self._network.state_dict().items()}
        self.snapshots.append(state)
        if self._shadow is None:
            for moe in self._network.routers():
                moe.scores = None  # part of the last step's graph, which cannot be copied
            self._shadow = copy.deepcopy(self._network)
        self._shadow.load_state_dict(self.snapshots[0])
        with torch.no_grad():
            forward(self._shadow)
        for mine, older in zip(self._network.routers(), self._shadow.routers(), strict=True):
            mine.forced = None if mine.gate.hashed else older.ids

    def release(self) -> None:
        """Routers choose for themselves again (evaluation, export)."""
        for moe in self._network.routers():
            moe.forced = None
