"""MTP and DSpark from transformers' DeepseekV4 modules and the formulas of deepseek-v4.md 1.6, 1.7.

transformers has no drafts; its window-only decoder layer, hyper-connection head and norms are
independent of ours. Everything is computed from the whole context each time: no cache.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from tests.model import oracle

INNER = {ours: theirs for theirs, ours in oracle._LAYER_NAMES.items()}


class DraftOracle:
    """`source` is the backbone's oracle, `folder` the checkpoint with the draft module."""

    def __init__(self, source: oracle.OracleModel, folder: Path) -> None:
        from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

        self.raw = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "model.safetensors")
        self.model = source.reference
        config = copy.deepcopy(self.model.config)
        config.layer_types = ["sliding_attention"]
        config.mlp_layer_types = ["moe"]
        config._attn_implementation = "eager"
        self.head_weight = tensors["head.weight"].float()
        stages = len(self.raw["compress_ratios"]) - self.raw["num_hidden_layers"]
        self.layers = []
        for stage in range(stages):
            layer = hf.DeepseekV4DecoderLayer(config, 0).eval().float()
            _load(layer, tensors, f"mtp.{stage}.", config.n_routed_experts)
            self.layers.append(layer)
        self.head = hf.DeepseekV4HyperHead(config)
        last = f"mtp.{stages - 1}."
        for part in ("fn", "base", "scale"):
            getattr(self.head, f"hc_{part}").data = tensors[f"{last}hc_head_{part}"]
        self.own = {
            name.removeprefix("mtp."): value.float()
            for name, value in tensors.items()
            if name.startswith("mtp.")
        }
        self.last = f"{stages - 1}."
        self.eps = self.raw["rms_norm_eps"]
        self.window = self.raw["sliding_window"]
        self.rotate = hf.apply_rotary_pos_emb

    @torch.no_grad()
    def streams(self, tokens: list[int]) -> list[Tensor]:
        """Output [T, S, D] of every backbone layer."""
        found: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda _m, _i, out: found.append(out[0].float()))
            for layer in self.model.model.layers
        ]
        self.model(torch.tensor([tokens]), use_cache=False)
        for hook in hooks:
            hook.remove()
        return found

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.own[name]

    def embed(self, tokens: list[int]) -> Tensor:
        return self.model.model.embed_tokens(torch.tensor(tokens)).float()

    def positions(self, where: Tensor) -> dict[str, Any]:
        x = torch.zeros(1)
        main = self.model.model.rotary_emb(x, position_ids=where[None], layer_type="main")
        return {"position_embeddings": {"main": main}, "position_ids": where[None]}

    @torch.no_grad()
    def mtp(self, context: list[int], drafts: list[int]) -> Tensor:
        """[1 + len(drafts) ..., V]: logits after `context` (whose last token is the pending one)
        and after each draft but the last, each computed anew over the whole sequence.
        """
        x = self.streams(context[:-1])[-1]
        rows = []
        for count in range(len(drafts)):
            tokens = [*context[1:], *drafts[:count]]
            e = self.norm(self.embed(tokens), "0.enorm.weight") @ self.own["0.e_proj.weight"].T
            h = self.norm(x, "0.hnorm.weight") @ self.own["0.h_proj.weight"].T
            where = torch.arange(len(tokens))
            distance = where[:, None] - where
            visible = (distance >= 0) & (distance < self.window)
            mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
            out = self.layers[0](
                (e[:, None] + h)[None],
                input_ids=torch.tensor([tokens]),
                attention_mask=mask[None, None],
                past_key_values=None,
                **self.positions(where),
            )[0]
            rows.append(self.speak(out[-1:])[0])
            # The next row reads this one's output in the place of the backbone's.
            x = torch.cat((x, out[-1:]))
        return torch.stack(rows)

    def speak(self, streams: Tensor) -> Tensor:
        x = self.head(streams[None])[0]
        return self.norm(x, self.last + "norm.weight") @ self.head_weight.T

    @torch.no_grad()
    def dspark(self, context: list[int], drafts: list[int]) -> tuple[Tensor, Tensor]:
        """Logits [n, V] that each of `drafts` is drawn from, and the head's confidence [n]."""
        *past, pending = context
        layers = self.streams(past)
        targets = self.raw["dspark_target_layer_ids"]
        wide = torch.cat([layers[i].mean(1) for i in targets], -1)
        feature = self.norm(wide @ self.own["0.main_proj.weight"].T, "0.main_norm.weight")
        start = max(len(past) - self.window, 0)
        before = self.positions(torch.arange(start, len(past)))
        size = self.raw["dspark_block_size"]
        tokens = [pending] + [self.raw["dspark_noise_token_id"]] * (size - 1)
        x = self.embed(tokens)[:, None].repeat(1, self.raw["hc_mult"], 1)[None]
        for layer in self.layers:
            attn = layer.self_attn
            keys = attn.kv_norm(attn.kv_proj(feature[None, start:]))[:, None]
            keys = self.rotate(keys, *before["position_embeddings"]["main"])
            x = layer(
                x,
                input_ids=torch.tensor([tokens]),
                attention_mask=None,
                past_key_values=_Before(keys),
                **self.positions(torch.arange(len(past), len(past) + size)),
            )
        base = self.speak(x[0])
        flat = self.head(x)[0]
        rows, confidence = [], []
        for index, token in enumerate([pending, *drafts[:-1]]):
            markov = self.own[self.last + "markov_head.markov_w1.weight"][token]
            bias = self.own[self.last + "markov_head.markov_w2.weight"] @ markov
            rows.append(base[index] + bias)
            joined = torch.cat((flat[index], markov))
            weight = self.own[self.last + "confidence_head.proj.weight"][0]
            confidence.append(torch.sigmoid(F.linear(joined, weight[None]))[0])
        return torch.stack(rows), torch.stack(confidence)


class _Before:
    """A "cache" that puts given keys before a layer's own."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    def update(self, kv: Tensor, _values: Tensor, _layer: int) -> tuple[Tensor, Tensor]:
        both = torch.cat((self.keys, kv), 2)
        return both, both


def _load(layer: Any, tensors: dict[str, Tensor], prefix: str, experts: int) -> None:
    state = {}
    for name, value in tensors.items():
        if name.startswith(prefix) and name.removeprefix(prefix) in INNER:
            state[INNER[name.removeprefix(prefix)]] = value.float()
    part = prefix + "ffn.experts."
    both = [
        torch.cat([tensors[f"{part}{e}.w{w}.weight"].float() for w in (1, 3)])
        for e in range(experts)
    ]
    state["mlp.experts.gate_up_proj"] = torch.stack(both)
    down = [tensors[f"{part}{e}.w2.weight"].float() for e in range(experts)]
    state["mlp.experts.down_proj"] = torch.stack(down)
    missing, unexpected = layer.load_state_dict(state, strict=False)
    assert not unexpected and not missing, (missing, unexpected)
