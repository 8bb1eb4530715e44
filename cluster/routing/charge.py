"""A request's charges on its two workers: from the decision to the end, less as it gets on."""

from __future__ import annotations

from cluster.policy import Load, Resident, Route, Shape, pairs
from cluster.routing.board import Board


class Charged:
    """One request on one board. Every method may be called at any time, also after `close`.

    Prefill carries what is still to compute: predicted at first, then as its progress tells, gone
    with the first token. Decode carries the sequence and its memory until the end.
    """

    __slots__ = ("_board", "_decode", "_prefill", "_route", "_shape")

    def __init__(self, board: Board, route: Route, shape: Shape, resident: Resident) -> None:
        self._board, self._route, self._shape = board, route, shape
        near = resident.near.get(route.prefill.worker_id, 0) if resident.near else 0
        self._prefill: Load | None = self._left(max(resident.resumable_tokens, near))
        size_bytes = int(shape.total_tokens * route.decode.bytes_per_token)
        self._decode: Load | None = Load(sequences=1, size_bytes=size_bytes)
        board.charge(route.prefill.worker_id, self._prefill)
        board.charge(route.decode.worker_id, self._decode)

    def read(self, tokens_done: int) -> None:
        """So many prompt tokens are ready, restored ones included."""
        if self._prefill is not None:
            self.answering()
            self._prefill = self._left(tokens_done)
            self._board.charge(self._route.prefill.worker_id, self._prefill)

    def answering(self) -> None:
        """The first token is there: nothing is left to do for prefill."""
        if self._prefill is not None:
            self._board.charge(self._route.prefill.worker_id, self._prefill, back=True)
            self._prefill = None

    def close(self) -> None:
        """Release whatever is still charged."""
        self.answering()
        if self._decode is not None:
            self._board.charge(self._route.decode.worker_id, self._decode, back=True)
            self._decode = None

    def _left(self, done: int) -> Load:
        end = self._shape.prompt_tokens
        done = min(max(done, 0), end)
        return Load(tokens=end - done, pairs=pairs(done, end), prompts=1)
