"""No buffer grows with tokens x context (architecture.md, promise 5)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from model.cache import SequenceCache, cache_bytes
from model.config import ModelConfig
from model.engine import Segment
from model.load import load_engine
from tests.model import oracle

Models = Callable[[str], oracle.OracleModel]


class LargestTensor(TorchDispatchMode):
    """Records the storage of the largest floating tensor that any op made."""

    def __init__(self) -> None:
        super().__init__()
        self.floats = 0
        self.shape: tuple[int, ...] = ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                size = tensor.untyped_storage().nbytes() // 4
                if size > self.floats:
                    self.floats, self.shape = size, tuple(tensor.shape)
        return out


def test_no_float_buffer_grows_with_the_context(model: Models) -> None:
    """The largest buffer of a pass is set by the pass's rows; twice the context, the same
    buffer.
    """
    source = model("all_kinds")
    engine = load_engine(source.folder)
    largest = []
    for length in (2000, 4000):
        sequence = engine.open(length)
        with LargestTensor() as seen:
            engine.forward([Segment(sequence, source.tokens(length))])
        print(f"{length} tokens: largest float buffer {seen.floats} floats, {seen.shape}")
        largest.append(seen.floats)
    assert largest[0] == largest[1]
    # A pass has at most 1024 rows; 32 index heads of 128 channels are its widest activation.
    assert largest[0] <= 1024 * 32 * 128


def test_a_million_tokens_of_the_ledger_shape_fit_in_a_gibibyte(model: Models) -> None:
    config = ModelConfig.load(model("ledger_like").folder)
    price = cache_bytes(config, 1 << 20)
    print(f"{price / 2**20:.0f} MiB for a million tokens")
    assert price < 1 << 30


def test_the_price_is_what_the_cache_takes(model: Models) -> None:
    engine = load_engine(model("all_kinds").folder)
    sequence = engine.open(3000)
    assert isinstance(sequence, SequenceCache)
    held = sum(
        t.untyped_storage().nbytes()
        for layer in sequence.layers
        for t in (layer.window_WC, layer.entries_EC, layer.index_EC)
    )
    assert held <= engine.bytes_for(3000) <= held * 1.2
