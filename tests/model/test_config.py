"""`config.json` is read strictly, and every refusal is one sentence that names the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model.config import ModelConfig, Yarn
from penstock.errors import ModelLoadError
from tests.model.oracle import official_config

GOOD = official_config({"ratios": [0, 4, 128]})
DSPARK = {
    "dspark_block_size": 5,
    "dspark_noise_token_id": 127,
    "dspark_target_layer_ids": [0, 1, 2],
    "dspark_markov_rank": 16,
}


def test_t22_ratios_are_cut_to_the_backbones_layers() -> None:
    assert len(GOOD["compress_ratios"]) == 4
    assert ModelConfig.parse(GOOD).ratios == (0, 4, 128)


def test_t2_rope_base_and_yarn_are_chosen_per_layer() -> None:
    config = ModelConfig.parse(GOOD)
    assert [config.theta(i) for i in range(3)] == [10000.0, 160000.0, 160000.0]
    assert [config.yarn_of(i) for i in range(3)] == [
        None,
        Yarn(16, 256, 32, 1),
        Yarn(16, 256, 32, 1),
    ]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"compress_ratios": [0, 4]}, "compress_ratios"),
        ({"compress_ratios": [0, 4, 3]}, "3"),
        ({"compress_ratios": [0, 4, -4]}, "-4"),
        ({"o_groups": 3}, "o_groups must divide"),
        ({"index_head_dim": 96}, "index_head_dim"),
        ({"qk_rope_head_dim": 256}, "qk_rope_head_dim"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok"),
        ({"scoring_func": "sigmoid"}, "scoring_func"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "beta_fast"),
        ({"eos_token_id": None}, "eos_token_id"),
        ({"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}, "deepseek_v3"),
        ({"model_type": "deepseek_v41"}, "V4.1"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.quant_method"),
        ({"quantization_config": {"weight_block_size": [32, 32]}}, "weight_block_size"),
        ({"quantization_config": "fp8"}, "quantization_config"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
        ({"dspark_block_size": 5}, "lacks dspark_noise_token_id"),
        ({**DSPARK, "dspark_target_layer_ids": [3]}, "dspark_target_layer_ids"),
        ({**DSPARK, "dspark_noise_token_id": 128}, "dspark_noise_token_id 128"),
        ({**DSPARK, "dspark_block_size": 0}, "dspark_block_size"),
    ],
)
def test_an_impossible_config_is_refused_by_name(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelLoadError, match=words) as caught:
        ModelConfig.parse({**GOOD, **change})
    assert "\n" not in caught.value.message


def test_end_tokens_come_from_the_generation_config_first(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GOOD))
    assert ModelConfig.load(tmp_path).eos_token_ids == {1}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 7]}')
    assert ModelConfig.load(tmp_path).eos_token_ids == {5, 7}


def test_a_folder_without_or_with_a_broken_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="does not exist"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="JSON"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelLoadError, match="object"):
        ModelConfig.load(tmp_path)
