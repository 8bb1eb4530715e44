"""Muon with the ten-step hybrid Newton-Schulz of the V4 report (section 2.4)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

FAST = (3.4445, -4.7750, 2.0315)
LAST = (2.0, -1.5, 0.5)


STEPS = (FAST,) * 8 + (LAST,) * 2


def orthogonalize(m: Tensor, steps: Sequence[tuple[float, float, float]] = STEPS) -> Tensor:
    """[..., a, b] -> the nearest (semi-)orthogonal matrix: 8 fast steps, then 2 that converge."""
    flip = m.shape[-2] > m.shape[-1]
    x = m.mT if flip else m
    x = x / (x.flatten(-2).norm(dim=-1)[..., None, None] + 1e-20)
    for a, b, c in steps:
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    result: Tensor = x.mT if flip else x
    return result


class Muon:
    """Momentum 0.95, Nesterov; the update is scaled by 0.18 sqrt(max(rows, columns)), decay is
    decoupled.

    `matrices` pairs a parameter with the shape [count, rows, columns] of the independent matrices
    in it. Equal shapes are orthogonalized together.
    """

    def __init__(
        self, matrices: Iterable[tuple[Tensor, tuple[int, int, int], float]], *,
        weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        self.momentum, self.weight_decay = 0.95, weight_decay
        self.groups: dict[tuple[int, int], list[tuple[Tensor, tuple[int, int, int], float]]]
        self.groups = defaultdict(list)
        self._parameters: list[Tensor] = []
        for parameter, shape, rate in matrices:
            self._parameters.append(parameter)
            self.groups[min(shape[1:]), max(shape[1:])].append((parameter, shape, rate))
        self.state: dict[int, Tensor] = {}

    def state_dict(self) -> dict[str, Tensor]:
        """Momentum by the parameter's place in `matrices`."""
        return {
            str(number): self.state[id(p)]
            for number, p in enumerate(self._parameters)
            if id(p) in self.state
        }

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """What `state_dict` of the same matrices gave."""
        self.state = {id(self._parameters[int(n)]): v.clone() for n, v in saved.items()}

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Apply and clear the gradients."""
        for members in self.groups.values():
            updates = []
            for parameter, shape, _ in members:
                gradient = parameter.grad
                if gradient is None:
                    gradient = torch.zeros_like(parameter)
                state = self.state.setdefault(id(parameter), torch.zeros_like(parameter))
                state.mul_(self.momentum).add_(gradient)
                update = (gradient + self.momentum * state).view(shape)
                updates.append(update.mT if shape[1] > shape[2] else update)
                parameter.grad = None
            whole = orthogonalize(torch.cat(updates))
            at = 0
            for (parameter, shape, rate), update in zip(members, updates, strict=True):
                part = whole[at : at + len(update)]
                at += len(update)
                part = part.mT if shape[1] > shape[2] else part
                scale = 0.18 * max(shape[1:]) ** 0.5
                if self.weight_decay:
                    parameter.mul_(1 - lr * rate * self.weight_decay)
                parameter.sub_(part.reshape(parameter.shape), alpha=lr * rate * scale)
