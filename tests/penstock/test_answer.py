"""Answers taken apart: whatever the cut, strictly, and with nothing lost."""

from __future__ import annotations

import json
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.chat import AnswerForm, ChatOptions, ToolCall, dsml, open_chat
from penstock.chat.answer import Answer, AnswerReader, Call, Content, fold, read_answer
from penstock.tokenizer import open_tokenizer
from tests.penstock import v4_folder as v4
from tests.penstock.v4_folder import ASSISTANT, DSML, END_THINK, EOS, THINK, calls_text, invoke

BOTH = AnswerForm(thinking=True, calls=True)
CALLS = AnswerForm(calls=True)
OSLO = invoke("get_weather", ("city", "true", "Oslo"), ("days", "false", "3"))
OSLO_CALL = ToolCall("get_weather", '{"city": "Oslo", "days": 3}')
FIRST = f"\n\n<{DSML}tool_calls>\n{OSLO}\n"
WHOLE = f"hm{END_THINK}Let me look.{calls_text(OSLO, invoke('f'))}"


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(borders)]


def read_pieces(pieces: list[str], form: AnswerForm) -> Answer:
    reader = AnswerReader(form)
    parts = [part for piece in pieces for part in reader.feed(piece)]
    return fold([*parts, *reader.close()])


def test_a_whole_answer_in_its_parts() -> None:
    assert read_answer(WHOLE, BOTH) == Answer(
        "hm", "Let me look.", (OSLO_CALL, ToolCall("f", "{}"))
    )


# Pieces of markup, so that broken blocks come up as often as whole ones.
marks = st.sampled_from(
    [
        *("hm", END_THINK, "\n\n", "\n", "<", f"<{DSML}", f"<{DSML}tool_calls", ">\n", '">\n'),
        *(f"\n\n<{DSML}tool_calls>\n", f"</{DSML}tool_calls>", OSLO, OSLO + "\n"),
        *(f'<{DSML}invoke name="f">\n', f"</{DSML}invoke>\n", f"\n</{DSML}invoke>\n"),
        *(f'<{DSML}parameter name="k" string="true">', f'<{DSML}parameter name="n" string="'),
        *('false">', "1.5", "nul", f"</{DSML}parameter>\n", calls_text(OSLO), calls_text(), '"'),
    ]
)
answers = st.lists(marks | st.text(max_size=3), max_size=14).map("".join)
forms = st.sampled_from([BOTH, CALLS, AnswerForm(thinking=True), AnswerForm()])


@given(answers, forms, st.lists(st.integers(0, 1000), max_size=12))
@example(WHOLE, BOTH, list(range(1000)))
@settings(max_examples=300, deadline=None)
def test_the_result_does_not_depend_on_the_cut(
    text: str, form: AnswerForm, places: list[int]
) -> None:
    whole = read_answer(text, form)
    assert read_pieces(cut(text, places), form) == whole
    assert read_pieces(list(text), form) == whole


FRAME = set(calls_text(invoke("f", ("k", "true", ""), ("n", "false", ""))) + END_THINK)


@given(answers, forms)
@example(f"{FIRST}hy", CALLS)
@example(f"{FIRST}hy", BOTH)
@settings(max_examples=300, deadline=None)
def test_nothing_is_lost_and_every_call_is_whole(text: str, form: AnswerForm) -> None:
    found = read_answer(text, form)
    said = [found.reasoning, found.content]
    for call in found.calls:
        arguments = json.loads(call.arguments, parse_float=str, parse_int=str)
        said += [call.name, *arguments, *map(str, arguments.values())]
    if not found.calls:
        ended = END_THINK if form.thinking and END_THINK in text else ""
        assert found.reasoning + ended + found.content == text
    # Every character that is no part of the markup turns up exactly once.
    assert _beside_frame("".join(said)) == _beside_frame(text)


def _beside_frame(text: str) -> Counter[str]:
    return Counter(char for char in text if char not in FRAME)


names = st.text(
    st.characters(blacklist_categories=("Cc", "Cs"), blacklist_characters='"\n<>'),
    min_size=1,
    max_size=8,
)
free = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20).filter(
    lambda text: DSML not in text and END_THINK not in text
)
scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
)
values = free | st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(free, inner, max_size=3)
)
calls = st.lists(
    st.builds(
        lambda name, arguments: ToolCall(name, dsml.to_json(arguments)),
        names,
        st.dictionaries(names, values, max_size=3),
    ),
    max_size=3,
)


@given(free, free, calls)
@settings(max_examples=150, deadline=None)
def test_what_is_written_is_read_back(reasoning: str, content: str, calls: list[ToolCall]) -> None:
    block = "".join(piece.text for piece in dsml.write_calls(calls)) if calls else ""
    found = read_answer(f"{reasoning}{END_THINK}{content}{block}", BOTH)
    assert found == Answer(reasoning, content, tuple(calls))
    again = "".join(piece.text for piece in dsml.write_calls(found.calls)) if found.calls else ""
    assert again == block


