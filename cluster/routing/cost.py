"""The policy `cost`: the pair that is predicted to answer soonest.

    prefill   wait + max(compute of what cannot be resumed, fetch of what can) + publishing the end
    decode    the inter-token penalty + what it still attaches when prefill ends + wait for memory

Both rows are seconds. A pair's cost is their sum: a decode worker fetches committed blocks while
prefill runs, so what prefill takes hides that, and only the rest is exposed. Since a decode row
never grows when its prefill worker gets faster, the best prefill worker belongs to a best pair, and
P + D sums find the best of P x D.

*Wait.* Prompts take turns chunk by chunk: behind k others a prompt waits until they are done or
until each has had as many turns as it needs itself, whichever is sooner: min(their work, k x own).

*Inter-token penalty.* Tokens to draw (at most `PENALTY_TOKENS`) times what each costs: a step with
one sequence more, and the time by which it slows down the others of the batch.

*Duplicates.* A worker that is reading the same prefix for another request will have it when that is
done: there only the rest is computed, after all of its line.
"""

from __future__ import annotations

from collections.abc import Sequence

from cluster.policy import NOBODY, Resident, Route, RoutingPolicy, Shape, pairs
from cluster.routing.board import Board, Columns
from cluster.routing.table import Choice, Parts, able

LAST_CHUNK_TOKENS = 2_048
"""What of a prompt is published after its last step; it has nothing left to hide behind."""
PENALTY_TOKENS = 256
"""Most tokens that the inter-token penalty counts: max_tokens is a bound, not a forecast."""

_NEVER = float("inf")


class CostPolicy:
    """See the module."""

    def choose(
        self, board: Board, shape: Shape, resident: Resident, *, avoid: frozenset[str] = NOBODY
    ) -> Choice:
        best = None
        for group in able(board, avoid):
            terms = _Terms(shape, resident.for_(group.fingerprint))
            at, prefill_s = terms.best_prefill(group.prefill)
            to, decode_s = terms.best_decode(group.decode, prefill_s)
            if best is None or prefill_s + decode_s < best[0]:
                best = (prefill_s + decode_s, group, at, to, prefill_s, terms)
        assert best is not None, "`able` returns at least one group"
        _, group, at, to, prefill_s, terms = best
        return Choice(
            policy=RoutingPolicy.COST,
            route=Route(group.prefill.workers[at], group.decode.workers[to]),
            unit="s",
            shape=shape,
            resident=resident,
            groups=tuple(g.snapshot() for g in board.groups),
            out=board.out,
            avoid=avoid,
            prefill_parts=terms.prefill_parts,
            decode_parts=lambda columns, i: terms.decode_parts(columns, i, prefill_s),
        )


class _Terms:
    """What of the sums depends on the request alone."""

    __slots__ = (
        "_answer",
        "_fetch_bytes",
        "_near",
        "_new",
        "_pairs",
        "_prompt",
        "_resume",
        "_tail",
        "_total",
    )

    def __init__(self, shape: Shape, resident: Resident) -> None:
        self._prompt = shape.prompt_tokens
        self._total = shape.total_tokens
        self._resume = min(resident.resumable_tokens, self._prompt)
        self._new = self._prompt - self._resume
        self._pairs = pairs(self._resume, self._prompt)
        self._fetch_bytes = resident.fetch_bytes
        self._tail = min(self._new, LAST_CHUNK_TOKENS)
        self._answer = min(shape.max_tokens, PENALTY_TOKENS)
        self._near = {w: t for w, t in resident.near.items() if t > self._resume}

    def best_prefill(self, columns: Columns) -> tuple[int, float]:
        """Its place and its seconds: `prefill_parts` of all, where a decision's time goes to."""
        if self._near:
            return _least([self.prefill_parts(columns, i).total for i in columns.places])
        new, products, size_bytes, tail = self._new, self._pairs, self._fetch_bytes, self._tail
        at, least = 0, _NEVER
        for i, token_s, pair_s, byte_s, kv_token_s, line, count in zip(
            columns.places,
            columns.token_s,
            columns.pair_s,
            columns.byte_s,
            columns.kv_token_s,
            columns.work_s,
            columns.count,
            strict=True,
        ):
            work = new * token_s + products * pair_s
            fetch = size_bytes * byte_s
            if fetch > work:
                work = fetch
            turns = count * work
            cost = (line if line < turns else turns) + work + tail * kv_token_s
            if cost < least:
                at, least = i, cost
        return at, least

    def best_decode(self, columns: Columns, prefill_s: float) -> tuple[int, float]:
        """As `decode_parts`, of all. The first place if nowhere is ever room: the worker itself
        says so in its own words.
        """
        prompt, answer, tail = self._prompt, self._answer, self._tail
        # One fingerprint has one layout.
        need_bytes = self._total * columns.workers[0].bytes_per_token
        at, least = 0, _NEVER
        for i, step_s, kv_token_s, free_bytes in zip(
            columns.places, columns.step_s, columns.kv_token_s, columns.free_bytes, strict=True
        ):
            exposed, end = prompt * kv_token_s - prefill_s, tail * kv_token_s
            cost = answer * step_s + (end if end > exposed else exposed)
            if free_bytes < need_bytes:
                cost += self._wait_s(columns, i, need_bytes - free_bytes)
            if cost < least:
                at, least = i, cost
        return at, least

    def prefill_parts(self, columns: Columns, at: int) -> Parts:
        new, resume, fetch_bytes = self._new, self._resume, self._fetch_bytes
        near = self._near.get(columns.workers[at].worker_id)
        if near is not None:
            new, resume = self._prompt - near, near
        compute = new * columns.token_s[at] + pairs(resume, self._prompt) * columns.pair_s[at]
        fetch = fetch_bytes * columns.byte_s[at]
        work = max(compute, fetch)
        line = columns.work_s[at]
        wait = line if near is not None else min(line, columns.count[at] * work)
        tail = min(new, LAST_CHUNK_TOKENS) * columns.kv_token_s[at]
        return Parts(
            {"wait": wait, "work": work, "publish": tail},
            {"compute": compute, "fetch": fetch, "new_tokens": new, "before": columns.count[at]},
        )

    def decode_parts(self, columns: Columns, at: int, prefill_s: float) -> Parts:
        rate = columns.kv_token_s[at]
        attach = self._prompt * rate
        exposed = max(attach - prefill_s, self._tail * rate)
        worker = columns.workers[at]
        lacking = self._total * worker.bytes_per_token - columns.free_bytes[at]
        wait = self._wait_s(columns, at, lacking) if lacking > 0 else 0.0
        return Parts(
            {"penalty": self._answer * columns.step_s[at], "exposed": exposed, "wait": wait},
            {"attach": attach, "batch": columns.count[at], "free_bytes": columns.free_bytes[at]},
        )

    def _wait_s(self, columns: Columns, at: int, lacking: float) -> float:
        """Until `lacking` bytes are free: answers end evenly, and at least one has to."""
        capacity = columns.workers[at].capacity_bytes
        if self._total * columns.workers[at].bytes_per_token > capacity:
            return _NEVER
        return columns.stay_s[at] * max(1 / max(1, columns.count[at]), lacking / capacity)


def _least(costs: Sequence[float]) -> tuple[int, float]:
    least = min(costs)
    return costs.index(least), least
