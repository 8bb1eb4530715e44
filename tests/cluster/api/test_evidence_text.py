"""Where evidence stands in the client's own text: characters, not tokens, whatever the script."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from api_harness import Api
from hypothesis import given
from hypothesis import strategies as st

from cluster.api.evidence import EvidenceText, PromptText, contents
from penstock.chat import ChatOptions, PlainChat, open_chat
from penstock.request import EvidenceSpan, TokenChunk
from penstock.tokenizer import ByteTokenizer, Tokenizer, open_tokenizer
from tests.penstock import v4_folder as v4

LEDGER = open_tokenizer("ledger")
assert LEDGER is not None
TOKENIZERS: dict[str, Tokenizer] = {"bytes": ByteTokenizer(), "ledger": LEDGER}
texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=300)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(texts, st.data())
def test_offsets_are_those_of_the_characters_that_the_tokens_touch(
    name: str, text: str, data: st.DataObject
) -> None:
    """Against the plain meaning: the shortest piece of text whose bytes hold the tokens' bytes."""
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    start = data.draw(st.integers(0, len(ids) - 1))
    end = data.draw(st.integers(start + 1, len(ids)))
    place = PromptText(tokenizer, ids, [text]).place(start, end)
    byte_start, byte_end = (
        tokenizer.byte_spans(ids)[start][0],
        tokenizer.byte_spans(ids)[end - 1][1],
    )
    borders = [len(text[:n].encode()) for n in range(len(text) + 1)]
    first = max(n for n, at in enumerate(borders) if at <= byte_start)
    behind = min(n for n, at in enumerate(borders) if at >= byte_end)
    assert place == (0, first, behind)


def test_a_long_text_has_the_same_offsets_across_pages() -> None:
    text = "".join(chr(0x3B1 + n % 24) * 3 + " " for n in range(4000))
    ids = LEDGER.encode(text)
    prompt = PromptText(LEDGER, ids, [text])
    assert len(ids) > 5 * 1024
    spans = LEDGER.byte_spans(ids)
    characters = [len(text.encode()[:a].decode(errors="ignore")) for a, _ in spans]
    for token in range(0, len(ids) - 1, 97):
        _, first, _ = prompt.place(token, token + 1) or (0, -1, -1)
        assert first == characters[token]


def test_each_message_counts_its_own_characters() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}],
        },
        {"role": "assistant", "content": "Be brief? Yes."},
        {"role": "user", "content": "three"},
    ]
    for name, tokenizer in TOKENIZERS.items():
        chat_of = PlainChat(tokenizer) if name == "bytes" else open_chat("ledger", tokenizer)
        ids = chat_of.encode(messages).token_ids
        prompt = PromptText(tokenizer, ids, contents(messages))
        found: dict[int, set[int]] = {}
        for token in range(len(ids)):
            place = prompt.place(token, token + 1)
            if place is not None:
                found.setdefault(place[0], set()).update(range(place[1], place[2]))
        lengths = [len("Be brief."), len("one two"), len("Be brief? Yes."), len("three")]
        assert found == {n: set(range(length)) for n, length in enumerate(lengths)}


def test_a_text_that_could_stand_in_two_places_has_none() -> None:
    tokenizer = ByteTokenizer()
    messages = [{"role": "user", "content": "u"}]
    ids = PlainChat(tokenizer).encode(messages).token_ids
    prompt = PromptText(tokenizer, ids, contents(messages))
    assert [prompt.place(n, n + 1) for n in range(len(ids))] == [None] * len(ids)


def test_without_a_tokenizer_there_are_token_offsets_only() -> None:
    text = EvidenceText(None, [1, 2, 3, 4], names_message=False)
    told = text.add(TokenChunk(0, (7,), "", (EvidenceSpan(0, 3, 0.5),)))
    assert told == [
        {"start": 0, "end": 3, "mass": 0.5, "text": "", "char_start": None, "char_end": None}
    ]


async def test_completions_count_in_the_prompt(client: httpx.AsyncClient, api: Api) -> None:
    prompt = "Z\u00fcrich: the code of bakilo is 1234. " * 4
    ids = list(prompt.encode())
    for given_as in (prompt, ids):
        body = {"model": "fake", "prompt": given_as, "evidence": True, "max_tokens": 6, "seed": 1}
        answer = await client.post("/v1/completions", json=body | {"ignore_eos": True})
        found = answer.json()["choices"][0]["evidence"]
        assert found
        for span in found:
            piece = prompt[span["char_start"] : span["char_end"]]
            assert bytes(ids[span["start"] : span["end"]]) in piece.encode()
            assert "message" not in span


def test_a_v4_conversation_maps_back_to_its_messages(tmp_path: Path) -> None:
    """Controls, joined pieces and reasoning stand between the texts; nothing shifts."""
    folder = v4.write_folder(tmp_path, goldens=v4.GOLDENS)
    tokenizer = open_tokenizer(folder)
    assert tokenizer is not None
    messages = [
        {"role": "system", "content": "Be careful. <think> is no tag here"},
        {"role": "user", "content": "caf\u00e9: the code of bakilo is 4821. \U0001f600 more"},
        {"role": "assistant", "content": "4821", "reasoning_content": "It says 4821."},
        {"role": "user", "content": "And the code of terosuna?"},
    ]
    for thinking in (False, True):
        options = ChatOptions(thinking=thinking, drop_thinking=not thinking)
        ids = open_chat(folder, tokenizer).encode(messages, options).token_ids
        prompt = PromptText(tokenizer, ids, contents(messages))
        found: dict[int, set[int]] = {}
        for token in range(len(ids)):
            place = prompt.place(token, token + 1)
            if place is not None:
                found.setdefault(place[0], set()).update(range(place[1], place[2]))
        wanted = {n: set(range(len(m["content"]))) for n, m in enumerate(messages)}
        if thinking:
            # "4821" now stands in the reasoning as well: its place is not certain, so it has none.
            wanted.pop(2)
        assert found == wanted
