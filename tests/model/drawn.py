"""Random tiny models and random schedules for hypothesis, and how many of them a run tries.

`HYPOTHESIS_PROFILE=long` tries 20 times as many, new ones in every run, and shrinks a failure; the
default tries the same few in every run, so that CI does not depend on luck.
"""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"


def examples(count: int) -> settings:
    """Settings of a test whose examples cost a good part of a second each."""
    return settings(
        max_examples=20 * count if LONG else count,
        derandomize=not LONG,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink) if LONG else (Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def configs(draw: st.DrawFn, *, index_heads: tuple[int, ...] = (32,)) -> dict[str, Any]:
    """Changes for `oracle.build_changed`: every axis that the architecture leaves open.

    Fewer than 32 index heads make exact score ties likely (all ReLUs dead), which the oracle breaks
    in no stated way: then top-k covers every block.
    """
    heavy = draw(st.sampled_from([2, 8, 16, 32, 128]))
    ratios = draw(st.lists(st.sampled_from([0, 4, heavy]), min_size=1, max_size=4))
    groups = draw(st.sampled_from([1, 2, 4]))
    rope = draw(st.sampled_from([16, 32, 64]))
    experts = draw(st.integers(4, 12))
    few_heads = draw(st.sampled_from(index_heads))
    window = draw(st.one_of(st.sampled_from([8, 128]), st.integers(8, 128)))
    return {
        "ratios": ratios,
        "vocab_size": draw(st.sampled_from([128, 320])),
        "hidden_size": draw(st.sampled_from([32, 64, 96])),
        "num_attention_heads": groups * draw(st.sampled_from([1, 2, 8])) * (4 // min(groups, 4)),
        "head_dim": draw(st.sampled_from([64, 96, 128])),
        "qk_rope_head_dim": rope,
        "q_lora_rank": draw(st.sampled_from([16, 32, 48])),
        "o_groups": groups,
        "o_lora_rank": draw(st.sampled_from([8, 16])),
        "sliding_window": window,
        "index_n_heads": few_heads,
        "index_head_dim": draw(st.sampled_from([d for d in (32, 64, 128) if d >= rope])),
        "index_topk": draw(st.sampled_from([1, 4, 16, 24, 512])) if few_heads >= 32 else 512,
        "n_routed_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, min(experts, 4))),
        "moe_intermediate_size": draw(st.sampled_from([32, 48, 64])),
        "num_hash_layers": draw(st.integers(0, len(ratios))),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 1.5, 2.5])),
        "swiglu_limit": draw(st.sampled_from([0.3, 10.0])),
        "hc_sinkhorn_iters": draw(st.sampled_from([2, 20])),
        "rope_scaling": draw(st.one_of(st.none(), yarns())),
    }


@st.composite
def yarns(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": draw(st.sampled_from([4, 16])),
        "original_max_position_embeddings": draw(st.sampled_from([256, 4096, 65536])),
        "beta_fast": 32,
        "beta_slow": 1,
    }


@st.composite
def cuts(draw: st.DrawFn, length: int, *, most: int = 8) -> list[int]:
    """Ends of consecutive chunks of a prompt of `length` tokens; borders of windows, blocks and
    tiles are likelier than chance would make them.
    """
    if length < 2:
        return [length]
    near = [p for p in (3, 4, 5, 16, 127, 128, 129, 255, 256, 257, 384, 512) if p < length]
    place = st.integers(1, length - 1)
    inside = draw(st.sets(st.one_of(place, st.sampled_from(near or [1])), max_size=most))
    return [*sorted(inside), length]
