"""`Passage`: one request's way over its two workers, as its front sees it pass.

It keeps the charges, the note that its prompt is being read, and what its events tell about the
workers' speed and about what the store holds. No I/O; `clock` is the caller's, monotonic, in
seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from cluster.contracts import WorkerView
from cluster.policy import NOTHING, Resident, Route, Shape
from cluster.routing.board import Board
from cluster.routing.charge import Charged
from cluster.routing.fit import NEW, Fit
from cluster.routing.learnt import Learnt
from cluster.routing.routed import InFlight, Reading
from penstock.identity import Chain

_LEAST_FETCH_BYTES = 1 << 20
"""Less says more about round trips than about bytes a second."""
_LEAST_TOKENS = 8
"""Of a stream, to tell the time of a step."""


@dataclass(frozen=True)
class Books:
    """What all passages of one router write into."""

    board: Board
    flying: InFlight
    fits: dict[str, Fit]
    """By worker id."""
    learnt: Learnt
    clock: Callable[[], float]


@dataclass(frozen=True)
class Prompt:
    """What is remembered of a prompt while it passes."""

    chain: Chain
    boundaries: tuple[int, ...] = ()


class Passage:
    """Every method may be called at any time, also after `close`, and twice."""

    def __init__(
        self,
        books: Books,
        route: Route,
        shape: Shape,
        resident: Resident = NOTHING,
        reading: Reading | None = None,
        prompt: Prompt | None = None,
    ) -> None:
        self.route = route
        self._prompt = prompt
        self._expected = resident.resumable_tokens
        self._books, self._reading = books, reading
        self._prefill, self._decode = route.prefill, route.decode
        self._prompt_tokens = shape.prompt_tokens
        # Prompts before this one: only with none is the time to its start that of its fetch.
        self._before = books.board.load(self._prefill.worker_id).prompts
        self._charged = Charged(books.board, route, shape, resident)
        self._granted_at: float | None = None
        self._started = False
        self._first_at = self._last_at = 0.0
        self._tokens = 0
        self._sequences = 0.0

    def granted(self) -> None:
        """The decode worker has given it a place; prefill is called now."""
        if self._granted_at is None:
            self._granted_at = self._books.clock()

    def read(self, tokens_done: int, cached_tokens: int) -> None:
        """Progress of the prompt."""
        if not self._started and self._granted_at is not None:
            self._started = True
            if self._prompt is not None:
                self._books.learnt.restored(
                    self._prompt.chain, expected=self._expected, actual=cached_tokens
                )
            size_bytes = int(cached_tokens * self._prefill.bytes_per_token)
            if size_bytes >= _LEAST_FETCH_BYTES and not self._before:
                seconds = self._books.clock() - self._granted_at
                self._learn(self._prefill, lambda fit: fit.fetched(size_bytes, seconds))
        self._charged.read(tokens_done)

    def computed(self, cached_tokens: int, seconds: float) -> None:
        """The prompt has been read; its own steps took so long."""
        end = self._prompt_tokens
        if self._prompt is not None:
            chain, boundaries = self._prompt.chain, self._prompt.boundaries
            self._books.learnt.read(chain, boundaries, self._prefill.bytes_per_token)
        self._learn(self._prefill, lambda fit: fit.read(cached_tokens, end, seconds))
        self._landed()

    def answering(self) -> None:
        """Nothing is left to do for prefill."""
        self._charged.answering()

    def drew(self, tokens: int) -> None:
        """Tokens of the answer; the first ones end prefill's part."""
        now = self._books.clock()
        here = self._books.board.load(self._decode.worker_id).sequences
        if not self._tokens:
            self.answering()
            self._first_at, self._sequences = now, here
            self._tokens = 1
        else:
            self._tokens += tokens
        self._last_at = now
        self._sequences += (here - self._sequences) * min(1.0, tokens / self._tokens)

    def close(self) -> None:
        """The end, whichever it was: releases everything and keeps what was learnt."""
        self._charged.close()
        self._landed()
        drawn, seconds = self._tokens - 1, self._last_at - self._first_at
        if drawn >= _LEAST_TOKENS:
            sequences = self._sequences
            self._learn(self._decode, lambda fit: fit.drew(drawn, seconds, sequences=sequences))
        if self._tokens and self._granted_at is not None:
            stayed = self._books.clock() - self._granted_at
            self._learn(self._decode, lambda fit: fit.stayed(stayed))
        self._tokens = 0

    def _landed(self) -> None:
        if self._reading is not None:
            self._books.flying.end(self._reading)
            self._reading = None

    def _learn(self, worker: WorkerView, told: Callable[[Fit], Fit]) -> None:
        fits = self._books.fits
        fits[worker.worker_id] = told(fits.get(worker.worker_id, NEW))
