"""The tokenizer: lossless, names cut by syllables everywhere, full stop and digits alone."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training import documents, filler, vocabulary

TOKENIZER = vocabulary.tokenizer()


def pieces(text: str) -> list[str]:
    return [text[a:b] for a, b in TOKENIZER.encode(text).offsets]


@given(st.text(max_size=200))
@settings(max_examples=150, deadline=None)
def test_decoding_gives_the_text_back(text: str) -> None:
    if any(special in text for special in vocabulary.SPECIALS):
        return
    assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


@given(st.integers(0, 10**6), st.text(max_size=12), st.sampled_from(' \n.,:?"(;1'))
@settings(max_examples=300, deadline=None)
def test_a_name_is_one_token_per_syllable_in_every_context(
    seed: int, before: str, after: str
) -> None:
    name = documents.make_name(random.Random(seed))
    text = f"{before} {name}{after}"
    syllables = [name[i : i + 2] for i in range(0, len(name), 2)]
    got = pieces(text)
    assert any(got[i : i + len(syllables)] == syllables for i in range(len(got))), got


def test_a_chat_is_cut_the_same_alone_and_in_its_history() -> None:
    prompt = documents.QUESTION.format(name="bakilo")
    whole = "Some text\n\n" + prompt + "4821." + "\n\n" + documents.QUESTION.format(name="terosuna")
    got = pieces(whole)
    at = got.index("4")
    assert got[at : at + 6] == ["4", "8", "2", "1", ".", "\n\n"]
    assert got[at - 1] == got[-1] == " is "
    first = TOKENIZER.encode("Some text\n\n" + prompt).ids
    assert TOKENIZER.encode(whole).ids[: len(first)] == first


def test_size_and_fixed_ids() -> None:
    assert TOKENIZER.get_vocab_size() == vocabulary.SIZE
    assert [TOKENIZER.token_to_id(t) for t in (*vocabulary.SPECIALS, "UNKNOWN")] == [0, 1, 2, 3]
    assert vocabulary.as_json() == vocabulary.as_json()


@pytest.mark.parametrize("kind", [kind for kind, _ in filler.KINDS])
def test_filler_is_at_least_one_character_per_token(kind: object) -> None:
    assert callable(kind)
    text = kind(random.Random(1), 4000)
    ids = TOKENIZER.encode(text).ids
    assert TOKENIZER.decode(ids) == text
