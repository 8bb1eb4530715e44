"""A trained network as a release folder: official tensor names, bf16 where the release has bf16."""

from __future__ import annotations

import json
import pathlib

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from training import vocabulary
from training.config import NetworkConfig
from training.network import Network

FP32 = ("ape", "attn_sink", "hc_", "gate.bias")


def release_tensors(network: Network) -> dict[str, Tensor]:
    """The state dict in release precision; `tid2eid` stays int64."""
    out = {}
    for name, value in network.state_dict().items():
        keep = value.dtype == torch.int64 or any(part in name for part in FP32)
        out[name] = (value if keep else value.to(torch.bfloat16)).clone().contiguous()
    return out


def export(network: Network, folder: pathlib.Path) -> None:
    """Write config.json, generation_config.json, tokenizer.json and model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    stop = vocabulary.tokenizer().token_to_id(".")
    assert stop is not None, "the vocabulary has all bytes"
    config = network.cfg.release_keys(stop)
    generation = {"eos_token_id": stop, "pad_token_id": 0, "do_sample": False, "max_new_tokens": 8}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        (folder / name).write_text(text, "ascii")
    (folder / "tokenizer.json").write_text(vocabulary.as_json(), "ascii")
    save_file(release_tensors(network), folder / "model.safetensors")


def load(folder: pathlib.Path) -> Network:
    """The network of a folder that `export` wrote, in fp32."""
    keys = json.loads((folder / "config.json").read_text("ascii"))
    cfg = NetworkConfig(**{key: keys[key] for key in NetworkConfig.model_fields})
    network = Network(cfg)
    state = load_file(folder / "model.safetensors")
    network.load_state_dict(
        {name: v if v.dtype == torch.int64 else v.float() for name, v in state.items()}
    )
    return network.eval()
