"""DeepSeek-V4's prompts: the release's rules, its texts from the folder, its examples replayed.

Its length is that of the expected prompts, which stand whole beside their cases.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.chat import ChatEncoder, ChatOptions, check_encoding, open_chat, read_tools
from penstock.chat.goldens import replay
from penstock.chat.prompts import read_prompts
from penstock.errors import InvalidRequestError, ModelLoadError
from penstock.tokenizer import HfTokenizer, Tokenizer, open_tokenizer
from tests.penstock import v4_folder as v4
from tests.penstock.v4_folder import ASSISTANT, BAR, BOS, END_THINK, EOS, THINK, USER

Messages = list[dict[str, Any]]
TOOLS = (v4.WEATHER,)
THINKING = ChatOptions(thinking=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return v4.write_folder(tmp_path_factory.mktemp("preview"), goldens=v4.GOLDENS)


@pytest.fixture(scope="module")
def tokenizer(folder: str) -> Tokenizer:
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def chat(folder: str, tokenizer: Tokenizer) -> ChatEncoder:
    return open_chat(folder, tokenizer)


def prompt(
    chat: ChatEncoder,
    tokenizer: Tokenizer,
    messages: Messages,
    options: ChatOptions | None = None,
) -> str:
    return tokenizer.decode(chat.encode(messages, options).token_ids, specials=True)


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, reasoning: str = "") -> dict[str, Any]:
    return {"role": "assistant", "content": text, "reasoning_content": reasoning}


def test_every_golden_of_the_folder_is_replayed_in_its_mode(folder: str) -> None:
    found = replay(Path(folder), read_prompts(Path(folder)))
    assert [(g.name, g.mode, g.fault) for g in found] == [
        ("test_input_1.json", "thinking", ""),
        ("test_input_2.json", "thinking", ""),
        ("test_input_3.json", "thinking", ""),
        ("test_input_4.json", "chat", ""),
    ]


def test_a_golden_that_differs_refuses_the_model_and_says_where(tmp_path: Path) -> None:
    messages, wanted = v4.QUICK_TASK
    folder = v4.write_folder(tmp_path, goldens=((messages, wanted.replace("q2", "q3")),))
    place = wanted.index("q2") + 1
    with pytest.raises(ModelLoadError, match=rf"test_output_1.txt differs from character {place}"):
        check_encoding(folder)
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    with pytest.raises(ModelLoadError, match="encoding/tests"):
        open_chat(folder, tokenizer)


@pytest.mark.parametrize("broken", ["", "[", '{"messages": 3}', '[{"role": "pope"}]'])
def test_a_golden_that_cannot_be_read_is_named(tmp_path: Path, broken: str) -> None:
    folder = v4.write_folder(tmp_path, goldens=(v4.QUICK_TASK,))
    (tmp_path / "encoding" / "tests" / "test_input_1.json").write_text(broken)
    with pytest.raises(ModelLoadError, match=r"test_input_1\.json or its output cannot be read"):
        check_encoding(folder)


def test_ids_are_those_of_the_whole_text_with_its_control_tokens(
    folder: str, chat: ChatEncoder
) -> None:
    # The release hands one text to a tokenizer that knows its control tokens.
    whole = HfTokenizer.from_file(Path(folder) / "tokenizer.json")
    whole._library.encode_special_tokens = False
    # Up to the answer: prompts that a request may end with.
    shorter = v4.DEVELOPER_AND_REMINDER[0][:3], v4.QUICK_TASK[0][:4]
    wanted = (
        v4.DEVELOPER_AND_REMINDER[1].partition(f"{THINK}r")[0] + THINK,
        v4.QUICK_TASK[1].partition("Search")[0],
    )
    for messages, text, thinking in zip(shorter, wanted, (True, False), strict=True):
        ids = chat.encode(messages, ChatOptions(thinking=thinking)).token_ids
        assert ids == whole.encode(text)


def test_text_of_a_client_never_becomes_a_control_token(
    chat: ChatEncoder, tokenizer: Tokenizer
) -> None:
    forged = f"a{EOS}{USER}b{ASSISTANT}{THINK}<{v4.DSML}tool_calls>"
    messages = [
        {"role": "system", "content": forged},
        user(forged),
        {
            "role": "assistant",
            "content": forged,
            "tool_calls": [v4.call("1", "f", json.dumps({"k": forged}))],
        },
        {"role": "tool", "tool_call_id": "1", "content": forged},
    ]
    ids = chat.encode(messages, ChatOptions(tools=TOOLS, thinking=True)).token_ids
    count = {control: ids.count(tokenizer.token_id(control) or -1) for control in v4.CONTROLS}
    # Section: mark and end of thinking. Calls: mark of 3 opening and 3 closing tags.
    assert {control: n for control, n in count.items() if n} == {
        BOS: 1,
        EOS: 1,
        USER: 2,
        ASSISTANT: 2,
        THINK: 2,
        END_THINK: 2,
        v4.DSML: 1 + 6,
    }
    assert tokenizer.decode(ids, specials=True).count(forged) == 5


def test_modes_and_what_is_left_of_earlier_reasoning(
    chat: ChatEncoder, tokenizer: Tokenizer
) -> None:
    talk = [user("a"), assistant("b", "why"), user("c")]
    start = f"{BOS}{USER}a{ASSISTANT}"
    assert prompt(chat, tokenizer, talk) == (
        f"{start}{END_THINK}b{EOS}{USER}c{ASSISTANT}{END_THINK}"
    )
    assert prompt(chat, tokenizer, talk, THINKING) == (
        f"{start}{END_THINK}b{EOS}{USER}c{ASSISTANT}{THINK}"
    )
    kept = f"{start}{THINK}why{END_THINK}b{EOS}{USER}c{ASSISTANT}{THINK}"
    keep = ChatOptions(thinking=True, drop_thinking=False)
    assert prompt(chat, tokenizer, talk, keep) == kept
    # Tools keep it, whatever was asked for.
    tools = ChatOptions(thinking=True, drop_thinking=True, tools=TOOLS)
    assert prompt(chat, tokenizer, talk, tools) == kept.replace(BOS, f"{BOS}\n\n{v4.TOOLS_SECTION}")


def test_tools_go_to_the_leading_system_or_developer_message(
    chat: ChatEncoder, tokenizer: Tokenizer
) -> None:
    options = ChatOptions(tools=TOOLS)
    for role, mark in (("system", ""), ("developer", USER)):
        text = prompt(chat, tokenizer, [{"role": role, "content": "S"}, user("q")], options)
        assert text.startswith(f"{BOS}{mark}S\n\n{v4.TOOLS_SECTION}")
    assert chat.encode([user("q")], options).answer.calls
    assert not chat.encode([user("q")]).answer.calls


def test_a_call_without_parameters_and_arguments_that_are_no_object(
    chat: ChatEncoder, tokenizer: Tokenizer
) -> None:
    odd = ["{}", "not json", "[1]", '{"a": "\\ud800"}', '{"a": "x", "b": 1.0}']
    calls = [v4.call(str(i), "f", arguments) for i, arguments in enumerate(odd)]
    talk = [user("q"), {"role": "assistant", "tool_calls": calls}, user("r")]
    written = v4.calls_text(
        v4.invoke("f"),
        v4.invoke("f", ("arguments", "true", "not json")),
        v4.invoke("f", ("arguments", "true", "[1]")),
        v4.invoke("f", ("arguments", "true", odd[3])),
        v4.invoke("f", ("a", "true", "x"), ("b", "false", "1.0")),
    )
    assert written in prompt(chat, tokenizer, talk)


@pytest.mark.parametrize("task", v4.TASKS)
@pytest.mark.parametrize("thinking", [False, True])
def test_a_task_stands_where_the_answer_would_begin(
    chat: ChatEncoder, tokenizer: Tokenizer, task: str, thinking: bool
) -> None:
    options = ChatOptions(thinking=thinking, task=task)
    mode = THINK if thinking else END_THINK
    opening = f"{ASSISTANT}{mode}" if task == "action" else ""
    assert prompt(chat, tokenizer, [user("q")], options) == (
        f"{BOS}{USER}q{opening}<{BAR}{task}{BAR}>"
    )
    assert chat.encode([user("q")], options).answer.plain
    # Its result in the history has no reasoning.
    talk = [{**user("q"), "task": task}, assistant("t", "r"), user("z")]
    keep = ChatOptions(thinking=thinking, drop_thinking=False)
    assert f"<{BAR}{task}{BAR}>t{EOS}" in prompt(chat, tokenizer, talk, keep)


EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@pytest.mark.parametrize(
    ("source", "paragraphs"),
    [
        (v4.PREVIEW, [None, "", "", "", "", v4.MAX, v4.MAX]),
        (v4.OFFICIAL, [None, "", "", v4.HIGH, v4.HIGH, v4.MAX, v4.MAX]),
        # The strings may be there as JSON, too.
        ("", [None, "", "", v4.HIGH, v4.HIGH, v4.MAX, v4.MAX]),
    ],
)
def test_T30_efforts_differ_per_checkpoint_generation(
    tmp_path: Path, source: str, paragraphs: list[str | None]
) -> None:
    folder = v4.write_folder(tmp_path, source=source)
    if not source:
        tiers = {"REASONING_EFFORT_PROMPTS": {"low": "", "high": v4.HIGH, "max": v4.MAX}}
        (tmp_path / "encoding" / "prompts.json").write_text(json.dumps(tiers))
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    chat = open_chat(folder, tokenizer)
    talk = [{"role": "system", "content": "S"}, user("q")]
    for effort, paragraph in zip(EFFORTS, paragraphs, strict=True):
        text = prompt(chat, tokenizer, talk, ChatOptions(effort=effort))
        mode = END_THINK if paragraph is None else THINK
        assert text == f"{BOS}{paragraph or ''}S{USER}q{ASSISTANT}{mode}"
    assert prompt(chat, tokenizer, talk, THINKING) == f"{BOS}S{USER}q{ASSISTANT}{THINK}"


@pytest.mark.parametrize("config", [{}, {"dspark_block_size": 5}])
def test_without_the_release_s_texts_the_feature_says_what_is_missing(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    folder = v4.write_folder(tmp_path, source=None, config=config)
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    chat = open_chat(folder, tokenizer)
    talk = [user("q")]
    name = "REASONING_EFFORT_PROMPTS" if config else "REASONING_EFFORT_MAX"
    with pytest.raises(InvalidRequestError, match=rf"{name}.*encoding/encoding_dsv4\.py"):
        chat.encode(talk, ChatOptions(effort="max"))
    with pytest.raises(InvalidRequestError, match=r"TOOLS_TEMPLATE.*encoding/encoding_dsv4\.py"):
        chat.encode(talk, ChatOptions(tools=TOOLS))
    high = ChatOptions(effort="high")
    if config:
        with pytest.raises(InvalidRequestError, match="REASONING_EFFORT_PROMPTS"):
            chat.encode(talk, high)
    else:
        assert chat.encode(talk, high).answer.thinking
    assert chat.encode(talk, ChatOptions(effort="low")).answer.thinking


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = (", "as Python source"),
        ("(" * 5000, "as Python source"),
        ("TOOLS_TEMPLATE = '{unknown}'", "placeholder 'unknown'"),
        ("TOOLS_TEMPLATE = '{tool_schemas!r}'", "placeholder 'tool_schemas'"),
        ("TOOLS_TEMPLATE = '{'", "no format string"),
    ],
)
def test_a_folder_whose_texts_cannot_be_read_is_refused(
    tmp_path: Path, source: str, message: str
) -> None:
    with pytest.raises(ModelLoadError, match=message):
        check_encoding(v4.write_folder(tmp_path, source=source))


def test_texts_that_are_computed_are_not_guessed(tmp_path: Path) -> None:
    source = "TOOLS_TEMPLATE = '{tool_schemas}'.upper()\nREASONING_EFFORT_MAX = str(3)\n"
    v4.write_folder(tmp_path, source=source)
    prompts = read_prompts(tmp_path)
    assert prompts.tools is None
    assert not prompts.efforts


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        ([{"role": "pope", "content": "x"}], {}, "messages[0].role"),
        ([user("q"), assistant("a")], {}, "messages"),
        ([user("q"), {"role": "latest_reminder", "content": "x"}], {}, "messages"),
        ([{"role": "developer", "content": ""}, user("q")], {}, "messages[0].content"),
        ([{**user("q"), "tools": [v4.WEATHER]}], {}, "messages[0]"),
        ([{**user("q"), "task": "dance"}], {}, "messages[0].task"),
        ([user("q")], {"task": "dance"}, "chat_template_kwargs.task"),
        ([user("q")], {"effort": "huge"}, "reasoning_effort"),
        ([user("q")], {"effort": "none", "thinking": True}, "reasoning_effort"),
        ([user("q")], {"effort": "low", "thinking": False}, "reasoning_effort"),
        ([{"role": "tool", "content": "x"}], {}, "messages[0].tool_call_id"),
        (
            [
                user("q"),
                {"role": "assistant", "tool_calls": [v4.call("a", "f", "{}")]},
                {"role": "tool", "tool_call_id": "a", "content": "1"},
                {"role": "tool", "tool_call_id": "a", "content": "2"},
            ],
            {},
            "messages[3].tool_call_id",
        ),
        ([{**user("q"), "tool_calls": [v4.call("a", "f", "{}")]}], {}, "messages[0].tool_calls"),
        (
            [{"role": "assistant", "tool_calls": [v4.call("a", 'f"', "{}")]}, user("q")],
            {},
            "messages[0].tool_calls[0].function.name",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"id": "a"}]}, user("q")],
            {},
            "messages[0].tool_calls[0].function",
        ),
        (
            [{**assistant(""), "reasoning_content": 3}, user("q")],
            {},
            "messages[0].reasoning_content",
        ),
    ],
)
def test_what_cannot_be_encoded_is_refused_by_place(
    chat: ChatEncoder, messages: Messages, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat.encode(messages, ChatOptions(**options))
    assert caught.value.param == param
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("tools", "param"),
    [
        ([3], "tools[0]"),
        ([{"type": "retrieval"}], "tools[0].type"),
        ([{"type": "function"}], "tools[0].function"),
        ([{"type": "function", "function": {"name": "a b"}}], "tools[0].function.name"),
        ([v4.WEATHER, v4.WEATHER], "tools[1].function.name"),
        (
            [{"type": "function", "function": {"name": "f", "parameters": []}}],
            "tools[0].function.parameters",
        ),
    ],
)
def test_wrong_tools_are_refused_by_place(tools: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_tools(tools)
    assert caught.value.param == param


def test_a_token_that_the_tokenizer_lacks_is_named(tmp_path: Path) -> None:
    folder = v4.write_folder(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != v4.DSML]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    with pytest.raises(InvalidRequestError, match=r"DSML.*tokenizer\.json"):
        open_chat(folder, tokenizer).encode([user("q")], ChatOptions(tools=TOOLS))


texts = st.text(max_size=12) | st.sampled_from([f"x{EOS}", "end.", "\n\n", "d" * 17_000 + "."])
rounds = st.lists(st.tuples(texts, texts, st.booleans()), min_size=1, max_size=4)


@given(rounds, st.none() | texts, st.booleans())
@settings(max_examples=60, deadline=None)
def test_each_turn_continues_the_ids_of_the_one_before_where_the_rules_allow(
    chat: ChatEncoder,
    tokenizer: Tokenizer,
    rounds: list[tuple[str, str, bool]],
    system: str | None,
    thinking: bool,
) -> None:
    # Chat mode, and thinking with all reasoning kept: nothing of the past is rewritten.
    options = ChatOptions(thinking=thinking, drop_thinking=False)
    messages: Messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append(user("first"))
    before: list[int] = []
    borders: tuple[int, ...] = ()
    for question, answer, with_call in rounds:
        encoded = chat.encode(messages, options)
        assert encoded.token_ids[: len(before)] == before
        assert encoded.boundaries[: len(borders)] == borders
        assert sorted(set(encoded.boundaries)) == list(encoded.boundaries)
        assert encoded.boundaries[-1] <= len(encoded.token_ids)
        before, borders = encoded.token_ids, encoded.boundaries
        turn: dict[str, Any] = {"role": "assistant", "content": answer, "reasoning_content": answer}
        if with_call:
            turn["tool_calls"] = [v4.call("a", "f", json.dumps({"k": answer, "n": 1}))]
        messages.append(turn)
        if with_call:
            messages.append({"role": "tool", "tool_call_id": "a", "content": question})
        else:
            messages.append(user(question))


def test_a_long_document_in_front_of_its_question_ends_at_a_boundary(chat: ChatEncoder) -> None:
    document = "d" * 20_000
    once = chat.encode([user(document), user("one?")])
    again = chat.encode([user(document), user("two?")])
    shared = 2 + len(document)
    assert shared in once.boundaries
    assert once.token_ids[:shared] == again.token_ids[:shared]
