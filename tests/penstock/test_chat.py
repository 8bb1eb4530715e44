"""Chat encodings: the ledger's text, the prefix property, DeepSeek's layout, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.chat import (
    ChatEncoder,
    ChatOptions,
    DeepSeekV4Chat,
    LedgerChat,
    PlainChat,
    open_chat,
)
from penstock.chat.deepseek_v4 import NEEDED
from penstock.errors import InvalidRequestError, ModelLoadError
from penstock.tokenizer import ByteTokenizer

Messages = list[dict[str, Any]]


class ControlTokenizer(ByteTokenizer):
    """Bytes plus DeepSeek's control tokens from 1000 on."""

    def token_id(self, token: str) -> int | None:
        return 1000 + NEEDED.index(token) if token in NEEDED else None

    def _piece(self, token: int, specials: bool) -> bytes:
        if token >= 1000:
            return NEEDED[token - 1000].encode()
        return super()._piece(token, specials)


def text_of(chat: ChatEncoder, *turns: tuple[str, str]) -> str:
    messages: Messages = [{"role": role, "content": text} for role, text in turns]
    return ControlTokenizer().decode(chat.encode(messages).token_ids)


LEDGER = LedgerChat(ByteTokenizer())
DEEPSEEK = DeepSeekV4Chat(ControlTokenizer())
PLAIN = PlainChat(ByteTokenizer())
Q1 = "Some text.\n\nQuestion: what is the code of bakilo?"
Q2 = "Question: what is the code of terosuna?"


def test_ledger_restates_the_subject_of_the_question() -> None:
    assert text_of(LEDGER, ("user", Q1)) == Q1 + "\nAnswer: the code of bakilo is "


def test_ledger_conversation_reads_as_one_text() -> None:
    assert text_of(
        LEDGER, ("system", "Be brief."), ("user", Q1), ("assistant", "1234"), ("user", Q2)
    ) == (
        f"Be brief.\n\n{Q1}\nAnswer: the code of bakilo is 1234.\n\n"
        f"{Q2}\nAnswer: the code of terosuna is "
    )


@pytest.mark.parametrize(
    ("user", "opening"),
    [
        ("no question", "\nAnswer: "),
        ("Question: what is love", "\nAnswer: "),
        ("Question: what is a?\nQuestion: what is b?\nbye", "\nAnswer: b is "),
        ("Question: what is a?\nQuestion: what is b", "\nAnswer: a is "),
        ("so: Question: what is a?", "\nAnswer: "),
        ("Question: what is the age of X? \nthanks", "\nAnswer: the age of X is "),
    ],
)
def test_ledger_takes_the_last_whole_question_line(user: str, opening: str) -> None:
    assert text_of(LEDGER, ("user", user)) == user + opening


def test_ledger_does_not_double_the_full_stop() -> None:
    once = text_of(LEDGER, ("user", Q1), ("assistant", "1234."), ("user", Q2))
    assert once == text_of(LEDGER, ("user", Q1), ("assistant", "1234"), ("user", Q2))


def test_a_document_in_a_message_of_its_own_is_the_same_prompt() -> None:
    document, question = Q1.split("\n\n")
    together = LEDGER.encode([{"role": "user", "content": Q1}])
    apart = LEDGER.encode(
        [{"role": "user", "content": document}, {"role": "user", "content": question}]
    )
    assert together == apart
    assert len(document) in together.boundaries


def test_deepseek_layout() -> None:
    bos, eos, user, assistant, no_think = NEEDED
    assert text_of(DEEPSEEK, ("system", "S"), ("user", "U"), ("assistant", "A"), ("user", "V")) == (
        f"{bos}S{user}U{assistant}{no_think}A{eos}{user}V{assistant}{no_think}"
    )
    assert DEEPSEEK.start_ids == (1000,)


texts = st.text(min_size=1, max_size=40) | st.sampled_from([Q1, Q2, "Question: what is a?\n"])
turns = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


@given(turns, st.none() | texts)
@settings(max_examples=150, deadline=None)
def test_each_turn_continues_the_tokens_of_the_one_before(
    turns: list[tuple[str, str]], system: str | None
) -> None:
    for chat in (LEDGER, DEEPSEEK, PLAIN):
        messages: Messages = [] if system is None else [{"role": "system", "content": system}]
        tokens: list[int] = []
        borders: tuple[int, ...] = ()
        for user, answer in turns:
            messages.append({"role": "user", "content": user})
            encoded = chat.encode(messages)
            assert encoded.token_ids[: len(tokens)] == tokens
            assert encoded.boundaries[: len(borders)] == borders
            assert sorted(set(encoded.boundaries)) == list(encoded.boundaries)
            assert encoded.boundaries[-1] <= len(encoded.token_ids)
            tokens = encoded.token_ids + ByteTokenizer().encode(answer)
            borders = encoded.boundaries
            messages.append({"role": "assistant", "content": answer})


def test_long_texts_are_remembered_per_scope() -> None:
    class Counting(ByteTokenizer):
        calls = 0

        def encode(self, text: str) -> list[int]:
            self.calls += len(text) > 1000
            return super().encode(text)

    tokenizer = Counting()
    chat = LedgerChat(tokenizer)
    first: Messages = [{"role": "user", "content": "x" * 50_000 + "\n\n" + Q2}]
    once = chat.encode(first, scope=b"a")
    assert chat.encode(first, scope=b"a") == once
    assert tokenizer.calls == 1
    assert chat.encode(first, scope=b"b") == once
    assert tokenizer.calls == 2


def test_text_parts_and_developer_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    encoded = PLAIN.encode(
        [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    )
    assert ByteTokenizer().decode(encoded.token_ids) == "system: s\nuser: ab\nassistant: "


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([3], "messages[0]"),
        ([{"content": "a"}], "messages[0].role"),
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": 3}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0].type"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 1}]}],
            "messages[0].content[0].text",
        ),
        ([{"role": "user", "content": ""}], "messages"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "messages"),
        (
            [{"role": "assistant", "tool_calls": [{}]}, {"role": "user", "content": "a"}],
            "messages[0].tool_calls",
        ),
    ],
)
def test_wrong_messages_are_refused_by_place(messages: Any, param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        PLAIN.encode(messages)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": ({"type": "function"},)}, "tools"),
        ({"effort": "low"}, "reasoning_effort"),
        ({"thinking": True}, "chat_template_kwargs.thinking"),
        ({"task": "title"}, "chat_template_kwargs.task"),
    ],
)
def test_what_a_text_family_does_not_have_is_refused_by_name(
    options: dict[str, Any], param: str
) -> None:
    messages = [{"role": "user", "content": "a"}]
    for chat in (PLAIN, LEDGER):
        with pytest.raises(InvalidRequestError) as caught:
            chat.encode(messages, ChatOptions(**options))
        assert caught.value.param == param
        assert chat.encode(messages, ChatOptions(thinking=False, effort="none")).answer.plain


def test_the_model_folder_chooses_the_encoder(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"penstock": {"chat": "ledger"}}')
    assert isinstance(open_chat(str(tmp_path), ByteTokenizer()), LedgerChat)
    config.write_text("{}")
    assert isinstance(open_chat(str(tmp_path), ControlTokenizer()), DeepSeekV4Chat)
    assert isinstance(open_chat("fake", ByteTokenizer()), PlainChat)
    config.write_text('{"penstock": {"chat": "klingon"}}')
    with pytest.raises(ModelLoadError, match="klingon"):
        open_chat(str(tmp_path), ByteTokenizer())
