"""The model folder: whether all of it is there and is what it says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from cluster.doctor.finding import Finding
from model.config import ModelConfig
from model.plan import free_host_bytes
from model.shards import Shards
from penstock.chat import encoding_of
from penstock.chat.goldens import replay
from penstock.chat.prompts import SOURCE, read_prompts
from penstock.errors import PenstockError
from penstock.folder import model_folder
from penstock.tokenizer import open_tokenizer


def model(name: str) -> Iterator[Finding]:
    try:
        folder = model_folder(name)
        if folder is not None:
            yield weights(folder)
        tokenizer = open_tokenizer(name)
        if tokenizer is None:
            yield Finding(
                "model",
                f"the model '{name}' has no tokenizer.json",
                "put the release's tokenizer.json beside config.json; only `penstock logits` works "
                "without",
            )
            return
        yield Finding("model", f"model '{name}' with a vocabulary of {tokenizer.vocab_size}")
        if encoding_of(name, tokenizer) == "deepseek_v4":
            yield from _encoding(folder)
    except PenstockError as error:
        yield Finding("model", error.message, "name a model folder, `ledger` or `fake`")


def weights(folder: Path) -> Finding:
    """Configuration and headers; no tensor is read."""
    try:
        config = ModelConfig.load(folder)
        shards = Shards.open(folder)
    except PenstockError as error:
        fix = "fetch the folder again, whole: `hf download NAME --local-dir FOLDER`"
        return Finding("model", error.message, fix)
    size = sum(entry.size_bytes for entry in shards.entries.values())
    what = (
        f"{len(shards.entries)} tensors of {size / 2**20:,.0f} MiB, {config.layers} layers, "
        f"in {folder}"
    )
    free = free_host_bytes()
    if free is not None and size > free:
        fix = (
            f"only {free / 2**30:.1f} GiB of memory are free: use a larger machine, or cut it over "
            "several with --tensor-parallel-size (docs/parallel.md)"
        )
        return Finding("model", what, fix, fatal=False)
    return Finding("model", what)


def _encoding(folder: Path | None) -> Iterator[Finding]:
    """What the folder's `encoding/` gives, and whether its examples are what we write."""
    prompts = read_prompts(folder)
    yield Finding("encoding", f"chat encoding of DeepSeek-V4, {prompts.generation} generation")
    if prompts.tools is None or not prompts.efforts:
        yield Finding(
            "encoding",
            f"{SOURCE} of the model does not give all texts: tools or some reasoning efforts will "
            "be refused",
            "put the release's encoding folder beside config.json",
            fatal=False,
        )
    for golden in replay(folder, prompts) if folder is not None else ():
        if golden.fault:
            yield Finding("encoding", golden.fault, "serve a release whose encoding is known")
        else:
            what = f"{golden.name} encodes as the release does ({golden.mode})"
            yield Finding("encoding", what)
