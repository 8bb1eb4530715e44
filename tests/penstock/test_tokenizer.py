"""Tokenizers: round trips, bytes in streams, control tokens are data, long text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library

from penstock.errors import InvalidRequestError, ModelLoadError
from penstock.tokenizer import ByteTokenizer, HfTokenizer, byte_alphabet, open_tokenizer

WORDS = ("the ", "code ", "of ", " is ", "\n\n", "ba", "ki", "lo", "....", "  ")


def tokenizer_json() -> dict[str, object]:
    """A byte-level tokenizer with a few whole pieces and two control tokens, one kept visible."""
    table = byte_alphabet()
    vocabulary = {"<|eos|>": 0, "</think>": 1}
    for char in table:
        vocabulary[char] = len(vocabulary)
    for word in WORDS:
        vocabulary["".join(table[b] for b in word.encode())] = len(vocabulary)
    pattern = "|".join(w.replace(".", r"\.") for w in WORDS) + r"|[\s\S]"
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": 0, "content": "<|eos|>", "special": True, **flags},
            {"id": 1, "content": "</think>", "special": False, **flags},
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": pattern},
                    "behavior": "Isolated",
                    "invert": False,
                },
                level,
            ],
        },
        "decoder": level,
        "model": {"type": "BPE", "ignore_merges": True, "vocab": vocabulary, "merges": []},
    }


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    (folder / "config.json").write_text('{"eos_token_id": 0, "penstock": {"chat": "ledger"}}')
    return folder


@pytest.fixture(scope="session")
def hf(model_dir: Path) -> HfTokenizer:
    tokenizer = open_tokenizer(str(model_dir))
    assert isinstance(tokenizer, HfTokenizer)
    return tokenizer


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_every_text_comes_back(hf: HfTokenizer, text: str) -> None:
    for tokenizer in (hf, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@given(st.text(min_size=1), st.integers(0, 50))
@settings(max_examples=100, deadline=None)
def test_bytes_of_a_prefix_are_a_prefix(hf: HfTokenizer, text: str, cut: int) -> None:
    ids = hf.encode(text)
    cut = min(cut, len(ids))
    assert hf.decode_bytes(ids[:cut]) + hf.decode_bytes(ids[cut:]) == text.encode()
    spans = hf.byte_spans(ids)
    assert [text.encode()[a:b] for a, b in spans] == [hf.decode_bytes([i]) for i in ids]


def test_control_tokens_in_user_text_are_plain_text(hf: HfTokenizer) -> None:
    ids = hf.encode("a<|eos|>b</think>c")
    assert not {0, 1} & set(ids)
    assert hf.decode(ids) == "a<|eos|>b</think>c"


def test_control_tokens_decode_as_their_file_says(hf: HfTokenizer) -> None:
    assert hf.decode([0]) == ""
    assert hf.decode([0], specials=True) == "<|eos|>"
    assert hf.decode([1]) == "</think>"
    assert hf.eos_ids == {0}


@pytest.mark.parametrize(
    "text", ["the code of bakilo is 1234. \u00e9\u6f22\U0001f389\n\n", "....."]
)
def test_long_text_is_cut_into_windows_without_a_trace(hf: HfTokenizer, text: str) -> None:
    library = Library.from_str(json.dumps(tokenizer_json()))
    window, step = 65536, 65536 - 4096
    for size in (window - 1, window, window + 1, window + step, window + step + 1, 9 * step + 7):
        long = (text * (size // len(text) + 1))[:size]
        assert hf.encode(long) == library.encode(long).ids


def test_windows_that_find_no_joint_give_way_to_one_piece() -> None:
    # Whole-text tokens: neighbouring windows never agree on any.
    content = tokenizer_json() | {
        "pre_tokenizer": None,
        "model": {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"},
        "added_tokens": [],
    }
    tokenizer = HfTokenizer(Library.from_str(json.dumps(content)))
    assert tokenizer.encode(" " * 100_000) == [0]


@pytest.mark.parametrize("token", [-1, 257, 10**9])
def test_an_id_outside_the_vocabulary_is_refused(token: int, hf: HfTokenizer) -> None:
    with pytest.raises(InvalidRequestError, match="outside the vocabulary of 257"):
        ByteTokenizer().decode([token])
    if token != 257:
        with pytest.raises(InvalidRequestError, match="outside the vocabulary"):
            hf.decode([token])


def test_a_folder_without_a_tokenizer_opens_as_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert open_tokenizer(str(tmp_path)) is None


def test_a_missing_folder_and_a_broken_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no model at"):
        open_tokenizer(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        open_tokenizer(str(tmp_path))


def test_the_fake_has_a_byte_tokenizer() -> None:
    fake = open_tokenizer("fake")
    assert isinstance(fake, ByteTokenizer)
    assert fake.encode("\u00e9") == [0xC3, 0xA9]
    assert fake.decode([104, 105, 256]) == "hi"
