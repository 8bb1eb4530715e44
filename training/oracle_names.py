"""From official tensor names to the module names of transformers, for the parity test."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

TOP = {
    "embed.weight": "model.embed_tokens.weight",
    "head.weight": "lm_head.weight",
    "norm.weight": "model.norm.weight",
    "hc_head_fn": "model.hc_head.hc_fn",
    "hc_head_base": "model.hc_head.hc_base",
    "hc_head_scale": "model.hc_head.hc_scale",
}
PARTS = (
    (r"^attn_norm", "input_layernorm"),
    (r"^ffn_norm", "post_attention_layernorm"),
    (r"^hc_(attn|ffn)_(\w+)", r"\1_hc.\2"),
    (r"^attn\.wq_a", "self_attn.q_a_proj"),
    (r"^attn\.q_norm", "self_attn.q_a_norm"),
    (r"^attn\.wq_b", "self_attn.q_b_proj"),
    (r"^attn\.wkv", "self_attn.kv_proj"),
    (r"^attn\.kv_norm", "self_attn.kv_norm"),
    (r"^attn\.wo_a", "self_attn.o_a_proj"),
    (r"^attn\.wo_b", "self_attn.o_b_proj"),
    (r"^attn\.attn_sink", "self_attn.sinks"),
    (r"^attn\.compressor", "self_attn.compressor"),
    (r"^attn\.indexer\.compressor", "self_attn.compressor.indexer"),
    (r"^attn\.indexer\.wq_b", "self_attn.compressor.indexer.q_b_proj"),
    (r"^attn\.indexer\.weights_proj", "self_attn.compressor.indexer.scorer.weights_proj"),
    (r"\.ape$", ".position_bias"),
    (r"(compressor|indexer)\.wkv", r"\1.kv_proj"),
    (r"(compressor|indexer)\.wgate", r"\1.gate_proj"),
    (r"(compressor|indexer)\.norm", r"\1.kv_norm"),
    (r"^ffn\.gate\.bias", "mlp.gate.e_score_correction_bias"),
    (r"^ffn\.gate", "mlp.gate"),
    (r"^ffn\.shared_experts\.w1", "mlp.shared_experts.gate_proj"),
    (r"^ffn\.shared_experts\.w3", "mlp.shared_experts.up_proj"),
    (r"^ffn\.shared_experts\.w2", "mlp.shared_experts.down_proj"),
)


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for `DeepseekV4ForCausalLM`; experts are stacked (w1 first, then w3)."""
    out: dict[str, Tensor] = {}
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    for name, value in state.items():
        if name in TOP:
            out[TOP[name]] = value
            continue
        layer, rest = name.removeprefix("layers.").split(".", 1)
        prefix = f"model.layers.{layer}."
        match = re.match(r"ffn\.experts\.(\d+)\.(w\d)\.weight", rest)
        if match:
            experts.setdefault(prefix, {})[int(match[1]), match[2]] = value
            continue
        for pattern, new in PARTS:
            rest = re.sub(pattern, new, rest)
        out[prefix + rest] = value
    for prefix, parts in experts.items():
        count = 1 + max(number for number, _ in parts)
        both = [torch.cat([parts[e, "w1"], parts[e, "w3"]]) for e in range(count)]
        out[prefix + "mlp.experts.gate_up_proj"] = torch.stack(both)
        down = [parts[e, "w2"] for e in range(count)]
        out[prefix + "mlp.experts.down_proj"] = torch.stack(down)
    return out
