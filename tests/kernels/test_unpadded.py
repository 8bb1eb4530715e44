"""The ops of class `fast` mean what the reference means."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.ops import ReferenceOps, suited
from kernels.reference.attend import ENTRY_TILE, AttendSpan
from kernels.reference.unpadded import UnpaddedOps


@settings(max_examples=60, deadline=None)
@given(
    places=st.lists(
        st.tuples(st.integers(0, 700), st.sampled_from([1, 1, 1, 3])), min_size=1, max_size=4
    ),
    ratio=st.sampled_from([0, 4, 16]),
    selected=st.booleans(),
    seed=st.integers(0, 99),
)
def test_attention_agrees_with_the_reference(
    places: list[tuple[int, int]], ratio: int, selected: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    heads, dim, window = 5, 32, 24
    spans, row = [], 0
    for position, count in places:
        history = torch.randn((window + count, dim), generator=random)
        # As the engine keeps it: zeros stand for positions before the first token.
        history[: max(window - position, 0)] = 0
        entries = torch.randn((2 * ENTRY_TILE, dim), generator=random)
        spans.append(AttendSpan(row, count, position, history, entries))
        row += count
    picked = None
    if ratio == 4 and selected:
        picked = torch.full((row, 6), -1)
        for span in spans:
            for at in range(span.count):
                most = min((span.position + at + 1) // ratio, 6)
                chosen = torch.randperm((span.position + at + 1) // ratio, generator=random)[:most]
                picked[span.row + at, :most] = chosen.sort().values
    q = torch.randn((row, heads, dim), generator=random)
    sink = torch.randn(heads, generator=random)
    wanted = {"window": window, "ratio": ratio, "picked_RK": picked, "scale": dim**-0.5}
    ours = UnpaddedOps().attend(q, spans, sink, **wanted)
    padded = ReferenceOps().pad_rows(q)
    theirs = ReferenceOps().attend(padded, spans, sink, **wanted)
    for mine, meant in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine[:row], meant[:row], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(("exact", "kind"), [(True, ReferenceOps), (False, UnpaddedOps)])
def test_only_class_fast_leaves_the_padding_out(exact: bool, kind: type) -> None:
    chosen = suited(ReferenceOps(), torch.bfloat16, streams=4, channels=(64,), exact=exact)
    assert type(chosen) is kind
