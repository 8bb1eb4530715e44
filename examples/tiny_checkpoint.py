"""Write a tiny random checkpoint in exactly the format of the DeepSeek-V4 releases.

    python examples/tiny_checkpoint.py OUT [--like flash|pro] [--draft none|mtp|dspark] [--base]

FP8 linears with 128 x 128 scales, FP4 experts with 1 x 32 scales (FP8 ones with `--base`), bf16,
fp32 and int64 parts, sharded files with an index. `--plain` writes the same numbers as bf16 without
scales: a model that computes the same function.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from model.config import ModelConfig
from model.tensors import BASE, PLAIN, RELEASED, Expected, Kind, expected_tensors, scale_name

CONFIGS = Path(__file__).parent / "configs"
_TINY: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 256,
    "num_attention_heads": 8,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 128,
    "o_groups": 2,
    "o_lora_rank": 128,
    "sliding_window": 16,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "num_hash_layers": 1,
    "num_hidden_layers": 5,
    "max_position_embeddings": 65536,
}
# The first layers and the rhythm of the real schedules (1.2).
_RATIOS = {"flash": [0, 0, 4, 128, 4], "pro": [128, 128, 4, 128, 4]}
_PRO: dict[str, Any] = {"hidden_size": 384, "o_groups": 4, "routed_scaling_factor": 2.5}
_FP8_MAX, _FP4_MAX = 448.0, 6.0


def tiny_config(like: str = "flash", draft: str = "none", *, base: bool = False) -> dict[str, Any]:
    """A `config.json` like the release's, with small numbers."""
    real: dict[str, Any] = json.loads((CONFIGS / f"{like}.json").read_text())
    config = {**real, **_TINY, **(_PRO if like == "pro" else {})}
    ratios = _RATIOS[like]
    config["num_nextn_predict_layers"] = 0 if draft == "none" else 1
    config["compress_ratios"] = [*ratios, *[0] * {"none": 0, "mtp": 1, "dspark": 3}[draft]]
    if base:
        del config["expert_dtype"]
    if draft == "dspark":
        config |= {
            "dspark_block_size": 5,
            "dspark_noise_token_id": config["vocab_size"] - 1,
            "dspark_target_layer_ids": [2, 3, 4],
            "dspark_markov_rank": 32,
        }
    return config


