"""Sampling draws the very token that the engine's sampler draws: same counter, same order, same
cuts. Two float64 sums that differ in the last bits could disagree once in about 10^13 draws.
"""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from model import sampler
from penstock.request import Sampling
from tests.kernels.triton.check import REFERENCE, TRITON, Draw, examples

SEEDS = st.integers(0, 2**31)
REQUESTS = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1e-6, 0.5, 0.95, 1.0]),
    top_k=st.sampled_from([0, 1, 5, 3000]),
    seed=st.integers(0, 2**64 - 1),
)


@examples(3)
@given(
    seed=SEEDS,
    requests=st.lists(REQUESTS, min_size=1, max_size=2),
    size=st.sampled_from([2, 60, 300, 2100]),
    ties=st.booleans(),
    position=st.integers(0, 1 << 20),
)
def test_the_drawn_token_is_the_sampler_s(
    seed: int, requests: list[Sampling], size: int, ties: bool, position: int
) -> None:
    draw = Draw(seed)
    rows = len(requests)
    logits = draw.normal(rows, size, scale=4.0)
    if ties:
        logits = logits.round()
        logits[:, ::2] *= -0.0 if size > 300 else 1.0
    logits[:, 1::5] = float("-inf")
    uniform = [sampler.uniform(each.seed, each.choice, position) for each in requests]
    args = (
        logits,
        torch.tensor(uniform, dtype=torch.float64),
        torch.tensor([each.temperature for each in requests], dtype=torch.float64),
    )
    cuts = {
        "top_k_R": torch.tensor([each.top_k for each in requests], dtype=torch.int32),
        "top_p_R": torch.tensor([each.top_p for each in requests], dtype=torch.float64),
    }
    wanted = [
        sampler.sample(logits[row].numpy(), each, position=position)
        for row, each in enumerate(requests)
    ]
    assert TRITON.sample(*args, **cuts).tolist() == wanted
    assert REFERENCE.sample(*args, **cuts).tolist() == wanted


@examples(6)
@given(seed=SEEDS, uniform=st.sampled_from([0.0, 0.5, 1.0 - 2.0**-53]))
def test_nothing_is_cut_without_limits(seed: int, uniform: float) -> None:
    logits = Draw(seed).normal(1, 130)
    args = (logits, torch.tensor([uniform]).double(), torch.ones(1, dtype=torch.float64))
    order = np.argsort(-logits[0].double().numpy(), kind="stable")
    mass = np.cumsum(np.exp(logits[0].double().numpy()[order] - logits.max().item()))
    wanted = order[min(int(np.searchsorted(mass, uniform * mass[-1], side="right")), 129)]
    assert TRITON.sample(*args).tolist() == [wanted]
    assert REFERENCE.sample(*args).tolist() == [wanted]


def test_a_uniform_number_next_to_one_draws_the_last_token_that_has_mass() -> None:
    """u * mass rounds to the whole mass for some masses: then nothing used to be drawn."""
    logits = torch.tensor([[0.0, -1.0, 2.0, -0.5, float("-inf")]]).repeat(4, 1)
    logits[:, 0] = torch.tensor([0.0, 0.3, 0.7, 1.1])
    uniform = torch.full((4,), 1.0 - 2.0**-53, dtype=torch.float64)
    for ops in (TRITON, REFERENCE):
        assert ops.sample(logits, uniform, torch.ones(4, dtype=torch.float64)).tolist() == [1] * 4
