"""A checkpoint's own examples of its prompt encoding, replayed with ours.

A release carries `encoding/tests/test_input_N.json` (a list of messages, or an object with
`messages` and `tools`) beside `test_output_N.txt`, the exact prompt. Only the files are read; the
release's code is not run. An input does not say in which mode it is meant (the release's test
script does), so it counts as replayed if one of the modes gives the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from penstock.chat.deepseek_v4 import Rules, segments
from penstock.chat.messages import ALL_ROLES, Message, read_messages, read_tools
from penstock.chat.prompts import Prompts
from penstock.errors import InvalidRequestError, ModelLoadError

_LARGEST_BYTES = 4 << 20


@dataclass(frozen=True)
class Golden:
    """One example. `fault` says in a sentence why it is not what we write; empty if it is."""

    name: str
    mode: str = ""
    """`chat` or `thinking`, with an effort where one was needed."""
    fault: str = ""


def replay(folder: Path, prompts: Prompts) -> list[Golden]:
    """All examples of a model folder, in the order of their names. Empty if there are none."""
    return [_replay(path, prompts) for path in sorted((folder / "encoding").glob(_INPUTS))]


_INPUTS = "tests/test_input_*.json"


def check(folder: Path, prompts: Prompts) -> int:
    """How many examples were replayed. Raises `ModelLoadError` for the first that differs."""
    goldens = replay(folder, prompts)
    for golden in goldens:
        if golden.fault:
            raise ModelLoadError(
                f"the chat encoding of the model in {folder} is not the one that Penstock writes: "
                f"{golden.fault}; serve a release whose encoding is known, or remove "
                "encoding/tests to go on without this check"
            )
    return len(goldens)


def _replay(path: Path, prompts: Prompts) -> Golden:
    answer = path.with_name(path.name.replace("input", "output")).with_suffix(".txt")
    try:
        if max(path.stat().st_size, answer.stat().st_size) > _LARGEST_BYTES:
            return Golden(path.name, fault=f"{path.name} is larger than any file of its kind")
        messages = _messages(orjson.loads(path.read_bytes()))
        wanted = answer.read_bytes().decode("utf-8")
    except (OSError, ValueError, InvalidRequestError) as error:
        return Golden(path.name, fault=f"{path.name} or its output cannot be read: {error}")
    best, where = -1, ""
    for rules in _modes(prompts):
        mode = "thinking" if rules.thinking else "chat"
        mode += f" with effort {rules.effort}" if rules.effort else ""
        try:
            text = "".join(piece.text for piece in segments(messages, rules))
        except (InvalidRequestError, KeyError) as error:
            where = where or f"{path.name} cannot be encoded: {error}"
            continue
        if text == wanted:
            return Golden(path.name, mode)
        same = _common(text, wanted)
        if same > best:
            best = same
            where = f"{answer.name} differs from character {same} on ({mode})"
    return Golden(path.name, fault=where)


def _modes(prompts: Prompts) -> list[Rules]:
    thinking = Rules(prompts, thinking=True)
    efforts = [effort for effort in ("high", "max") if prompts.efforts.get(effort)]
    plain = [thinking, Rules(prompts), replace(thinking, drop_thinking=False)]
    return plain + [replace(thinking, effort=effort) for effort in efforts]


def _messages(content: Any) -> list[Message]:
    tools: Sequence[Mapping[str, Any]] = ()
    if isinstance(content, dict):
        tools = read_tools(content.get("tools"))
        content = content.get("messages")
    if not isinstance(content, list):
        raise ValueError("it holds neither messages nor an object with messages")
    messages = read_messages(content, ALL_ROLES)
    return [replace(messages[0], tools=tuple(tools) or messages[0].tools), *messages[1:]]


def _common(left: str, right: str) -> int:
    for i, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return i
    return min(len(left), len(right))
