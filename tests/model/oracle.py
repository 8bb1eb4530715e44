"""Tiny random models in the official folder format, with logits from transformers as the oracle.

All rounding is off in the oracle: compare with `kv_cache_dtype="fp32"`, `dtype="float32"`. 32 index
heads keep exact score ties away (deepseek-v4.md 12). Every weight is bf16-representable, so the
bf16 files lose nothing.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

KINDS = {0: "sliding_attention", 4: "compressed_sparse_attention"}
HEAVY = "heavily_compressed_attention"

_BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 128,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "sliding_window": 8,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "index_topk": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "num_hash_layers": 1,
    "routed_scaling_factor": 1.5,
    "swiglu_limit": 10.0,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 256,
        "beta_fast": 32,
        "beta_slow": 1,
    },
}
_OFFICIAL: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "architectures": ["DeepseekV4ForCausalLM"],
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "num_nextn_predict_layers": 0,
    "torch_dtype": "bfloat16",
}

MODELS: dict[str, dict[str, Any]] = {
    "all_kinds": {"ratios": [0, 4, 8, 4], "num_hash_layers": 2},
    "heavy_last": {"ratios": [4, 16], "sliding_window": 16, "swiglu_limit": 0.3},
    "pro_like": {
        "ratios": [8, 8, 4],
        "hidden_size": 96,
        "num_attention_heads": 8,
        "o_groups": 4,
        "head_dim": 96,
        "qk_rope_head_dim": 32,
        "num_experts_per_tok": 3,
        "routed_scaling_factor": 2.5,
        "num_hash_layers": 0,
        "index_topk": 16,
    },
    "wide_window": {"ratios": [0, 16, 4], "sliding_window": 128, "vocab_size": 320},
    "odd_window": {"ratios": [4, 8], "sliding_window": 24, "index_topk": 24, "q_lora_rank": 48},
    "window_only": {"ratios": [0, 0], "sliding_window": 16, "rope_scaling": None},
    "ledger_like": {
        "ratios": [0, 0, 128, 4],
        "hidden_size": 128,
        "num_attention_heads": 2,
        "o_groups": 1,
        "sliding_window": 16,
        "index_topk": 16,
        "n_routed_experts": 4,
        "moe_intermediate_size": 128,
        "num_hash_layers": 0,
    },
}

_LAYER_NAMES = {
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": ("attn.indexer.weights_proj.weight"),
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
}
for _theirs, _ours in (("compressor", "compressor"), ("compressor.indexer", "indexer.compressor")):
    _LAYER_NAMES |= {
        f"self_attn.{_theirs}.position_bias": f"attn.{_ours}.ape",
        f"self_attn.{_theirs}.kv_proj.weight": f"attn.{_ours}.wkv.weight",
        f"self_attn.{_theirs}.gate_proj.weight": f"attn.{_ours}.wgate.weight",
        f"self_attn.{_theirs}.kv_norm.weight": f"attn.{_ours}.norm.weight",
    }
for _part in ("attn", "ffn"):
    _LAYER_NAMES |= {f"{_part}_hc.{x}": f"hc_{_part}_{x}" for x in ("fn", "base", "scale")}
_TOP_NAMES = {
    "model.embed_tokens.weight": "embed.weight",
    "lm_head.weight": "head.weight",
    "model.norm.weight": "norm.weight",
    **{f"model.hc_head.hc_{x}": f"hc_head_{x}" for x in ("fn", "base", "scale")},
}


@dataclass(frozen=True)
class Watched:
    """One full forward of the oracle with its choices laid open."""

    logits_LV: torch.Tensor
    margin_L: torch.Tensor
    """Per position: the smallest gap between the last chosen and the first refused candidate over
    all indexers and routers, inf where nothing was refused. Below the noise of fp32 (about 1e-6)
    two right implementations may choose differently.
    """
    scores: dict[int, torch.Tensor]
    """Per CSA layer: index scores [L, E], -inf where an entry is not visible."""
    mass: dict[int, torch.Tensor]
    """Per CSA layer: attention probability of each entry, averaged over heads [L, E]."""


@dataclass(frozen=True)
class OracleModel:
    """A model folder and the transformers model that it was written from."""

    folder: Path
    vocab_size: int
    reference: Any

    def tokens(self, length: int, seed: int = 0) -> list[int]:
        rng = random.Random(1000 * length + seed)
        return [rng.randrange(self.vocab_size) for _ in range(length)]

    def logits(self, tokens: list[int]) -> torch.Tensor:
        """[L, V] from one full forward."""
        with torch.no_grad():
            return self.reference(torch.tensor([tokens]), use_cache=False).logits[0].float()

    def watched(self, tokens: list[int]) -> Watched:
        """Logits, and how close each choice of the forward came to being another one."""
        return _watch(self.reference, tokens)


def official_config(changes: dict[str, Any]) -> dict[str, Any]:
    """A `config.json`; `ratios` in `changes` lists the backbone's layers (one draft layer is
    added).
    """
    rest = {key: value for key, value in changes.items() if key != "ratios"}
    ratios = changes["ratios"]
    named = {"num_hidden_layers": len(ratios), "compress_ratios": [*ratios, 0]}
    return {**_BASE, **_OFFICIAL, **named, **rest}


def build(name: str, folder: Path, *, seed: int = 0) -> OracleModel:
    """Write model `name` of `MODELS` to `folder`."""
    return build_changed(MODELS[name], folder, seed=seed)


def build_changed(wanted: dict[str, Any], folder: Path, *, seed: int = 0) -> OracleModel:
    """Write the model whose config differs from the base by `wanted` (`ratios` and other keys)."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    changes = dict(wanted)
    ratios = changes.pop("ratios")
    shared = {**_BASE, **changes, "num_hidden_layers": len(ratios)}
    heavy = next((r for r in ratios if r not in KINDS), 8)
    hf = DeepseekV4Config(
        **shared,
        layer_types=[KINDS.get(ratio, HEAVY) for ratio in ratios],
        compress_rates={KINDS[4]: 4, HEAVY: heavy},
    )
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(hf).eval().float()
    _randomise(model, hf)
    folder.mkdir(parents=True, exist_ok=True)
    config = official_config(wanted)
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    save_file(official_tensors(model.state_dict()), folder / "model.safetensors")
    return OracleModel(folder, shared["vocab_size"], model)


