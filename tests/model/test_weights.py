"""A folder that does not fit its config is refused in one sentence that names every tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import ModelConfig
from model.load import load_engine
from model.weights import load_weights
from penstock.errors import ModelLoadError
from tests.model import oracle

Tensors = dict[str, torch.Tensor]
Models = Callable[[str], oracle.OracleModel]


@pytest.fixture
def folder(model: Models, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model("heavy_last").folder, tmp_path / "model"))


def rewrite(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def refusal(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_weights(folder, ModelConfig.load(folder))
    print(caught.value.message)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_all_faults_are_named_in_one_sentence(folder: Path) -> None:
    def spoil(t: Tensors) -> None:
        del t["layers.1.attn.wkv.weight"]
        t["layers.0.attn.mystery.weight"] = torch.zeros(1)
        t["norm.weight"] = torch.zeros(3)
        t["layers.0.attn.attn_sink"] = torch.zeros(4, dtype=torch.int64)
        t["layers.0.ffn.experts.0.w1.weight"] = torch.zeros(64, 32, dtype=torch.int8)
        t["layers.0.attn.wq_a.weight"] = torch.zeros(32, 64).to(torch.float8_e4m3fn)

    rewrite(folder, spoil)
    message = refusal(folder)
    for part in (
        "layers.1.attn.wkv.weight is missing",
        "layers.0.attn.mystery.weight is unexpected",
        "norm.weight is [3], not [64]",
        "layers.0.attn.attn_sink is I64",
        "layers.0.ffn.experts.0.w1.weight is I8, not BF16 or F32",
        "layers.0.attn.wq_a.weight is F8_E4M3, not BF16 or F32",
    ):
        assert part in message
    assert "norm.weight is missing" not in message


def test_values_that_are_not_finite_are_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t["layers.0.attn.wkv.weight"].view(-1)[7:8].fill_(float("nan")))
    assert "layers.0.attn.wkv.weight has values that are not finite" in refusal(folder)


def test_a_hash_table_that_names_no_expert_is_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t["layers.0.ffn.gate.tid2eid"].view(-1)[:1].fill_(99))
    assert "tid2eid names experts outside 0..7" in refusal(folder)


def test_t10_the_router_bias_has_the_releases_name(folder: Path) -> None:
    def rename(t: Tensors) -> None:
        t["layers.1.ffn.gate.e_score_correction_bias"] = t.pop("layers.1.ffn.gate.bias")

    rewrite(folder, rename)
    assert "layers.1.ffn.gate.bias is missing" in refusal(folder)


def test_draft_tensors_that_the_config_does_not_name_are_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"mtp.0.norm.weight": torch.zeros(3)}))
    assert "mtp.0.norm.weight is unexpected because config.json names no draft" in refusal(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors is not a whole safetensors file" in refusal(folder)


def test_a_folder_without_tensors_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors file" in refusal(folder)


def test_shards_with_an_index_load_like_one_file(folder: Path) -> None:
    whole = load_weights(folder, ModelConfig.load(folder))
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    where = {name: file for file, part in shards.items() for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}))
    assert load_weights(folder, ModelConfig.load(folder)).digest == whole.digest
    index.unlink()
    assert load_weights(folder, ModelConfig.load(folder)).digest == whole.digest
    (folder / "b.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": where}))
    assert "b.safetensors" in refusal(folder)
    index.write_text("[]")
    assert "cannot be read as a tensor index" in refusal(folder)


def test_the_digest_follows_every_value(folder: Path) -> None:
    before = load_weights(folder, ModelConfig.load(folder)).digest
    rewrite(folder, lambda t: t["norm.weight"][:1].add_(1))
    assert load_weights(folder, ModelConfig.load(folder)).digest != before


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("kv_cache_dtype", "int8"),
        ("dtype", "float16"),
        ("numerics", "loose"),
        ("device", "cuda"),
        ("max_model_len", 5000),
    ],
)
def test_an_unknown_option_is_refused_by_name(folder: Path, option: str, value: object) -> None:
    with pytest.raises(ModelLoadError, match=option):
        load_engine(folder, **{option: value})


def test_other_safetensors_files_beside_the_model_are_not_the_model(tmp_path: Path) -> None:
    source = oracle.build("window_only", tmp_path / "model")
    save_file({"logits_1": torch.zeros(1)}, source.folder / "oracle.safetensors")
    load_engine(source.folder).close()
