"""Normalised Walsh-Hadamard rotation of the indexer's queries and keys (deepseek-v4.md 2.4).

Shape suffixes: R rows (a multiple of 16), C channels (a power of two).
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard_matrix(size: int) -> Tensor:
    """[C, C] of +1 and -1 in natural (Sylvester) order."""
    if size < 1 or size & (size - 1):
        raise ValueError(f"a Hadamard rotation needs a power of two, not {size} channels")
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        top = torch.cat((matrix, matrix), 1)
        matrix = torch.cat((top, torch.cat((matrix, -matrix), 1)))
    return matrix


def hadamard(x_RC: Tensor, matrix_CC: Tensor) -> Tensor:
    """x H / sqrt(C). The matrix holds only signs: the scale is one multiplication at the end."""
    return torch.mm(x_RC, matrix_CC).mul_(matrix_CC.shape[0] ** -0.5)
