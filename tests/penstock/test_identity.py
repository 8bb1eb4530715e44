"""Identity: the vectors of `docs/kv-identity.md`, an independent rendering of its formulas, and
the laws that a chain obeys.
"""

from __future__ import annotations

import hashlib
import hmac
import itertools
import re
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.identity import Chain, fingerprint, namespace

PAGE = Path(__file__).parents[2] / "docs" / "kv-identity.md"
FACTS = {"model": "penstock-test", "layout": 1, "numerics": "exact", "note": "\u00e9"}
KEY = b"penstock-test-key"
TOKENS = [number * 2654435761 % 129280 for number in range(700)]

TOKEN = st.integers(0, 2**32 - 1)


def vectors() -> dict[str, str]:
    rows = re.findall(r"^\| (.+?) \| `([0-9a-f]{64})` \|$", PAGE.read_text(), re.MULTILINE)
    return dict(rows)


def known() -> dict[str, bytes]:
    """What this implementation says for each row of the page."""
    fingerprint_ = fingerprint(FACTS)
    acme = namespace(KEY, "acme")
    chain = Chain.start(fingerprint_, acme).extend(TOKENS)
    values = {
        "fingerprint": fingerprint_,
        "namespace, key `penstock-test-key`, tenant empty, salt empty": namespace(KEY, ""),
        "namespace, same key, tenant `acme`, salt empty": acme,
        "namespace, same key, tenant `acme`, salt `salt`": namespace(KEY, "acme", "salt"),
        "root `h_0`": chain.root,
        "block `h_1`": chain.blocks[0],
        "block `h_2`": chain.blocks[1],
    }
    states = {f"state({p})": chain.state_id(p) for p in (1, 255, 256, 257, 512, 700)}
    return values | states


def test_the_page_s_vectors_hold() -> None:
    assert {name: value.hex() for name, value in known().items()} == vectors()
    assert (TOKENS[:4], TOKENS[-1]) == ([0, 58801, 117602, 47123], 120139)
    assert len(Chain.start(b"", b"").extend(TOKENS).blocks) == 2


@given(tokens=st.lists(TOKEN, max_size=800), data=st.data())
def test_ids_follow_the_formulas_of_the_page(tokens: list[int], data: st.DataObject) -> None:
    key, tenant, salt = (data.draw(st.binary(max_size=40)), data.draw(st.text()), "s")
    tenancy = hmac.new(key, tenant.encode() + b"\0" + salt.encode(), "sha256").digest()
    assert namespace(key, tenant, salt) == tenancy
    h = [hashlib.sha256(b"penstock-kv-1" + bytes(32) + tenancy).digest()]
    for start in range(0, len(tokens) - 255, 256):
        body = struct.pack("<256I", *tokens[start : start + 256])
        h.append(hashlib.sha256(h[-1] + body).digest())
    chain = Chain.start(bytes(32), tenancy).extend(tokens)
    assert [chain.root, *chain.blocks] == h
    assert [chain.parent(index) for index in range(len(h))] == h
    for position in data.draw(st.lists(st.integers(1, max(1, len(tokens))), max_size=3)):
        if position <= len(tokens):
            tail = tokens[position // 256 * 256 : position]
            body = b"state" + h[position // 256] + struct.pack(f"<{len(tail)}I", *tail)
            assert chain.state_id(position) == hashlib.sha256(body).digest()


@given(length=st.integers(0, 1500), cuts=st.lists(st.integers(0, 1500), max_size=6))
def test_extending_in_any_pieces_gives_the_same_chain(length: int, cuts: list[int]) -> None:
    tokens = [number * 7919 % 50_000 for number in range(length)]
    borders = [0, *sorted(min(cut, length) for cut in cuts), length]
    chain = Chain.start(b"f", b"n")
    for start, end in itertools.pairwise(borders):
        chain = chain.extend(tokens[start:end])
    assert chain == Chain.start(b"f", b"n").extend(tokens)


@given(place=st.integers(0, 699), token=TOKEN)
def test_a_changed_token_changes_its_block_and_all_that_follow(place: int, token: int) -> None:
    before = Chain.start(b"f", b"n").extend(TOKENS)
    changed = [*TOKENS[:place], token, *TOKENS[place + 1 :]]
    after = Chain.start(b"f", b"n").extend(changed)
    same = token == TOKENS[place]
    for index in range(2):
        expect_equal = same or place >= (index + 1) * 256
        assert (before.blocks[index] == after.blocks[index]) == expect_equal
    assert (before.state_id(700) == after.state_id(700)) == same


def test_no_two_roots_agree() -> None:
    roots = {Chain.start(f, n).root for f in (b"1" * 32, b"2" * 32) for n in (b"3" * 32, b"4" * 32)}
    assert len(roots) == 4


def test_blocks_and_states_never_share_an_id() -> None:
    chain = Chain.start(b"f", b"n").extend(TOKENS)
    states = [chain.state_id(position) for position in range(1, 701)]
    assert len({*states, *chain.blocks, chain.root}) == 703


@pytest.mark.parametrize("position", [-1, 0, 701])
def test_a_position_outside_the_tokens_has_no_state(position: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        Chain.start(b"f", b"n").extend(TOKENS).state_id(position)


@pytest.mark.parametrize("token", [-1, 2**32])
def test_a_token_that_is_no_u32_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        Chain.start(b"f", b"n").extend([token] * 256)
