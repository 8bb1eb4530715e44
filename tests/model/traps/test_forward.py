"""Traps of the forward pass: right beside the oracle, far from the oracle with the mistake.

One tiny model in which every trap shows: a clamp that bites, a large mHC epsilon, few Sinkhorn
rounds, YaRN on a short original length, several heads a group, unequal sinks, real selection.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from model.engine import Segment
from model.load import load_engine
from tests.model import oracle
from tests.model.traps import mistakes

CONFIG = {
    "ratios": [0, 4, 8, 4],
    "num_attention_heads": 8,
    "o_groups": 2,
    "num_hash_layers": 1,
    "swiglu_limit": 0.3,
    "hc_eps": 0.02,
    "hc_sinkhorn_iters": 2,
    "index_topk": 4,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
LENGTH = 150
TOLERANCE = 1e-4
FAR = 0.02


@dataclass(frozen=True)
class Case:
    model: oracle.OracleModel
    tokens: list[int]
    ours_LV: torch.Tensor
    right_LV: torch.Tensor


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    model = oracle.build_changed(CONFIG, tmp_path_factory.mktemp("traps"), seed=1)
    tokens = model.tokens(LENGTH)
    seen = model.watched(tokens)
    assert seen.margin_L.min() > 2e-5, "near tie: take another seed"
    engine = load_engine(model.folder, kv_cache_dtype="fp32", dtype="float32")
    found = engine.forward([Segment(engine.open(LENGTH), tokens, all_logits=True)])[0].logits
    assert found is not None
    rows = [torch.frombuffer(bytearray(found.row(i)), dtype=torch.float32) for i in range(LENGTH)]
    return Case(model, tokens, torch.stack(rows), seen.logits_LV)


def off_by(case: Case, mistake: mistakes.Patch) -> float:
    """Largest difference of our logits to those of the oracle with the mistake; ours must be right
    first.
    """
    assert (case.ours_LV - case.right_LV).abs().max() <= TOLERANCE
    with mistakes.made(mistake, case.model.reference):
        wrong = case.model.logits(case.tokens)
    off = (case.ours_LV - wrong).abs().max().item()
    name = next(name for name, value in vars(mistakes).items() if value is mistake)
    print(f"\n{name}: {off:.3f}")
    whole_again = case.model.logits(case.tokens[:40]) - case.right_LV[:40]
    assert whole_again.abs().max() <= TOLERANCE
    return off


@pytest.mark.parametrize(
    "harmless", [mistakes.right_clamp, mistakes.right_mhc, mistakes.index_right]
)
def test_a_rewritten_oracle_without_a_mistake_is_the_oracle(
    harmless: mistakes.Patch, case: Case
) -> None:
    """Else the mistakes below could be far away for another reason than the mistake."""
    assert off_by(case, harmless) <= TOLERANCE


def check(case: Case, *wrong: mistakes.Patch) -> None:
    for mistake in wrong:
        assert off_by(case, mistake) > FAR


def test_t01_rope_pairs_are_interleaved_and_on_the_last_dims(case: Case) -> None:
    check(case, mistakes.half_split_pairs, mistakes.rope_on_the_first_dims)


def test_t02_rope_base_and_yarn_belong_to_the_layer(case: Case) -> None:
    check(
        case,
        mistakes.plain_rope_for_window_of_compressed_layers,
        mistakes.compressed_rope_everywhere,
        mistakes.no_yarn,
    )


def test_t03_yarn_has_no_mscale(case: Case) -> None:
    check(case, mistakes.mscale_on_cos_and_sin, mistakes.mscale_on_the_softmax)


def test_t05_the_shared_expert_is_clamped(case: Case) -> None:
    check(case, mistakes.unclamped_shared_expert)


def test_t06_the_clamp_precedes_silu_and_spares_low_gates(case: Case) -> None:
    check(
        case,
        mistakes.unclamped_routed_experts,
        mistakes.clamp_after_silu,
        mistakes.gate_clamped_from_below,
        mistakes.up_clamped_from_above_only,
    )


def test_t07_mhc_coefficients_and_direction(case: Case) -> None:
    check(
        case,
        mistakes.mhc_transposed,
        mistakes.mhc_rows_last,
        mistakes.mhc_pre_without_eps,
        mistakes.mhc_post_with_eps,
        mistakes.mhc_post_without_two,
    )


def test_t08_the_output_is_derotated(case: Case) -> None:
    check(case, mistakes.no_derotation)


def test_t13_an_entry_stands_at_its_first_token(case: Case) -> None:
    check(
        case,
        mistakes.entry_at_its_index,
        mistakes.entry_at_its_end,
        mistakes.entry_at_the_overlaps_start,
    )


def test_t14_an_entry_is_visible_from_the_token_that_completes_it(case: Case) -> None:
    check(
        case,
        mistakes.heavy_entry_too_early,
        mistakes.heavy_entry_too_late,
        mistakes.newest_entry_hidden,
    )


def test_t15_empty_slots_of_the_selection_gather_nothing(case: Case) -> None:
    check(case, mistakes.padding_gathers_the_first_entry, mistakes.padding_gathers_the_last_entry)


def test_t16_index_scores_apply_relu_per_head_and_then_weigh(case: Case) -> None:
    check(
        case,
        mistakes.index_without_relu,
        mistakes.index_relu_after_the_sum,
        mistakes.index_without_weights,
    )


def test_t24_output_groups_take_consecutive_heads(case: Case) -> None:
    check(case, mistakes.groups_interleaved)


def test_t26_every_head_has_its_sink(case: Case) -> None:
    check(case, mistakes.no_sink, mistakes.one_sink_for_all_heads)


def test_the_routers_bias_chooses_and_does_not_weigh(case: Case) -> None:
    check(case, mistakes.bias_in_the_weights)