@torch.no_grad()
def _randomise(model: Any, hf: Any) -> None:
    """Zeros of the stock init (sinks, ape, biases) would hide mistakes: make every term matter."""
    for name, value in model.named_parameters():
        if "norm" in name:
            value.copy_(1 + 0.2 * torch.randn_like(value))
        elif "position_bias" in name or "sinks" in name or name.endswith("base"):
            value.normal_()
        elif name.endswith("scale"):
            value.copy_(0.5 + torch.rand_like(value))
        else:
            value.normal_(std=0.15)
        value.copy_(value.to(torch.bfloat16).float())
    for name, value in model.named_buffers():
        if "tid2eid" in name:
            picks = [
                torch.randperm(hf.n_routed_experts)[: hf.num_experts_per_tok]
                for _ in range(hf.vocab_size)
            ]
            value.copy_(torch.stack(picks))
        elif "e_score_correction_bias" in name:
            value.normal_(std=0.3)
            value.copy_(value.to(torch.bfloat16).float())


def official_tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State of a transformers model under the release's names and types."""
    out: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if name in _TOP_NAMES:
            out[_TOP_NAMES[name]] = value
            continue
        layer, rest = name.removeprefix("model.layers.").split(".", 1)
        prefix = f"layers.{layer}."
        if rest == "mlp.experts.gate_up_proj":
            for expert, both in enumerate(value):
                w1, w3 = both.chunk(2)
                out[f"{prefix}ffn.experts.{expert}.w1.weight"] = w1
                out[f"{prefix}ffn.experts.{expert}.w3.weight"] = w3
        elif rest == "mlp.experts.down_proj":
            for expert, w2 in enumerate(value):
                out[f"{prefix}ffn.experts.{expert}.w2.weight"] = w2
        else:
            out[prefix + _LAYER_NAMES[rest]] = value
    return {name: _stored(name, value) for name, value in out.items()}


def _stored(name: str, value: torch.Tensor) -> torch.Tensor:
    fp32 = any(part in name for part in ("ape", "attn_sink", "hc_", "gate.bias"))
    kept = value if fp32 or not value.is_floating_point() else value.to(torch.bfloat16)
    return kept.clone().contiguous()


def _watch(model: Any, tokens: list[int]) -> Watched:
    """Hooks on the scorers and routers; `output_attentions` for the masses."""
    length = len(tokens)
    margin = torch.full((length,), float("inf"))
    scores: dict[int, torch.Tensor] = {}
    hooks = []

    def gap(candidates: torch.Tensor, k: int) -> None:
        if candidates.shape[1] > k:
            best = candidates.topk(k + 1, dim=1).values
            edge = best[:, k - 1] - best[:, k]
            # -inf - -inf: fewer than k candidates are visible, nothing was refused.
            torch.minimum(margin, edge.nan_to_num(nan=float("inf")), out=margin)

    def scored(layer: int, k: int) -> Any:
        def hook(_module: Any, _inputs: Any, out: torch.Tensor) -> None:
            visible = (torch.arange(length) + 1) // 4
            hidden = torch.arange(out.shape[-1]) >= visible[:, None]
            scores[layer] = out[0].float().masked_fill(hidden, float("-inf"))
            gap(scores[layer], k)

        return hook

    def routed(module: Any, _inputs: Any, out: Any) -> None:
        gap(module.score_fn(out[0]).float() + module.e_score_correction_bias, module.top_k)

    for layer, block in enumerate(model.model.layers):
        indexer = getattr(block.self_attn.compressor, "indexer", None)
        if indexer is not None:
            hook = scored(layer, indexer.index_topk)
            hooks.append(indexer.scorer.register_forward_hook(hook))
        if not block.mlp.is_hash:
            hooks.append(block.mlp.gate.register_forward_hook(routed))
    try:
        with torch.no_grad():
            out = model(torch.tensor([tokens]), use_cache=False, output_attentions=True)
    finally:
        for hook in hooks:
            hook.remove()
    mass = {layer: out.attentions[layer][0].mean(0)[:, length:].float() for layer in scores}
    return Watched(out.logits[0].float(), margin, scores, mass)
