"""Ranks against one rank (issue 3, item 4), as threads of one process."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples.tiny_checkpoint import write_checkpoint
from model.config import ModelConfig
from model.engine import DraftRequest, Engine, Segment
from model.grid import Grid
from model.load import load_engine
from model.ranks.share import Share, cut
from model.tensors import check_grid, expected_tensors
from penstock.errors import ModelLoadError
from penstock.request import Sampling
from tests.model import drawn, oracle
from tests.model.engine_contract import absorb, snapshot
from tests.model.ranked import ranks, rows_and_snapshot

# Where torch multiplies, an output's last bits may depend on how many outputs stand beside it.
TOLERANCE = 1e-5
EXACT = {"kv_cache_dtype": "fp32", "dtype": "float32"}
Models = Callable[[str], oracle.OracleModel]
LAYOUTS = [(2, 1), (1, 2), (2, 2)]
# With four ranks those of a group of `all_kinds` share its outputs.
MORE_LAYOUTS = [*LAYOUTS, (4, 1), (1, 4)]


def assert_near(got: np.ndarray, wanted: np.ndarray) -> None:
    """Within the tolerance times the size of the logits, and the same greedy tokens."""
    worst = float(np.abs(got - wanted).max() / max(1.0, float(np.abs(wanted).max())))
    far = float((np.abs(got - wanted) > TOLERANCE).mean())
    print(
        f"worst {np.abs(got - wanted).max():.1e}, {worst:.1e} of the largest logit, {far:.1e} far"
    )
    assert worst <= TOLERANCE
    assert far < 0.002
    # Where two logits are a tie in fp32, either is the greedy token.
    chosen = np.take_along_axis(wanted, got.argmax(1)[:, None], 1)[:, 0]
    assert (wanted.max(1) - chosen <= 2 * np.abs(got - wanted).max()).all()


@pytest.mark.parametrize(("tp", "ep"), MORE_LAYOUTS)
@pytest.mark.parametrize("name", ["all_kinds", "pro_like"])
def test_ranks_compute_what_one_rank_computes_to_the_bit(
    name: str, tp: int, ep: int, model: Models
) -> None:
    source = model(name)
    tokens = source.tokens(513)
    one = load_engine(source.folder, **EXACT)
    wanted = rows_and_snapshot(tokens, [513])(one)
    with ranks(source.folder, tp=tp, ep=ep, **EXACT) as several:
        found = several.each(rows_and_snapshot(tokens, [513]))
        again = several.each(rows_and_snapshot(tokens, [37, 300, 512, 513], move_at=300))
    for rows, seen, told in (*found, *again):
        assert np.array_equal(rows, wanted[0])
        # Every rank holds the whole cache, and knows the same evidence.
        assert (seen, told) == wanted[1:]


@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
def test_ranks_agree_on_the_reference_kernels(
    tp: int, ep: int, model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PENSTOCK_KERNELS__BACKEND", "reference")
    source = model("all_kinds")
    tokens = source.tokens(300)
    wanted, _, evidence = rows_and_snapshot(tokens, [300])(load_engine(source.folder, **EXACT))
    with ranks(source.folder, tp=tp, ep=ep, **EXACT) as several:
        found = several.each(rows_and_snapshot(tokens, [300]))
        again = several.each(rows_and_snapshot(tokens, [37, 300], move_at=37))
    for rank, (rows, seen, told) in enumerate(found):
        assert_near(rows, wanted)
        assert seen == found[0][1], rank
        assert [(e.start, e.end) for e in told] == [(e.start, e.end) for e in evidence]
        assert np.allclose([e.mass for e in told], [e.mass for e in evidence], atol=1e-5)
        assert np.array_equal(again[rank][0], rows)
        assert again[rank][1] == seen


@pytest.mark.parametrize(
    ("name", "cp", "length", "ends"),
    [
        ("all_kinds", 2, 700, [700]),
        # Parts that begin and end anywhere; the last chunk is too short to be shared.
        ("all_kinds", 3, 1061, [37, 600, 1020, 1061]),
        ("wide_window", 2, 600, [333, 600]),
        ("ledger_like", 2, 1500, [1100, 1500]),
    ],
)
def test_context_ranks_change_no_bit(
    name: str,
    cp: int,
    length: int,
    ends: list[int],
    model: Models,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = model(name)
    tokens = source.tokens(length)
    parts: list[int] = []
    monkeypatch.setattr(Share, "entries", _counted(parts, Share.entries))
    wanted = rows_and_snapshot(tokens, [length])(load_engine(source.folder))
    with ranks(source.folder, cp=cp) as several:
        for rows, seen, evidence in several.each(rows_and_snapshot(tokens, ends, move_at=ends[0])):
            assert np.array_equal(rows, wanted[0])
            assert seen == wanted[1]
            assert evidence == wanted[2]
        # Without every position's logits the last layer computes only what is wanted.
        for seen in several.each(
            lambda engine: snapshot(engine, absorb(engine, tokens, chunk=600))
        ):
            assert seen == wanted[1]
    # It was shared: no rank computed a whole chunk of those.
    assert parts and max(parts) < max(ends[0], 600)


def _counted(parts: list[int], entries: Callable[..., Any]) -> Callable[..., Any]:
    def counted(share: Share, mine: Any, *, ratio: int) -> Any:
        parts.append(share.end - share.start)
        return entries(share, mine, ratio=ratio)

    return counted


def test_context_ranks_over_tensor_ranks_change_no_bit(model: Models) -> None:
    source = model("pro_like")
    tokens = source.tokens(400)
    with ranks(source.folder, tp=2) as plane:
        wanted = plane.each(rows_and_snapshot(tokens, [400]))[0]
    with ranks(source.folder, tp=2, cp=2) as several:
        for rows, seen, evidence in several.each(rows_and_snapshot(tokens, [400])):
            assert np.array_equal(rows, wanted[0])
            assert (seen, evidence) == (wanted[1], wanted[2])


@pytest.mark.parametrize("layout", [{"tp": 2}, {"tp": 2, "ep": 2}])
def test_a_released_checkpoint_is_rounded_on_ranks_as_on_one(
    layout: dict[str, int], tmp_path: Path
) -> None:
    """FP8 and FP4 weights cut through their tiles, activations rounded before every linear."""
    folder = write_checkpoint(tmp_path / "flash")
    vocab = ModelConfig.load(folder).vocab_size
    work = rows_and_snapshot([(7 * i * i + 3 * i) % vocab for i in range(300)], [150, 300])
    options = {"dtype": "float32", "rounding": "auto"}
    rows, seen, told = work(load_engine(folder, **options))
    with ranks(folder, **layout, **options) as several:
        for found in several.each(work):
            assert np.array_equal(found[0], rows)
            assert found[1:] == (seen, told)


@pytest.mark.parametrize("draft", ["mtp", "dspark"])
def test_drafts_of_a_released_checkpoint_on_ranks(draft: str, tmp_path: Path) -> None:
    """Every rank drafts alike; planes that shared the prompt draft what one plane drafts."""
    folder = write_checkpoint(tmp_path / draft, draft=draft)
    vocab = ModelConfig.load(folder).vocab_size
    tokens = [(7 * i * i + 3 * i) % vocab for i in range(600)]

    def work(engine: Engine) -> tuple[list[bytes], list[list[int]]]:
        sequence = absorb(engine, tokens, chunk=600, capacity=700)
        sampling = Sampling(temperature=0.0, seed=1)
        drafts = engine.draft([DraftRequest(sequence, 5, 3, sampling)])
        engine.forward([Segment(sequence, [5, *drafts[0]], all_logits=True, seekable=True)])
        engine.seek(sequence, 601)
        return snapshot(engine, sequence), drafts

    one = work(load_engine(folder, draft_tokens=3))
    assert one[1][0]
    with ranks(folder, cp=2, draft_tokens=3) as several:
        assert several.each(work) == [one] * 2
    with ranks(folder, ep=2, draft_tokens=3) as several:
        first, second = several.each(work)
    assert first == second


@given(
    start=st.integers(0, 3000),
    count=st.integers(0, 5000),
    planes=st.integers(1, 6),
    unit=st.sampled_from([128, 256]),
)
def test_every_cut_of_a_chunk_is_aligned_and_long_enough(
    start: int, count: int, planes: int, unit: int
) -> None:
    borders = cut(start, start + count, planes=planes, unit=unit)
    if planes == 1 or count < planes * unit:
        assert borders is None
        return
    assert borders is not None
    assert (borders[0], borders[-1], len(borders)) == (start, start + count, planes + 1)
    assert all(border % 128 == 0 for border in borders[1:-1])
    sizes = [end - begin for begin, end in pairwise(borders)]
    assert min(sizes[1:]) >= unit
    assert sizes[0] >= 1
    assert max(sizes) - min(sizes) <= 2 * unit


@given(st.data())
@drawn.examples(4)
def test_drawn_models_on_drawn_ranks(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changes = data.draw(drawn.configs())
    folder = tmp_path_factory.mktemp("drawn")
    source = oracle.build_changed(changes, folder)
    config = ModelConfig.load(source.folder)
    fits = [grid for grid in LAYOUTS if _fits(config, Grid(*grid))]
    tokens = source.tokens(data.draw(st.integers(1, 300)))
    ends = data.draw(drawn.cuts(len(tokens), most=3))
    wanted = rows_and_snapshot(tokens, ends)(load_engine(source.folder, **EXACT))
    for tp, ep in fits:
        with ranks(source.folder, tp=tp, ep=ep, **EXACT) as several:
            for rows, seen, told in several.each(rows_and_snapshot(tokens, ends)):
                assert np.array_equal(rows, wanted[0])
                assert (seen, told) == wanted[1:]


def _fits(config: ModelConfig, grid: Grid) -> bool:
    try:
        check_grid(config, grid)
    except ModelLoadError:
        return False
    return True


@pytest.mark.parametrize(("kv", "dtype"), [("fp8", "float32"), ("fp8", "bfloat16")])
def test_rounded_caches_and_bfloat16_stay_alike_on_every_rank(
    kv: str, dtype: str, model: Models
) -> None:
    source = model("all_kinds")
    tokens = source.tokens(300)
    with ranks(source.folder, tp=2, kv_cache_dtype=kv, dtype=dtype) as several:
        first, second = several.each(rows_and_snapshot(tokens, [300]))
        third, _ = several.each(rows_and_snapshot(tokens, [5, 128, 299, 300], move_at=128))
    assert first[1] == second[1] == third[1]
    assert np.array_equal(first[0], third[0])


def test_layout_is_in_the_fingerprint_but_context_ranks_are_not(model: Models) -> None:
    folder = model("all_kinds").folder
    prints = [load_engine(folder).info.fingerprint]
    for layout in ({"tp": 2}, {"ep": 2}):
        with ranks(folder, **layout) as several:
            first, second = several.each(lambda engine: engine.info.fingerprint)
        assert first == second
        prints.append(first)
    with ranks(folder, cp=2) as several:
        assert several.each(lambda engine: engine.info.fingerprint) == [prints[0]] * 2
    assert len(set(prints)) == 3
    with ranks(folder, tp=2, numerics="fast") as several:
        loose = load_engine(folder, numerics="fast").info.fingerprint
        assert several.each(lambda engine: engine.info.fingerprint) == [loose] * 2


def test_parts_of_all_ranks_make_up_every_weight(model: Models) -> None:
    """For plane sizes below, at and above the number of output groups."""
    config = ModelConfig.load(model("all_kinds").folder)
    assert config.o_groups == 2
    for tp, ep in [*LAYOUTS, (4, 1), (1, 4)]:
        for name, weight in expected_tensors(config).items():
            seen = np.zeros(weight.shape, dtype=int)
            for rank in range(tp * ep):
                slices = weight.slices(Grid(tp, ep, 1, rank))
                if slices is not None:
                    seen[slices] += 1
            # What is cut lies on one rank, by its outputs: every sum is whole.
            assert seen.min() == seen.max() and seen.max() in (1, tp * ep), name
            parts = [weight.slices(Grid(tp, ep, 1, rank)) for rank in range(tp * ep)]
            whole = tuple(slice(0, size) for size in weight.shape[1:])
            assert all(part is None or part[1:] == whole for part in parts), name


@pytest.mark.parametrize(
    ("tp", "ep", "words"),
    [(3, 1, ["4 heads", "3 ranks"]), (1, 8, ["4 heads", "8 ranks"]), (1, 3, ["8 routed experts"])],
)
def test_ranks_that_do_not_divide_the_model_are_refused_with_numbers(
    tp: int, ep: int, words: list[str], model: Models
) -> None:
    config = ModelConfig.load(model("all_kinds").folder)
    with pytest.raises(ModelLoadError) as caught:
        check_grid(config, Grid(tp, ep))
    assert "\n" not in caught.value.message
    for word in words:
        assert word in caught.value.message