END = f"\n</{DSML}tool_calls>"


@pytest.mark.parametrize(
    "rest",
    [
        "",
        f'<{DSML}invoke name="g">\n<{DSML}parameter name="a" string="true">half',
        f"<{DSML}invoke",
        f"</{DSML}tool_cal",
        "words",
        f'<{DSML}invoke name="g">words',
        f'<{DSML}invoke name="g"h">\n\n</{DSML}invoke>{END}',
        f'<{DSML}invoke name="">\n\n</{DSML}invoke>{END}',
        invoke("g" * 2000, ("a", "true", "1")) + END,
        invoke("g", ("a", "maybe", "1")) + END,
        invoke("g", ("a", "false", "NaN")) + END,
        invoke("g", ("a", "false", "True")) + END,
        invoke("g", ("a", "false", "[" * 100_000)) + END,
        invoke("g", ("a", "true", "1"), ("a", "true", "2")) + END,
        invoke("g", ("a", "true", "1")).replace("\n</", "</") + END,
        invoke("g", ("a", "true", "1")) + END[1:],
    ],
)
def test_markup_that_is_not_right_comes_back_as_content(rest: str) -> None:
    assert read_answer(f"A{FIRST}{rest}", CALLS) == Answer("", f"A{rest}", (OSLO_CALL,))
    # The same frame with nothing wrong in it is a call.
    right = invoke("g", ("a", "true", "1")) + END
    assert len(read_answer(f"A{FIRST}{right}", CALLS).calls) == 2


@pytest.mark.parametrize(
    "text",
    [
        calls_text(),
        f"\n<{DSML}tool_calls>\n{OSLO}\n</{DSML}tool_calls>",
        f"\n\n<{DSML}tool_calls>{OSLO}",
        f"\n\n<{DSML}tool_calls",
    ],
)
def test_what_only_looks_like_a_block_is_content(text: str) -> None:
    assert read_answer(text, CALLS) == Answer("", text)


def test_text_behind_a_block_is_content() -> None:
    assert read_answer(calls_text(OSLO) + " bye", CALLS) == Answer("", " bye", (OSLO_CALL,))


def test_reasoning_without_an_end_is_reasoning_and_marks_in_it_mean_nothing() -> None:
    text = f"hm{calls_text(OSLO)}"
    assert read_answer(text, BOTH) == Answer(text)


def test_without_tools_markup_is_text() -> None:
    text = f"A{calls_text(OSLO)}"
    assert read_answer(text, AnswerForm(thinking=True)) == Answer(text)
    assert read_answer(text, AnswerForm()) == Answer("", text)


def test_text_that_cannot_be_a_mark_is_shown_at_once() -> None:
    reader = AnswerReader(CALLS)
    assert reader.feed("2 <") == [Content("2 <")]
    assert reader.feed("\n\n") == []
    assert reader.feed("x") == [Content("\n\nx")]
    assert reader.feed(calls_text(OSLO)[:-15]) == [Call(0, *_pair(OSLO_CALL))]


def _pair(call: ToolCall) -> tuple[str, str]:
    return call.name, call.arguments


def test_a_long_argument_in_single_characters_takes_linear_time() -> None:
    def seconds(size: int) -> float:
        text = calls_text(invoke("f", ("k", "true", "x<" * size)))
        reader, started = AnswerReader(CALLS), time.process_time()
        for char in text:
            reader.feed(char)
        assert reader.calls == 1
        return time.process_time() - started

    # Four times the text; a quadratic reader would take sixteen times as long.
    small = min(seconds(5_000) for _ in range(3))
    assert min(seconds(20_000) for _ in range(2)) < 9 * small


@pytest.mark.parametrize("special_marks", [True, False])
def test_marks_reach_the_reader_whatever_flag_the_tokenizer_gives_them(
    tmp_path: Path, special_marks: bool
) -> None:
    folder = v4.write_folder(tmp_path, special_marks=special_marks)
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    chat = open_chat(folder, tokenizer)
    call = v4.call("1", "f", '{"k": "v"}')
    said = {"role": "assistant", "reasoning_content": "r", "content": "c", "tool_calls": [call]}
    talk = [{"role": "user", "content": "q"}]
    options = ChatOptions(thinking=True, tools=(v4.WEATHER,))
    prompt = chat.encode(talk, options)
    longer = chat.encode([*talk, said, {"role": "user", "content": "z"}], options)
    # The tokens between two prompts are what the model has to write.
    ids = longer.token_ids[len(prompt.token_ids) :]
    ids = ids[: ids.index(tokenizer.token_id(EOS) or -1)]
    text = "".join(tokenizer.decode([token]) for token in ids)
    assert read_answer(text, prompt.answer) == Answer("r", "c", (ToolCall("f", '{"k": "v"}'),))
    assert tokenizer.decode(prompt.token_ids).endswith(f"q{THINK}")
    assert ASSISTANT not in tokenizer.decode(prompt.token_ids)
