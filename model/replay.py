"""Exact replay: how much of a prompt rebuilds the state that is missing at its end. Torch-free.

Blocks hold the compressed entries of every layer; a state holds what else the next token needs:
each layer's window and compressor rows. They follow from the last tokens alone. A layer's row of a
token depends on the windows of the layers below, so after a start with empty windows the first
layer is right at once, each further one a window (less one token) later. What is replayed before
that is wrong, and is kept out of the entries.
"""

from __future__ import annotations

from model.config import CSA_RATIO, ModelConfig
from model.drafts.plan import DraftPlan
from model.engine import EngineInfo
from penstock.blocks import BLOCK_TOKENS, STATE_ALIGN_TOKENS


def replay_tokens(config: ModelConfig, drafts: DraftPlan | None = None) -> int:
    """A window a layer, those of the draft module included: 5,504 at Flash's shape without drafts,
    7,808 at Pro's. A multiple of 128, rounded up.

    One layer needs `window` tokens to fill its own window; each further one `window - 1` before, so
    this is a little more than enough. Compressor rows are of at most 128 tokens and begin anew
    there.
    """
    layers = config.layers + (drafts.stages if drafts else 0)
    # The raw rows of a CSA window must be exact too, should a model's window be that short.
    tokens = max(config.window, CSA_RATIO) * layers
    return -(-tokens // STATE_ALIGN_TOKENS) * STATE_ALIGN_TOKENS


def check_replay(info: EngineInfo, start: int, *, position: int, blocks: int) -> None:
    """Raises ValueError for a replay that could not end exact."""
    if not info.replay_tokens:
        raise ValueError("this engine cannot replay")
    if position:
        raise ValueError(f"this sequence is at position {position} already")
    if start < 0 or start % STATE_ALIGN_TOKENS:
        raise ValueError(f"a replay starts at a multiple of {STATE_ALIGN_TOKENS}, not {start}")
    end = blocks * BLOCK_TOKENS
    if start and end - start < info.replay_tokens:
        raise ValueError(
            f"a replay of {end - start} tokens is too short to be exact; it takes "
            f"{info.replay_tokens}"
        )
