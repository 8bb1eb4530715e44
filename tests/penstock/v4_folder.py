"""A model folder with DeepSeek-V4's tokens and an `encoding/` in the release's layout.

The texts in it are ours; names, places and rules are the release's. The expected prompts are
written by hand from the specification (section 9), not by the encoder that is tested with them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from penstock.tokenizer import byte_alphabet

BAR = "\uff5c"
BOS, EOS = f"<{BAR}begin\u2581of\u2581sentence{BAR}>", f"<{BAR}end\u2581of\u2581sentence{BAR}>"
USER, ASSISTANT = f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>"
REMINDER, DSML = f"<{BAR}latest_reminder{BAR}>", f"{BAR}DSML{BAR}"
THINK, END_THINK = "<think>", "</think>"
TASKS = ("action", "query", "authority", "domain", "title", "read_url")
TASK_TOKENS = tuple(f"<{BAR}{task}{BAR}>" for task in TASKS)
CONTROLS = (BOS, EOS, USER, ASSISTANT, REMINDER, DSML, THINK, END_THINK, *TASK_TOKENS)

HIGH, MAX = "Effort: think it over.\n\n", "Effort: think it over twice.\n\n"
TOOLS_TEMPLATE = (
    "## Tools\n\nWrite <{dsml_token}tool_calls> after {thinking_end_token}.\n\n"
    "{tool_schemas}\n\nOnly {{these}}.\n"
)
SOURCE_HEAD = f'''
"""Not to be run."""
raise SystemExit("downloaded code was executed")
eos_token: str = "{EOS}"
assistant_msg_template: str = "{{reasoning}}{{content}}" + eos_token
response_format_template: str = (
    "Reply in this schema:\\n"
    "{{schema}}"
)
TOOLS_TEMPLATE = {TOOLS_TEMPLATE!r}
def render(): pass
'''
PREVIEW = SOURCE_HEAD + f"REASONING_EFFORT_MAX = ({MAX[:7]!r}\n    {MAX[7:]!r})\n"
OFFICIAL = SOURCE_HEAD + (
    "from typing import Dict\n"
    f"REASONING_EFFORT_PROMPTS: Dict[str, str] = "
    f'{{"low": "", "high": {HIGH!r}, "max": ({MAX!r})}}\n'
    'DEFAULT_REASONING_EFFORT = "low"\n'
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
SCHEMA = (
    '{"name": "get_weather", "description": "Weather of a place", "parameters": '
    '{"type": "object", "properties": {"city": {"type": "string"}}}}'
)
TOOLS_SECTION = (
    f"## Tools\n\nWrite <{DSML}tool_calls> after {END_THINK}.\n\n{SCHEMA}\n\nOnly {{these}}.\n"
)


def call(call_id: str, name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": call_id,
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def calls_text(*calls: str) -> str:
    inner = "".join(f"{each}\n" for each in calls)
    return f"\n\n<{DSML}tool_calls>\n{inner}</{DSML}tool_calls>"


def invoke(name: str, *parameters: tuple[str, str, str]) -> str:
    lines = "\n".join(
        f'<{DSML}parameter name="{key}" string="{kind}">{value}</{DSML}parameter>'
        for key, kind, value in parameters
    )
    return f'<{DSML}invoke name="{name}">\n{lines}\n</{DSML}invoke>'


Golden = tuple[Any, str]

WITH_TOOLS: Golden = (
    {
        "tools": [WEATHER],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Oslo and Rome?"},
            {
                "role": "assistant",
                "reasoning_content": "Two calls.",
                "tool_calls": [
                    call("a", "get_weather", '{"city": "Oslo", "days": 3}'),
                    call("b", "get_weather", '{"city":"Rome","deep":{"x":[1,2.5,null]}}'),
                ],
            },
            {"role": "tool", "tool_call_id": "b", "content": "sun"},
            {"role": "tool", "tool_call_id": "a", "content": "snow"},
            {"role": "user", "content": "And?"},
            {"role": "assistant", "reasoning_content": "Done.", "content": "Snow, sun."},
            {"role": "user", "content": "Thanks"},
            {"role": "assistant", "reasoning_content": "Polite.", "content": "Welcome"},
        ],
    },
    f"{BOS}Be brief.\n\n{TOOLS_SECTION}{USER}Oslo and Rome?{ASSISTANT}{THINK}Two calls.{END_THINK}"
    + calls_text(
        invoke("get_weather", ("city", "true", "Oslo"), ("days", "false", "3")),
        invoke("get_weather", ("city", "true", "Rome"), ("deep", "false", '{"x": [1, 2.5, null]}')),
    )
    + f"{EOS}{USER}<tool_result>snow</tool_result>\n\n<tool_result>sun</tool_result>\n\nAnd?"
    f"{ASSISTANT}{THINK}Done.{END_THINK}Snow, sun.{EOS}{USER}Thanks{ASSISTANT}{THINK}Polite."
    f"{END_THINK}Welcome{EOS}",
)
WITHOUT_OLD_THOUGHTS: Golden = (
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "reasoning_content": "greet", "content": "hi"},
        {"role": "developer", "content": "be kind"},
        {"role": "assistant", "reasoning_content": "ok", "content": "yes"},
        {"role": "user", "content": "capital of France?"},
        {"role": "assistant", "reasoning_content": "easy", "content": "Paris"},
    ],
    f"{BOS}S{USER}hello{ASSISTANT}{END_THINK}hi{EOS}yes{EOS}{USER}capital of France?{ASSISTANT}"
    f"{THINK}easy{END_THINK}Paris{EOS}",
)
DEVELOPER_AND_REMINDER: Golden = (
    [
        {"role": "system", "content": "S"},
        {"role": "latest_reminder", "content": "2026-02-21"},
        {"role": "developer", "content": "D", "tools": [WEATHER]},
        {
            "role": "assistant",
            "reasoning_content": "r",
            "content": "",
            # The release's own examples have calls and results without ids.
            "tool_calls": [
                {"type": "function", "function": {"name": "f", "arguments": '{"q": "x y"}'}}
            ],
        },
        {"role": "tool", "content": "[0]"},
        {"role": "assistant", "reasoning_content": "s", "content": "c", "tool_calls": []},
        {"role": "latest_reminder", "content": "2026-02-22"},
        {"role": "user", "content": "q"},
    ],
    f"{BOS}S{REMINDER}2026-02-21{USER}D\n\n{TOOLS_SECTION}{ASSISTANT}{THINK}r{END_THINK}"
    + calls_text(invoke("f", ("q", "true", "x y")))
    + f"{EOS}{USER}<tool_result>[0]</tool_result>{ASSISTANT}{THINK}s{END_THINK}c{EOS}"
    f"{REMINDER}2026-02-22{USER}q{ASSISTANT}{THINK}",
)
QUICK_TASK: Golden = (
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1", "reasoning_content": "never shown", "mask": 1},
        {"role": "user", "content": "q2", "task": "action"},
        {"role": "assistant", "content": "Search"},
    ],
    f"{BOS}S{USER}q1{ASSISTANT}{END_THINK}a1{EOS}{USER}q2{ASSISTANT}{END_THINK}"
    f"<{BAR}action{BAR}>Search{EOS}",
)
GOLDENS = (WITH_TOOLS, WITHOUT_OLD_THOUGHTS, DEVELOPER_AND_REMINDER, QUICK_TASK)


def tokenizer_json(*, special_marks: bool) -> dict[str, Any]:
    """Bytes, a joint of full stop and blank line, and the controls.

    `special_marks`: whether the marks of an answer's structure carry the special flag.
    """
    table = byte_alphabet()
    vocabulary = {char: index for index, char in enumerate(table)}
    for word in (".\n\n", "\n\n"):
        vocabulary["".join(table[b] for b in word.encode())] = len(vocabulary)
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    marks = (THINK, END_THINK, DSML)
    added = [
        {
            "id": len(vocabulary) + i,
            "content": control,
            "special": special_marks or control not in marks,
            **flags,
        }
        for i, control in enumerate(CONTROLS)
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": r"\.\n\n|\n\n|[\s\S]"},
        "behavior": "Isolated",
        "invert": False,
    }
    return {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "decoder": level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": []},
    }


def write_folder(
    folder: Path,
    *,
    source: str | None = PREVIEW,
    goldens: tuple[Golden, ...] = (),
    config: dict[str, Any] | None = None,
    special_marks: bool = True,
) -> str:
    """The folder's name, ready for `open_tokenizer` and `open_chat`."""
    content = tokenizer_json(special_marks=special_marks)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    eos = next(t["id"] for t in content["added_tokens"] if t["content"] == EOS)
    config = {"model_type": "deepseek_v4", "eos_token_id": eos, **(config or {})}
    (folder / "config.json").write_text(json.dumps(config))
    if source is not None:
        tests = folder / "encoding" / "tests"
        tests.mkdir(parents=True, exist_ok=True)
        (folder / "encoding" / "encoding_dsv4.py").write_text(source)
        (folder / "encoding" / "test_encoding_dsv4.py").write_text("TOOLS_TEMPLATE = 'wrong'\n")
        for i, (given, wanted) in enumerate(goldens, start=1):
            (tests / f"test_input_{i}.json").write_text(json.dumps(given))
            (tests / f"test_output_{i}.txt").write_text(wanted)
    return str(folder)
