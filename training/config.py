"""What a training run is told: one frozen tree read from YAML; unknown keys are refused."""

from __future__ import annotations

import hashlib
import json
import pathlib
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from penstock.errors import UsageError


class Frozen(BaseModel):
    """Base of all settings here."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class NetworkConfig(Frozen):
    """DeepSeek-V4 keys, spelled as in the released `config.json`."""

    vocab_size: int = 512
    hidden_size: int = 128
    num_hidden_layers: int = 4
    compress_ratios: tuple[int, ...] = (0, 0, 128, 4)
    num_attention_heads: int = 2
    num_key_value_heads: Literal[1] = 1
    head_dim: int = 128
    qk_rope_head_dim: int = 32
    q_lora_rank: int = 128
    o_groups: int = 2
    o_lora_rank: int = 128
    sliding_window: int = 16
    index_n_heads: int = 2
    index_head_dim: int = 64
    index_topk: int = 16
    n_routed_experts: int = 4
    n_shared_experts: Literal[1] = 1
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 128
    num_hash_layers: int = 1
    routed_scaling_factor: float = 1.0
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 100.0
    compress_rope_theta: float = 160000.0
    max_position_embeddings: int = 1048576

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(self.compress_ratios) != self.num_hidden_layers:
            raise ValueError("compress_ratios needs one entry per layer of num_hidden_layers")
        if self.num_attention_heads % self.o_groups:
            raise ValueError("num_attention_heads must be divisible by o_groups")
        if self.qk_rope_head_dim > min(self.head_dim, self.index_head_dim):
            raise ValueError("qk_rope_head_dim exceeds head_dim or index_head_dim")
        return self

    def release_keys(self, eos_token_id: int) -> dict[str, Any]:
        """The content of `config.json`."""
        return self.model_dump(mode="json") | {
            "model_type": "deepseek_v4",
            "architectures": ["DeepseekV4ForCausalLM"],
            "scoring_func": "sqrtsoftplus",
            "topk_method": "noaux_tc",
            "norm_topk_prob": True,
            "hidden_act": "silu",
            "attention_bias": False,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "num_nextn_predict_layers": 0,
            "bos_token_id": 1,
            "eos_token_id": eos_token_id,
            "pad_token_id": 0,
            "torch_dtype": "bfloat16",
            "penstock": {"chat": "ledger"},
        }


class Shape(Frozen):
    """One shape of a batch: `rows` rows of `tokens` tokens; `facts` and `questions` per row."""

    tokens: int
    rows: int
    facts: int
    questions: int


class Stage(Frozen):
    """A part of the schedule; learning rates run linearly from their start to their end."""

    name: str
    shapes: tuple[Shape, ...] = Field(min_length=1, description="used in turn, one per step")
    steps: int = Field(ge=1)
    lr_muon: tuple[float, float]
    lr_adamw: tuple[float, float]
    hold: float = Field(0.0, description="share of the stage before the rate starts to fall")
    warmup_steps: int = 0
    dense_steps: int = Field(0, description="steps without top-k selection at the start")
    bank_entries: int = Field(0, description="CSA entries of earlier steps kept as distractors")
    evidence: float = 0.5
    unknown: float = Field(0.1, description="weight of the mass on entries in UNKNOWN rows")
    first_weight: float = 4.0
    unknown_weight: float = 4.0
    digit_weight: float = Field(1.0, description="weight of digits 2-4 in the cross entropy")
    full_question: float = Field(0.3, description="share of questions with their full text")
    repeats: float = Field(0.0, description="share of codes made of two or three digits")
    near: float = Field(0.6, description="share of absent names one syllable from a known one")
    gapless: float = Field(0.0, description="share of steps without position gaps")
    quantized: float = Field(0.0, description="share of steps with FP8 KV and FP4 index rounding")


class Stabilisers(Frozen):
    """What keeps a run on its track; the experiments of docs/training.md switch each off."""

    sinkhorn: bool = Field(True, description="mHC; off: unconstrained hyper-connections")
    sinks: bool = Field(True, description="attention sinks; off: attention must go somewhere")
    balance_speed: float = Field(0.003, ge=0, description="of the routers' bias, a step")
    sequence_balance: float = Field(0.0, ge=0, description="weight of the sequence-wise loss")
    anticipatory: Literal["off", "spike", "on"] = Field(
        "off", description="routing indices of an older snapshot: never, after a spike, always"
    )
    lag: int = Field(8, ge=1, le=64, description="age of that snapshot in steps")
    spike: float = Field(2.0, gt=1, description="a loss so many times the recent median is one")
    anticipatory_steps: int = Field(50, ge=1, description="how long a spike switches it on")
    rollback_every: int = Field(10, ge=1, description="steps between states to roll back to")


class TrainingConfig(Frozen):
    """Everything `python -m training CONFIG.yaml --out DIR` needs."""

    seed: int = 1
    threads: int = 1
    sinkhorn_iters: int = Field(8, description="while training; serving and evaluation use 20")
    unanswerable: float = 0.35
    checkpoint_every_s: float = Field(240.0, gt=0)
    checkpoint_every_steps: int = Field(0, ge=0, description="besides; 0: by the clock alone")
    log_every: int = 25
    network: NetworkConfig = NetworkConfig()
    stabilisers: Stabilisers = Field(default_factory=lambda: Stabilisers.model_validate({}))
    optimizer: Literal["muon", "adamw"] = Field("muon", description="of the matrices")
    weight_decay: float = Field(0.0, ge=0, description="decoupled; the report has 0.1")
    stages: tuple[Stage, ...] = Field(min_length=1)

    @classmethod
    def read(cls, path: pathlib.Path) -> TrainingConfig:
        """Parse a YAML file. Raises `UsageError` that names the key."""
        try:
            content = yaml.safe_load(path.read_text("utf-8"))
        except OSError as error:
            raise UsageError(
                f"cannot read the configuration {path}: {error.strerror}; check the path"
            ) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UsageError(
                f"{path} is not YAML: {' '.join(str(error).split())}; training/configs has examples"
            ) from error
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"]) or "the file"
            unknown = first["type"] == "extra_forbidden"
            says = "no such setting" if unknown else first["msg"]
            raise UsageError(
                f"{path}: {key}: {says}; training/config.py lists every setting"
            ) from error

    def digest(self) -> str:
        """Of all that decides the result; a checkpoint is only taken up by the same."""
        aside = {"checkpoint_every_s", "checkpoint_every_steps"}
        text = json.dumps(self.model_dump(mode="json", exclude=aside), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()