def write_checkpoint(
    folder: Path | str,
    *,
    like: str = "flash",
    draft: str = "none",
    base: bool = False,
    plain: bool = False,
    seed: int = 0,
    shards: int = 2,
    tokenizer: Path | None = None,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Write the folder; `changes` are config keys. Equal arguments but for `plain` hold equal
    numbers.
    """
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    raw = {**tiny_config(like, draft, base=base), **(changes or {})}
    config = ModelConfig.parse(raw)
    precision = BASE if base else RELEASED
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, weight in expected_tensors(config, precision, drafts=True).items():
        tensors |= _stored(name, weight, config, generator, plain=plain)
    if plain:
        del raw["quantization_config"]
        raw.pop("expert_dtype", None)
        assert tensors.keys() == expected_tensors(config, PLAIN, drafts=True).keys()
    (root / "config.json").write_text(json.dumps(raw, indent=1, sort_keys=True))
    generation = {"bos_token_id": 0, "eos_token_id": 1, "do_sample": True, "temperature": 1.0}
    (root / "generation_config.json").write_text(json.dumps(generation, indent=1))
    if tokenizer is not None:
        shutil.copyfile(tokenizer, root / "tokenizer.json")
    _write_shards(root, tensors, shards)
    return root


def _write_shards(root: Path, tensors: dict[str, Tensor], shards: int) -> None:
    names = list(tensors)
    each = -(-len(names) // shards)
    where: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = names[shard * each : (shard + 1) * each]
        save_file({name: tensors[name] for name in part}, root / file)
        where |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (root / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _stored(
    name: str, weight: Expected, config: ModelConfig, generator: torch.Generator, *, plain: bool
) -> dict[str, Tensor]:
    """The file's tensors of one weight. Every term of the model is made to matter."""
    if weight.kind is Kind.INT64:
        rows = [
            torch.randperm(config.experts, generator=generator)[: config.active_experts]
            for _ in range(config.vocab_size)
        ]
        return {name: torch.stack(rows)}
    noise = torch.randn(weight.shape, generator=generator)
    if weight.kind is Kind.FP32:
        wide = weight.shape[-1]
        value = noise * wide**-0.5 if len(weight.shape) == 2 and "ape" not in name else noise
        value = 0.5 + noise.abs() if name.endswith("scale") else value
        return {name: value.to(torch.bfloat16).float()}
    if len(weight.shape) == 1:
        return {name: (1 + 0.2 * noise).to(torch.bfloat16)}
    value = noise * (1.0 if name == "embed.weight" else 1.5 * weight.shape[1] ** -0.5)
    match weight.kind:
        case Kind.FP8:
            codes, exponent, exact = quantise_fp8(value)
        case Kind.FP4:
            codes, exponent, exact = quantise_fp4(value)
        case _:
            return {name: value.to(torch.bfloat16)}
    if plain:
        return {name: exact.to(torch.bfloat16)}
    scales = (exponent + 127).to(torch.uint8).view(torch.float8_e8m0fnu)
    return {name: codes, scale_name(name): scales}


def _tiles(value: Tensor, rows: int, columns: int, largest: float) -> tuple[Tensor, Tensor]:
    """Exponents of each tile's scale (rounded up), and the same for every number."""
    high, wide = (-(-size // tile) for size, tile in zip(value.shape, (rows, columns), strict=True))
    missing = (0, wide * columns - value.shape[1], 0, high * rows - value.shape[0])
    padded = torch.nn.functional.pad(value, missing).view(high, rows, wide, columns)
    top = padded.abs().amax((1, 3)).clamp_min(2.0**-40).double()
    # top / largest = mantissa * 2^power with 0.5 <= mantissa < 1: 2^power is not below it.
    mantissa, power = torch.frexp(top / largest)
    exponent = power - (mantissa == 0.5).to(torch.int32)
    each = exponent.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return exponent, each[: value.shape[0], : value.shape[1]]


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, by the bits of a float."""
    return ((exponent + 127) << 23).view(torch.float32)


def quantise_fp8(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e4m3 codes [N, K], scale exponents [N / 128, K / 128], and the numbers."""
    exponent, each = _tiles(value, 128, 128, _FP8_MAX)
    codes = (value * _power(-each)).to(torch.float8_e4m3fn)
    return codes, exponent, codes.float() * _power(each)


def quantise_fp4(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e2m1 codes int8 [N, K / 2], scale exponents [N, K / 32], and the numbers."""
    exponent, each = _tiles(value, 1, 32, _FP4_MAX)
    levels = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    size = (value * _power(-each)).abs()
    code = torch.bucketize(size, (levels[1:] + levels[:-1]) / 2)
    signed = code + 8 * torch.signbit(value)
    packed = (signed[:, 0::2] | (signed[:, 1::2] << 4)).to(torch.uint8).view(torch.int8)
    exact = levels[code] * torch.where(torch.signbit(value), -1.0, 1.0) * _power(each)
    return packed, exponent, exact


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write")
    parser.add_argument("--like", choices=("flash", "pro"), default="flash")
    parser.add_argument("--draft", choices=("none", "mtp", "dspark"), default="none")
    parser.add_argument("--base", action="store_true", help="FP8 experts, as in *-Base")
    parser.add_argument("--plain", action="store_true", help="the same numbers as bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="a tokenizer.json to copy")
    given = vars(parser.parse_args())
    out = given.pop("out")
    torch.set_num_threads(1)
    write_checkpoint(out, **given)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
