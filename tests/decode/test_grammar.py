"""Answers bound to a grammar through the decode worker's door: the contract on the fake and on the
real library, with drafts and without, replayed from their tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from decode.grammar import FakeGrammars, Grammars, LlGrammars
from model.fake import EOS, VOCAB, FakeSettings
from penstock.errors import InvalidRequestError
from penstock.request import Grammar
from penstock.tokenizer import ByteTokenizer
from protos.penstock.worker.v1 import worker_pb2
from tests.decode.pair import DRAWN, GREEDY, failure, pair, prompt_of

TEXTS = ["an", "and so on", "none of it", "b"]


def real() -> Grammars:
    return LlGrammars(ByteTokenizer(), vocab_size=VOCAB, eos=frozenset({EOS}))


def lark(texts: list[str]) -> str:
    return "start: " + " | ".join(json.dumps(text) for text in texts)


Kind = tuple[Callable[[], Grammars], Callable[[list[str]], str]]
KINDS: dict[str, Kind] = {"fake": (FakeGrammars, json.dumps), "llguidance": (real, lark)}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


WORDS = st.lists(st.text("abc", min_size=1, max_size=5), min_size=1, max_size=5, unique=True)


@pytest.mark.parametrize("name", list(KINDS))
@given(texts=WORDS, data=st.data())
def test_exactly_the_texts_can_be_written(name: str, texts: list[str], data: st.DataObject) -> None:
    make, write = KINDS[name]
    grammars, grammar = make(), Grammar(write(texts))
    constraint, said = grammars.open(grammar), bytearray()
    while (allowed := constraint.allowed()) is not None:
        going_on = {t.encode()[len(said)] for t in texts if t.encode()[: len(said) + 1] != said and
                    t.encode().startswith(bytes(said))}  # fmt: skip
        want = going_on | ({EOS} if bytes(said).decode() in texts else set())
        assert {token for token in range(VOCAB) if allowed[token]} == want
        token = data.draw(st.sampled_from(sorted(want)))
        constraint.accept(token)
        # Another worker continues from the tokens alone.
        constraint = grammars.open(grammar, [*said, token])
        said += bytes([token]) if token != EOS else b""
    assert bytes(said).decode() in texts


def test_wrong_tokens_and_wrong_grammars_are_refused(kind: Kind) -> None:
    make, write = kind
    constraint = make().open(Grammar(write(["ab"])))
    with pytest.raises(InvalidRequestError):
        constraint.accept(ord("z"))
    with pytest.raises(InvalidRequestError):
        make().open(Grammar("start: %%% ("))


def test_nothing_is_bound_before_the_reasoning_ends(kind: Kind) -> None:
    make, write = kind
    constraint = make().open(Grammar(write(["ab"]), starts_after=ord("|")))
    for byte in b"z]{|":
        allowed = constraint.allowed()
        assert allowed is not None and allowed.sum() == VOCAB - 1 and not allowed[EOS]
        constraint.accept(byte)
    allowed = constraint.allowed()
    assert allowed is not None and [t for t in range(VOCAB) if allowed[t]] == [ord("a")]


@pytest.mark.parametrize("sampling", [GREEDY, DRAWN], ids=["greedy", "drawn"])
async def test_drafts_change_no_bound_answer(kind: Kind, sampling: object) -> None:
    make, write = kind
    wanted = worker_pb2.Grammar(text=write(TEXTS))
    for seed in range(6):
        prompt, answers = prompt_of(300, seed), []
        for drafts in (0, 4):
            async with pair(
                settings=FakeSettings(draft_tokens=drafts), decode_grammars=make()
            ) as workers:
                answers.append(await workers.ask(prompt, sampling=sampling, grammar=wanted))
                await workers.settles()
        plain, drafted = answers
        assert plain.text in TEXTS
        assert plain.reason == "stop"
        assert (plain.token_ids, plain.digests) == (drafted.token_ids, drafted.digests)


async def test_a_grammar_stops_at_a_stop_string_and_leaves_others_alone() -> None:
    grammar = worker_pb2.Grammar(text=lark(["and so on"]))
    async with pair(decode_grammars=real()) as workers:
        bound = await workers.ask(prompt_of(300), grammar=grammar, stop=["so"])
        assert (bound.text, bound.reason) == ("and ", "stop")
        free = await workers.ask(prompt_of(300), max_tokens=30)
        assert len(free.token_ids) > 5
        error = await failure(
            workers.ask(prompt_of(300), grammar=worker_pb2.Grammar(text="start: missing"))
        )
        assert isinstance(error, InvalidRequestError)
        await workers.settles()
    async with pair() as workers:
        error = await failure(workers.ask(prompt_of(300), grammar=grammar))
        assert "tokenizer.json" in error.message


def test_llguidances_schema_grammar_is_what_the_wire_carries() -> None:
    text = LLMatcher.grammar_from_json_schema({"const": [1]})
    constraint = real().open(Grammar(text), list(b"[1]"))
    allowed = constraint.allowed()
    assert allowed is not None and [t for t in range(VOCAB) if allowed[t]] == [EOS]
