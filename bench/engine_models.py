"""Random models for the engine's benchmark, in the official folder format. Imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FLASH_SHAPE: dict[str, Any] = {
    "compress_ratios": [0, 0, 4, 128, 4, 128, 4],
    "vocab_size": 4096,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "head_dim": 128,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 256,
    "o_groups": 4,
    "o_lora_rank": 128,
    "sliding_window": 128,
    # The indexer's share of the work, at 32k about a tenth, is near Flash's own (1/20): with 16
    # heads of 64 it is a third, and its growth would be all that a long prompt shows.
    "index_n_heads": 8,
    "index_head_dim": 32,
    "index_topk": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 144,
    "num_hash_layers": 2,
}
_FIXED: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hc_eps": 1e-6,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "initializer_range": 0.02,
    "max_position_embeddings": 1 << 20,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
}
_FP32 = ("ape", "attn_sink", "hc_", "gate.bias")


def write_flash_shaped(folder: Path, *, seed: int, changes: dict[str, Any] | None = None) -> int:
    """A model of Flash's kinds of layers at 1/2500 of its size; returns its parameters (114 M
    unless changed). Equal seeds give equal models.
    """
    import torch
    from safetensors.torch import save_file

    from model.config import ModelConfig
    from model.tensors import expected_tensors

    shape = {**FLASH_SHAPE, **(changes or {})}
    layers = len(shape["compress_ratios"])
    folder.mkdir(parents=True, exist_ok=True)
    config = {**_FIXED, **shape, "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    parsed = ModelConfig.load(folder)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, expected in expected_tensors(parsed).items():
        if name.endswith("tid2eid"):
            order = torch.rand((parsed.vocab_size, parsed.experts), generator=generator)
            tensors[name] = order.topk(parsed.active_experts).indices
            continue
        value = torch.randn(expected.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.1 * value
        elif name.endswith("scale"):
            value = 0.5 + 0.2 * value.abs()
        elif value.dim() == 2 and "ape" not in name and "embed" not in name:
            value *= value.shape[1] ** -0.5
        tensors[name] = value if any(part in name for part in _FP32) else value.bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return sum(tensor.numel() for tensor in tensors.values())
