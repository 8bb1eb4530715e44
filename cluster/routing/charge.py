"""A request's charges on its two workers: from the decision to the end, less as it gets on."""

from __future__ import annotations

from cluster.policy import DECODE, NO_LOAD, PREFILL, Load, Resident, Route, Shape, pairs
from cluster.routing.board import Board


class Charged:
    """One request on one board. Every method may be called at any time, also after `close`.

    Prefill carries what is still to compute: predicted at first, then as its progress tells, gone
    with the first token. Decode carries the sequence and its memory until the end.
    """

    def __init__(self, board: Board, route: Route, shape: Shape, resident: Resident) -> None:
        self._board = board
        self._shape = shape
        size_bytes = int(shape.total_tokens * route.decode.bytes_per_token)
        self._workers = {PREFILL: route.prefill.worker_id, DECODE: route.decode.worker_id}
        self._held: dict[str, Load] = {}
        near = resident.near.get(route.prefill.worker_id, 0)
        self._set(PREFILL, self._left(max(resident.resumable_tokens, near)))
        self._set(DECODE, Load(sequences=1, size_bytes=size_bytes))

    def read(self, tokens_done: int) -> None:
        """So many prompt tokens are ready, restored ones included."""
        if PREFILL in self._held:
            self._set(PREFILL, self._left(tokens_done))

    def answering(self) -> None:
        """The first token is there: nothing is left to do for prefill."""
        self._set(PREFILL, NO_LOAD)

    def close(self) -> None:
        """Release whatever is still charged."""
        for role in tuple(self._held):
            self._set(role, NO_LOAD)

    def _left(self, done: int) -> Load:
        end = self._shape.prompt_tokens
        done = min(max(done, 0), end)
        return Load(tokens=end - done, pairs=pairs(done, end), prompts=1)

    def _set(self, role: str, load: Load) -> None:
        before = self._held.pop(role, NO_LOAD)
        if load != NO_LOAD:
            self._held[role] = load
        if load != before:
            self._board.charge(self._workers[role], load - before)
