"""Text of a stream: whole characters only, cut at the first stop string, however it was split."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from decode.detokenize import Detokenizer
from decode.output import Output
from decode.stop import StopFilter
from penstock.request import StopRule
from penstock.tokenizer import ByteTokenizer
from tests.decode.pair import oracle, pair, prompt_of

ALPHABET = "ab\u00e9\u20ac\U0001f600"
TEXT = st.text(alphabet=ALPHABET, max_size=40)
STOPS = st.lists(st.text(alphabet=ALPHABET, min_size=1, max_size=4), max_size=4)
BYTES = ByteTokenizer()


def cut(text: str, stops: list[str]) -> tuple[str, bool]:
    """Character by character: the stop string that is complete first, the longest of those."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))], True
    return text, False


@given(text=TEXT, stops=STOPS, data=st.data())
def test_the_shown_text_is_the_text_cut_at_the_first_stop_string(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    want, stopped = cut(text, stops)
    filter_, shown, rest = StopFilter(stops), "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        shown += filter_.feed(rest[:size])
        rest = rest[size:]
        assert want.startswith(shown), "text was shown that had to be taken back"
    assert filter_.stopped == stopped
    assert shown + filter_.flush() == want


@given(st.binary(max_size=60))
def test_text_by_tokens_is_the_text_of_all_tokens(raw: bytes) -> None:
    detokenizer = Detokenizer(BYTES.decode_bytes)
    text = "".join(detokenizer.feed(byte) for byte in raw) + detokenizer.flush()
    assert text == raw.decode("utf-8", errors="replace")


@given(TEXT)
def test_no_half_character_is_shown(text: str) -> None:
    detokenizer, shown = Detokenizer(BYTES.decode_bytes), ""
    for byte in text.encode():
        shown += detokenizer.feed(byte)
        assert text.startswith(shown)
    assert shown == text


@given(text=TEXT, stops=STOPS, min_tokens=st.integers(0, 6), ignore_eos=st.booleans())
def test_an_output_ends_by_its_rules(
    text: str, stops: list[str], min_tokens: int, ignore_eos: bool
) -> None:
    tokens = [*text.encode(), BYTES.END]
    rule = StopRule(max(len(tokens), min_tokens), min_tokens, ignore_eos, tuple(stops))
    output, shown, reason = Output(rule, BYTES.eos_ids, BYTES.decode_bytes), "", None
    for token in tokens:
        if token in output.forbidden:
            break
        piece = output.accept(token)
        shown, reason = shown + piece.text, piece.reason
        if reason:
            break
    shown += output.close()
    assert text.startswith(shown)
    assert output.count >= min_tokens or reason is None
    if not min_tokens:
        want, stopped = cut(text, stops)
        assert shown == want
        assert reason == ("length" if ignore_eos and not stopped else "stop")


async def test_stop_strings_through_the_door() -> None:
    prompt = prompt_of(400)
    plain = oracle(prompt, max_tokens=120, ignore_eos=True)
    stop = plain.text[37:40]
    async with pair() as workers:
        got = await workers.ask(prompt, max_tokens=120, ignore_eos=True, stop=[stop, "never here"])
        assert got.text == plain.text[: plain.text.index(stop)]
        assert got.reason == "stop"
        assert got.token_ids == plain.token_ids[: got.completion_tokens]
        await workers.settles()


async def test_min_tokens_keeps_the_end_away() -> None:
    async with pair() as workers:
        prompt = next(
            p for p in map(prompt_of, range(1, 2000)) if oracle(p, max_tokens=8).reason == "stop"
        )
        got = await workers.ask(prompt, max_tokens=40, min_tokens=20)
        want = oracle(prompt, max_tokens=40, min_tokens=20)
        assert len(got.token_ids) >= 20
        assert (got.token_ids, got.reason) == (want.token_ids, want.reason)
