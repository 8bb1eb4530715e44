"""The training network is the same function as transformers' DeepSeek-V4 (fp32, top-k active)."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

torch = pytest.importorskip("torch")

if importlib.util.find_spec("transformers") is None:
    pytest.skip("the oracle needs transformers", allow_module_level=True)

from transformers import DeepseekV4Config, DeepseekV4ForCausalLM  # noqa: E402

from training.config import NetworkConfig  # noqa: E402
from training.network import Batch, Network  # noqa: E402
from training.oracle_names import to_transformers  # noqa: E402

KINDS = {
    0: "sliding_attention",
    4: "compressed_sparse_attention",
    128: "heavily_compressed_attention",
}


def randomize(network: Any, seed: int) -> None:
    """Make every term matter: sinks, position biases, hyper-connection biases, router bias."""
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Any) -> Any:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for name, p in network.named_parameters():
            if "norm" in name:
                p.copy_(1 + 0.2 * noise(p))
            elif name.endswith(("ape", "attn_sink", "base")):
                p.copy_(noise(p))
            elif name.endswith("scale"):
                p.copy_(0.5 + torch.rand(p.shape, generator=generator))
            else:
                p.copy_(0.15 * noise(p))
        for name, buffer in network.named_buffers():
            if name.endswith("bias"):
                buffer.copy_(0.3 * noise(buffer))


def oracle(cfg: NetworkConfig) -> Any:
    hf = DeepseekV4Config(
        **cfg.model_dump(
            exclude={
                "compress_ratios",
                "rope_theta",
                "compress_rope_theta",
                "moe_intermediate_size",
            }
        ),
        moe_intermediate_size=cfg.moe_intermediate_size,
        rope_theta=cfg.rope_theta,
        compress_rope_theta=cfg.compress_rope_theta,
        rope_scaling=None,
        layer_types=[KINDS[r] for r in cfg.compress_ratios],
        compress_rates={
            "compressed_sparse_attention": 4,
            "heavily_compressed_attention": 128,
        },
    )
    return DeepseekV4ForCausalLM(hf).eval().float()


@pytest.mark.parametrize("length", [1, 7, 130, 515])
@pytest.mark.parametrize("seed", [0, 1])
def test_logits_equal_the_transformers_oracle(length: int, seed: int) -> None:
    """32 index heads keep exact ties of the index score away; everything else is as shipped."""
    torch.manual_seed(seed)
    cfg = NetworkConfig(index_n_heads=32, swiglu_limit=0.5 if seed else 10.0)
    network = Network(cfg)
    randomize(network, seed)
    reference = oracle(cfg)
    missing = reference.load_state_dict(to_transformers(network.state_dict()), strict=False)
    assert not missing.unexpected_keys
    assert not missing.missing_keys
    tokens = torch.randint(0, cfg.vocab_size, (1, length))
    batch = Batch(tokens, torch.arange(length)[None], torch.tensor([length]), torch.arange(length))
    with torch.no_grad():
        ours, _ = network(batch)
        theirs = reference(tokens, use_cache=False).logits[0]
    worst = (ours - theirs).abs().max().item()
    print(f"length {length} seed {seed}: worst difference {worst:.2e}, std {theirs.std():.2f}")
    assert worst <= 1e-4
