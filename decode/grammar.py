"""Answers bound to a grammar: which tokens may come next. Contract, the real one, and a fake.

A constraint's state is a function of the grammar and of the answer's tokens alone. So a stream that
moves to another worker continues by opening the same grammar with the tokens so far, and drafts
need no rollback: only tokens that stand are accepted.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from penstock.errors import InvalidRequestError
from penstock.request import Grammar
from penstock.tokenizer import Tokenizer

Allowed = npt.NDArray[np.bool_]


class Constraint(Protocol):
    """Of one answer. Driven by one thread at a time; garbage collection is its end."""

    def allowed(self) -> Allowed | None:
        """[V] which tokens may come next; never none at all. None: whatever comes, as after the
        answer's end. Raises InvalidRequestError for a grammar that cannot be followed further.
        """

    def accept(self, token: int) -> None:
        """The next token of the answer. Raises InvalidRequestError if it was not allowed."""


class Grammars(Protocol):
    """Opens constraints. Thread-safe."""

    def open(self, grammar: Grammar, answer: Sequence[int] = ()) -> Constraint:
        """The state after `answer`. Raises InvalidRequestError for a grammar that cannot be
        compiled. May take some 100 ms: call it in a thread.
        """


class LlGrammars:
    """Grammars in llguidance's Lark dialect, for one vocabulary."""

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos: frozenset[int]) -> None:
        """`vocab_size` is the engine's: as long as its rows of logits."""
        self._tokenizer, self._vocab_size, self._eos = tokenizer, vocab_size, eos
        self._lock = threading.Lock()
        self._built: LLTokenizer | None = None

    def open(self, grammar: Grammar, answer: Sequence[int] = ()) -> Constraint:
        matcher = LLMatcher(self._library(), grammar.text, log_level=0, limits=_limits())
        if matcher.is_error():
            raise InvalidRequestError(
                f"the grammar cannot be compiled: {_first_line(matcher.get_error())}",
                param="response_format",
            )
        constraint = _LlConstraint(matcher, self._vocab_size, self._eos, grammar.starts_after)
        for token in answer:
            constraint.accept(token)
        return constraint

    def _library(self) -> LLTokenizer:
        """Built when the first grammar comes: a second for a large vocabulary."""
        with self._lock:
            if self._built is None:
                wrapped = TokenizerWrapper(_Vocabulary(self._tokenizer, self._eos))
                self._built = LLTokenizer(
                    wrapped, n_vocab=self._vocab_size, eos_token=sorted(self._eos)
                )
            return self._built


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, eos: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(eos)
        self.bos_token_id = None
        ids = range(tokenizer.vocab_size)
        self.tokens = [tokenizer.decode_bytes([token], specials=True) for token in ids]
        # Control tokens are never text, however they are spelled.
        self.special_token_ids = sorted(tokenizer.control_ids | eos)
        for token in self.special_token_ids:
            # One without a spelling would be taken for an empty text.
            self.tokens[token] = self.tokens[token] or b"<[%d]>" % token

    def __call__(self, text: bytes | str) -> list[int]:
        given = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(given)


class _LlConstraint:
    def __init__(
        self, matcher: LLMatcher, vocab_size: int, eos: frozenset[int], starts_after: int | None
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._eos = eos
        self._waits_for = starts_after
        self._over = False

    def allowed(self) -> Allowed | None:
        if self._over:
            return None
        if self._waits_for is not None:
            # Whatever is thought, the answer itself must still come.
            free = np.ones(self._vocab_size, dtype=np.bool_)
            free[sorted(self._eos)] = False
            return free
        raw = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        return np.unpackbits(raw, count=self._vocab_size, bitorder="little").view(np.bool_)

    def accept(self, token: int) -> None:
        if self._over:
            return
        if self._waits_for is not None:
            if token == self._waits_for:
                self._waits_for = None
            return
        if not self._matcher.consume_token(token):
            self._check()
            raise InvalidRequestError(f"the grammar does not allow token {token} here")
        self._over = token in self._eos

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InvalidRequestError(
                "the answer cannot follow its grammar any further: "
                f"{_first_line(self._matcher.get_error())}; ask for a simpler schema",
                param="response_format",
            )


def _limits() -> LLParserLimits:
    """A client's grammar may cost a step some milliseconds, not seconds."""
    return LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


def _first_line(text: str) -> str:
    return " ".join(text.split())[:300]


class FakeGrammars:
    """The contract without a library: a grammar is a JSON list of texts, one of which is to be
    written, each token being a byte (`penstock.tokenizer.ByteTokenizer`).
    """

    def __init__(self, *, vocab_size: int = 257, eos: frozenset[int] = frozenset({256})) -> None:
        self._vocab_size, self._eos = vocab_size, eos

    def open(self, grammar: Grammar, answer: Sequence[int] = ()) -> Constraint:
        try:
            texts = [text.encode() for text in json.loads(grammar.text)]
        except (ValueError, AttributeError, TypeError) as error:
            raise InvalidRequestError("a fake grammar is a JSON list of texts") from error
        constraint = _FakeConstraint(texts, self._vocab_size, self._eos, grammar.starts_after)
        for token in answer:
            constraint.accept(token)
        return constraint


class _FakeConstraint:
    def __init__(
        self, texts: list[bytes], vocab_size: int, eos: frozenset[int], starts_after: int | None
    ) -> None:
        self._left, self._vocab_size, self._eos = texts, vocab_size, eos
        self._waits_for = starts_after
        self._over = False

    def allowed(self) -> Allowed | None:
        if self._over:
            return None
        mask = np.zeros(self._vocab_size, dtype=np.bool_)
        if self._waits_for is not None:
            mask[:] = True
            mask[sorted(self._eos)] = False
            return mask
        for text in self._left:
            mask[text[0] if text else sorted(self._eos)] = True
        return mask

    def accept(self, token: int) -> None:
        allowed = self.allowed()
        if allowed is None:
            return
        if not allowed[token]:
            raise InvalidRequestError(f"the grammar does not allow token {token} here")
        if self._waits_for is not None:
            self._waits_for = None if token == self._waits_for else self._waits_for
        elif token in self._eos:
            self._over = True
        else:
            self._left = [text[1:] for text in self._left if text[:1] == bytes([token])]
