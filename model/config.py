"""`ModelConfig`: an official `config.json`, checked and frozen (deepseek-v4.md 1.1, 1.2).
Torch-free.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from penstock.errors import ModelLoadError

CSA_RATIO = 4
_ALIGN_TOKENS = 128
_ARCHITECTURE = "DeepseekV4ForCausalLM"
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "qk_rope_head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "n_routed_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "routed_scaling_factor",
    "num_hash_layers",
    "swiglu_limit",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "rms_norm_eps",
    "rope_theta",
    "compress_rope_theta",
    "compress_ratios",
    "max_position_embeddings",
)
_QUANTISATION = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
    "activation_scheme": "dynamic",
}
_DSPARK = (
    "dspark_block_size",
    "dspark_noise_token_id",
    "dspark_target_layer_ids",
    "dspark_markov_rank",
)
_FIXED = {
    "n_shared_experts": 1,
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Yarn:
    """YaRN interpolation of RoPE frequencies; no mscale anywhere (T3)."""

    factor: float
    original: float
    beta_fast: float
    beta_slow: float


class DraftKind(StrEnum):
    MTP = "mtp"
    DSPARK = "dspark"


@dataclass(frozen=True)
class DraftConfig:
    """The draft module under `mtp.*` (1.6, 1.7). `dspark_*` keys decide which it is (T21)."""

    kind: DraftKind
    stages: int
    """Blocks `mtp.0` .. `mtp.{stages - 1}`."""
    block_size: int = 0
    """DSpark: positions drafted at once."""
    noise_token: int = 0
    target_layers: tuple[int, ...] = ()
    """DSpark: backbone layers whose hidden states feed `main_proj`, in that order."""
    markov_rank: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """DeepSeek keys under the report's names; `ratios` is cut to the backbone's layers (T22)."""

    vocab_size: int
    hidden: int
    layers: int
    heads: int
    head_dim: int
    rope_dim: int
    q_rank: int
    o_groups: int
    o_rank: int
    window: int
    index_heads: int
    index_dim: int
    index_topk: int
    experts: int
    active_experts: int
    expert_width: int
    route_scale: float
    hash_layers: int
    swiglu_limit: float
    streams: int
    sinkhorn_iters: int
    hc_eps: float
    norm_eps: float
    rope_theta: float
    compress_rope_theta: float
    yarn: Yarn | None
    ratios: tuple[int, ...]
    max_positions: int
    eos_token_ids: frozenset[int]
    draft: DraftConfig | None = None

    @property
    def nope_dim(self) -> int:
        return self.head_dim - self.rope_dim

    @property
    def last_csa_layer(self) -> int | None:
        """The layer whose selection is reported as evidence."""
        found = [i for i, ratio in enumerate(self.ratios) if ratio == CSA_RATIO]
        return found[-1] if found else None

    def theta(self, layer: int) -> float:
        """Base of the whole layer: q, window, entries, indexer, de-rotation (T2)."""
        return self.compress_rope_theta if self.ratios[layer] else self.rope_theta

    def yarn_of(self, layer: int) -> Yarn | None:
        """Layers without compression have plain RoPE (2.2)."""
        return self.yarn if self.ratios[layer] else None

    def facts(self) -> dict[str, Any]:
        """Plain values for the fingerprint."""
        facts = asdict(self)
        # Neither the admitted length nor end tokens nor drafts change a stored number.
        del facts["eos_token_ids"], facts["max_positions"], facts["draft"]
        return facts

    @classmethod
    def load(cls, folder: Path | str) -> ModelConfig:
        """Read `config.json` (and `generation_config.json` for the end tokens) of a model
        folder.
        """
        path = Path(folder)
        raw = _read_json(path / "config.json", required=True)
        generation = _read_json(path / "generation_config.json", required=False)
        eos = generation.get("eos_token_id", raw.get("eos_token_id"))
        return cls.parse({**raw, "eos_token_id": eos})

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> ModelConfig:
        _check_architecture(raw)
        missing = [key for key in _REQUIRED if raw.get(key) is None]
        if missing:
            raise ModelLoadError(f"config.json lacks {', '.join(missing)}")
        for key, value in _FIXED.items():
            if raw.get(key, value) != value:
                raise ModelLoadError(
                    f"config.json has {key} = {raw[key]!r}; this engine supports only {value!r}"
                )
        _check_quantisation(raw.get("quantization_config"))
        config = cls(
            vocab_size=_integer(raw, "vocab_size"),
            hidden=_integer(raw, "hidden_size"),
            layers=_integer(raw, "num_hidden_layers"),
            heads=_integer(raw, "num_attention_heads"),
            head_dim=_integer(raw, "head_dim"),
            rope_dim=_integer(raw, "qk_rope_head_dim"),
            q_rank=_integer(raw, "q_lora_rank"),
            o_groups=_integer(raw, "o_groups"),
            o_rank=_integer(raw, "o_lora_rank"),
            window=_integer(raw, "sliding_window"),
            index_heads=_integer(raw, "index_n_heads"),
            index_dim=_integer(raw, "index_head_dim"),
            index_topk=_integer(raw, "index_topk"),
            experts=_integer(raw, "n_routed_experts"),
            active_experts=_integer(raw, "num_experts_per_tok"),
            expert_width=_integer(raw, "moe_intermediate_size"),
            route_scale=_number(raw, "routed_scaling_factor"),
            hash_layers=_integer(raw, "num_hash_layers", least=0),
            swiglu_limit=_number(raw, "swiglu_limit"),
            streams=_integer(raw, "hc_mult", least=2),
            sinkhorn_iters=_integer(raw, "hc_sinkhorn_iters"),
            hc_eps=_number(raw, "hc_eps"),
            norm_eps=_number(raw, "rms_norm_eps"),
            rope_theta=_number(raw, "rope_theta"),
            compress_rope_theta=_number(raw, "compress_rope_theta"),
            yarn=_yarn(raw.get("rope_scaling")),
            ratios=_ratios(raw),
            max_positions=_integer(raw, "max_position_embeddings"),
            eos_token_ids=_eos(raw.get("eos_token_id")),
            draft=_draft(raw),
        )
        config._check()
        return config

    def _check(self) -> None:
        """Relations between keys; each sentence names both."""
        problems = {
            "qk_rope_head_dim must be even": self.rope_dim % 2,
            "qk_rope_head_dim must be at most head_dim": self.rope_dim > self.head_dim,
            "qk_rope_head_dim must be at most index_head_dim": (
                CSA_RATIO in self.ratios and self.rope_dim > self.index_dim
            ),
            "index_head_dim must be a power of two of at least 32": (
                self.index_dim < 32 or self.index_dim & (self.index_dim - 1)
            ),
            "o_groups must divide num_attention_heads": self.heads % self.o_groups,
            "num_experts_per_tok must be at most n_routed_experts": (
                self.active_experts > self.experts
            ),
            "num_hash_layers must be at most num_hidden_layers": self.hash_layers > self.layers,
        }
        wrong = [text for text, bad in problems.items() if bad]
        if wrong:
            raise ModelLoadError(f"config.json is impossible: {'; '.join(wrong)}")


def _check_architecture(raw: dict[str, Any]) -> None:
    kind = str(raw.get("model_type", ""))
    named = raw.get("architectures") or [_ARCHITECTURE]
    if kind.startswith("deepseek_v41") or any("V41" in str(name) for name in named):
        raise ModelLoadError(
            "DeepSeek-V4.1 is another architecture (CSA2, Engram, single-pass mHC) and is not "
            "supported yet; use a DeepSeek-V4 checkpoint"
        )
    if kind != "deepseek_v4" or _ARCHITECTURE not in named:
        raise ModelLoadError(
            f"unsupported architecture {named!r} with model_type {kind!r}; "
            f"this engine serves {_ARCHITECTURE} (deepseek_v4)"
        )


def _check_quantisation(given: Any) -> None:
    """Formats are found in the tensors; this only refuses a scheme that we would misread (5.1)."""
    if given is None:
        return
    if not isinstance(given, dict):
        raise ModelLoadError(f"config.json has quantization_config {given!r}; it must be an object")
    for key, value in _QUANTISATION.items():
        if given.get(key, value) != value:
            raise ModelLoadError(
                f"config.json has quantization_config.{key} = {given[key]!r}; this engine reads "
                f"only {value!r}"
            )


def _draft(raw: dict[str, Any]) -> DraftConfig | None:
    """0731 and 0813 keep num_nextn_predict_layers 1 although `mtp.*` is DSpark (T21)."""
    given = [key for key in _DSPARK if raw.get(key) is not None]
    layers = raw["num_hidden_layers"]
    if not given:
        stages = _integer(
            {"num_nextn_predict_layers": 0} | raw, "num_nextn_predict_layers", least=0
        )
        return DraftConfig(DraftKind.MTP, stages) if stages else None
    if lacking := [key for key in _DSPARK if key not in given]:
        raise ModelLoadError(f"config.json has {given[0]} but lacks {', '.join(lacking)}")
    targets = raw["dspark_target_layer_ids"]
    known = isinstance(targets, list) and all(isinstance(i, int) for i in targets)
    if not known or not targets or not all(0 <= i < layers for i in targets):
        raise ModelLoadError(
            f"config.json has dspark_target_layer_ids {targets!r}; it must list layers of "
            f"0..{layers - 1}"
        )
    noise = _integer(raw, "dspark_noise_token_id", least=0)
    if noise >= raw["vocab_size"]:
        raise ModelLoadError(
            f"config.json has dspark_noise_token_id {noise} outside the vocab_size "
            f"{raw['vocab_size']}"
        )
    # config.json does not name the number of stages; each has an entry after the backbone's.
    stages = raw.get("n_mtp_layers", len(raw["compress_ratios"]) - layers)
    return DraftConfig(
        DraftKind.DSPARK,
        _integer({"n_mtp_layers": stages}, "n_mtp_layers"),
        block_size=_integer(raw, "dspark_block_size"),
        noise_token=noise,
        target_layers=tuple(targets),
        markov_rank=_integer(raw, "dspark_markov_rank"),
    )


def _integer(raw: dict[str, Any], key: str, *, least: int = 1) -> int:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ModelLoadError(
            f"config.json has {key} = {value!r}; it must be an integer of at least {least}"
        )
    return value


def _number(raw: dict[str, Any], key: str) -> float:
    value = raw[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e30:
        raise ModelLoadError(
            f"config.json has {key} = {value!r}; it must be a number of at least 0"
        )
    return float(value)


def _ratios(raw: dict[str, Any]) -> tuple[int, ...]:
    ratios, layers = raw["compress_ratios"], raw["num_hidden_layers"]
    if not isinstance(ratios, list) or len(ratios) < layers:
        raise ModelLoadError(
            f"config.json has compress_ratios {ratios!r} for num_hidden_layers {layers}; "
            "it must list at least one ratio a layer"
        )
    for ratio in ratios[:layers]:
        known = type(ratio) is int and (ratio == 0 or (ratio > 0 and _ALIGN_TOKENS % ratio == 0))
        if not known:
            raise ModelLoadError(
                f"config.json has compress ratio {ratio!r}; a ratio is 0 (window only), 4 (CSA) "
                f"or another divisor of {_ALIGN_TOKENS} (HCA)"
            )
    return tuple(ratios[:layers])


def _yarn(raw: Any) -> Yarn | None:
    if raw is None:
        return None
    kind = raw.get("type", raw.get("rope_type")) if isinstance(raw, dict) else None
    if kind != "yarn":
        raise ModelLoadError(f"config.json has rope_scaling {raw!r}; it must be null or type yarn")
    keys = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    lacking = [key for key in keys if not isinstance(raw.get(key), int | float) or raw[key] <= 0]
    if lacking:
        raise ModelLoadError(f"config.json: rope_scaling needs a positive {', '.join(lacking)}")
    return Yarn(*(float(raw[key]) for key in keys))


def _eos(value: Any) -> frozenset[int]:
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(token, int) and token >= 0 for token in found):
        raise ModelLoadError(f"eos_token_id is {value!r}; it must be a token id or a list of them")
    return frozenset(found)


def _read_json(path: Path, *, required: bool) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if required:
            raise ModelLoadError(f"{path} does not exist; a model folder needs it") from None
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(data, dict):
        raise ModelLoadError(f"{path} must hold a JSON object")
    return data
