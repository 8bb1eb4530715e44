"""Ranks against one rank (issue 3, item 4), as threads of one process."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.config import ModelConfig
from model.grid import Grid
from model.load import load_engine
from model.tensors import check_grid, expected_tensors
from penstock.errors import ModelLoadError
from tests.model import drawn, oracle
from tests.model.ranked import ranks, rows_and_snapshot

# Logits of these models reach 7; one rank differs from transformers by up to 2.7e-5 on them.
TOLERANCE = 1e-5
EXACT = {"kv_cache_dtype": "fp32", "dtype": "float32"}
Models = Callable[[str], oracle.OracleModel]
LAYOUTS = [(2, 1), (1, 2), (2, 2)]


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


@pytest.mark.parametrize(("tp", "ep"), LAYOUTS)
@pytest.mark.parametrize("name", ["all_kinds", "pro_like"])
def test_ranks_agree_with_one_rank_on_every_position(
    name: str, tp: int, ep: int, model: Models
) -> None:
    source = model(name)
    tokens = source.tokens(513)
    one = load_engine(source.folder, **EXACT)
    wanted, _, evidence = rows_and_snapshot(tokens, [513])(one)
    with ranks(source.folder, tp=tp, ep=ep, **EXACT) as several:
        found = several.each(rows_and_snapshot(tokens, [513]))
        again = several.each(rows_and_snapshot(tokens, [37, 300, 512, 513], move_at=300))
    for rank, (rows, seen, told) in enumerate(found):
        assert_near(rows, wanted)
        # Every rank holds the whole cache, to the bit.
        assert seen == found[0][1], rank
        assert [(e.start, e.end) for e in told] == [(e.start, e.end) for e in evidence]
        assert np.allclose([e.mass for e in told], [e.mass for e in evidence], atol=1e-5)
        # And within one layout chunks and a move change no bit.
        assert np.array_equal(again[rank][0], rows)
        assert again[rank][1] == seen


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
    one = load_engine(source.folder, **EXACT)
    wanted, _, _ = rows_and_snapshot(tokens, ends)(one)
    for tp, ep in fits:
        with ranks(source.folder, tp=tp, ep=ep, **EXACT) as several:
            for rows, _, _ in several.each(rows_and_snapshot(tokens, ends)):
                assert_near(rows, wanted)


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
            # What is cut lies on one rank, but for the inputs of a group that ranks share.
            assert seen.min() >= 1, name
            if "wo_b" not in name:
                assert seen.max() in (1, tp * ep), name


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
