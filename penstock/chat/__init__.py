"""Conversations to token ids and answers back to messages. Pure rules per model family; no template
and no downloaded code is run. `docs/chat.md` says what is written how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from penstock.chat.deepseek_v4 import NEEDED, DeepSeekV4Chat
from penstock.chat.encoder import (
    AnswerForm,
    ChatEncoder,
    ChatOptions,
    Encoded,
    Segment,
)
from penstock.chat.goldens import check
from penstock.chat.messages import Message, ToolCall, read_messages, read_tools
from penstock.chat.prompts import read_prompts
from penstock.chat.text import LEDGER_REFUSAL, LedgerChat, PlainChat
from penstock.errors import ModelLoadError
from penstock.folder import model_folder, read_json
from penstock.tokenizer import Tokenizer

__all__ = [
    "AnswerForm",
    "ChatEncoder",
    "ChatOptions",
    "DeepSeekV4Chat",
    "Encoded",
    "LedgerChat",
    "Message",
    "PlainChat",
    "Segment",
    "ToolCall",
    "check_encoding",
    "encoding_of",
    "open_chat",
    "read_messages",
    "read_tools",
]


def _deepseek_v4(tokenizer: Tokenizer, folder: Path | None) -> ChatEncoder:
    prompts = read_prompts(folder)
    if folder is not None:
        check(folder, prompts)
    return DeepSeekV4Chat(tokenizer, prompts)


_ENCODERS: Mapping[str, Callable[[Tokenizer, Path | None], ChatEncoder]] = {
    "ledger": lambda tokenizer, folder: LedgerChat(tokenizer),
    "deepseek_v4": _deepseek_v4,
    "plain": lambda tokenizer, folder: PlainChat(tokenizer),
}


def encoding_of(model: str, tokenizer: Tokenizer) -> str:
    """Name of the encoding that the model's config.json asks for (`"penstock": {"chat": ...}`),
    else `deepseek_v4` if the tokenizer has its tokens, else `plain`.
    """
    folder = model_folder(model)
    name = _asked(folder)
    if name is None:
        has_controls = all(tokenizer.token_id(c) is not None for c in NEEDED)
        name = "deepseek_v4" if has_controls else "plain"
    if name not in _ENCODERS:
        raise ModelLoadError(
            f"config.json of '{model}' asks for the chat encoding '{name}'; known are "
            f"{', '.join(_ENCODERS)}"
        )
    return name


def open_chat(model: str, tokenizer: Tokenizer) -> ChatEncoder:
    """The model's encoder. Raises `ModelLoadError`, also if the examples of its encoding that the
    model folder brings are not what the encoder writes.
    """
    name, folder = encoding_of(model, tokenizer), model_folder(model)
    chat = _ENCODERS[name](tokenizer, folder)
    chat.refusal = _refusal(name, folder)
    return chat


def check_encoding(model: str) -> None:
    """As `open_chat`, before there is a tokenizer: for commands that start processes which could
    only fail on it.
    """
    folder = model_folder(model)
    if folder is not None and _asked(folder) in (None, "deepseek_v4"):
        check(folder, read_prompts(folder))


def _asked(folder: Path | None) -> str | None:
    return _ours(folder, "chat")


def _refusal(encoding: str, folder: Path | None) -> str | None:
    """As config.json says (`"penstock": {"refusal": ...}`); `ledger` and the fake have one."""
    own = LEDGER_REFUSAL if encoding == "ledger" or folder is None else None
    return _ours(folder, "refusal") or own


def _ours(folder: Path | None, key: str) -> str | None:
    ours = read_json(folder / "config.json").get("penstock", {}) if folder else {}
    value = ours.get(key) if isinstance(ours, dict) else None
    return None if value is None else str(value)
