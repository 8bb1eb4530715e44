"""`Board`: live workers with their loads and costs, in columns, so that a choice is one short loop.

    load of a worker = what this process charged to it + what others gave it

The first part is exact at any moment. The second is a guess from the heartbeat, which reports
everything: what it reports beyond the most that we had charged around then (`others_of`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

from cluster.contracts import WorkerView
from cluster.policy import DECODE, NO_LOAD, PREFILL, Coefficients, Load
from penstock.errors import WorkerUnavailableError


@dataclass
class Columns:
    """One role's workers of one fingerprint, ascending by id; entry i of each list is worker i's.

    Seconds and bytes. The last five change with every charge.
    """

    workers: list[WorkerView] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    pair_s: list[float] = field(default_factory=list)
    byte_s: list[float] = field(default_factory=list)
    """Seconds to move a byte between the worker and the store."""
    kv_token_s: list[float] = field(default_factory=list)
    """Seconds to move the KV of a token."""
    stay_s: list[float] = field(default_factory=list)
    work_s: list[float] = field(default_factory=list)
    """Prefill: seconds of the prompts before a new one."""
    tokens: list[int] = field(default_factory=list)
    """Prefill: prompt tokens before a new one."""
    count: list[int] = field(default_factory=list)
    """Prompts or sequences there, waiting ones included."""
    step_s: list[float] = field(default_factory=list)
    """Decode: what one more token costs, to the new sequence and, by slower steps, to the others.
    """
    free_bytes: list[int] = field(default_factory=list)

    @property
    def places(self) -> range:
        return range(len(self.workers))

    def snapshot(self) -> Columns:
        """As of now: later charges do not change it."""
        return Columns(
            self.workers,
            self.token_s,
            self.pair_s,
            self.byte_s,
            self.kv_token_s,
            self.stay_s,
            self.work_s.copy(),
            self.tokens.copy(),
            self.count.copy(),
            self.step_s.copy(),
            self.free_bytes.copy(),
        )

    def without(self, avoid: frozenset[str]) -> Columns:
        """Those of the others, as of now."""
        kept = [i for i in self.places if self.workers[i].worker_id not in avoid]
        return Columns(
            *([column[i] for i in kept] for column in (getattr(self, f.name) for f in fields(self)))
        )


@dataclass(frozen=True)
class Group:
    """Workers of one fingerprint that may take new work; both roles are there."""

    fingerprint: bytes
    prefill: Columns
    decode: Columns

    def snapshot(self) -> Group:
        return Group(self.fingerprint, self.prefill.snapshot(), self.decode.snapshot())


@dataclass(frozen=True)
class Out:
    """A worker that gets nothing new, and why."""

    worker: WorkerView
    reason: str


class Board:
    """Belongs to one thread. `show` replaces the picture, `charge` changes loads in it.

    Charges outlive a picture: a worker that is gone from it for a moment has its own again when it
    comes back.
    """

    def __init__(self) -> None:
        self.turn = 0
        """Decisions made: what round-robin counts by."""
        self.groups: tuple[Group, ...] = ()
        self.out: tuple[Out, ...] = ()
        self._roles: frozenset[str] = frozenset()
        self._tallies: dict[str, _Tally] = {}
        self._others: dict[str, Load] = {}
        self._known: dict[str, Coefficients] = {}
        self._places: dict[str, tuple[Columns, int]] = {}

    @property
    def charged(self) -> Mapping[str, Load]:
        """This process's charges by worker id; no entry means none."""
        loads = {worker_id: tally.now() for worker_id, tally in self._tallies.items()}
        return {worker_id: load for worker_id, load in loads.items() if load != NO_LOAD}

    def load(self, worker_id: str) -> Load:
        """Charged by us and given by others."""
        others = self._others.get(worker_id, NO_LOAD)
        tally = self._tallies.get(worker_id)
        return others if tally is None else tally.now() + others

    def show(
        self,
        workers: Iterable[WorkerView],
        *,
        coefficients: Mapping[str, Coefficients] | None = None,
        others: Mapping[str, Load] | None = None,
    ) -> None:
        """A new picture of the directory. `others` None: every heartbeat's load is others'."""
        ordered = sorted(workers, key=lambda w: w.worker_id)
        known, default = coefficients or {}, Coefficients()
        if others is None:
            others = {w.worker_id: reported(w) for w in ordered}
        self._others = dict(others)
        self._known = {w.worker_id: known.get(w.worker_id, default) for w in ordered}
        self._roles = frozenset(w.role for w in ordered if not w.draining)
        by_print: dict[bytes, dict[str, Columns]] = {}
        self._places = {}
        out: list[Out] = []
        for worker in ordered:
            if worker.draining:
                out.append(Out(worker, "draining"))
                continue
            roles = by_print.setdefault(worker.fingerprint, {})
            columns = roles.setdefault(worker.role, Columns())
            self._append(columns, worker)
        groups = []
        for fingerprint, roles in sorted(by_print.items()):
            if PREFILL in roles and DECODE in roles:
                groups.append(Group(fingerprint, roles[PREFILL], roles[DECODE]))
            else:
                out += (Out(w, "no partner") for c in roles.values() for w in c.workers)
        self.groups, self.out = tuple(groups), tuple(out)

    def charge(self, worker_id: str, load: Load, *, back: bool = False) -> None:
        """Add `load`, or take it `back`."""
        tally = self._tallies.get(worker_id)
        if tally is None:
            tally = self._tallies[worker_id] = _Tally()
        tally.add(load, -1 if back else 1)
        place = self._places.get(worker_id)
        if place is not None:
            self._weigh(*place)

    def take_peaks(self) -> dict[str, Load]:
        """The most that was charged to each worker, field by field, since this was last asked."""
        peaks = {worker_id: tally.peak() for worker_id, tally in self._tallies.items()}
        for worker_id, tally in tuple(self._tallies.items()):
            if tally.now() == NO_LOAD:
                del self._tallies[worker_id]
            else:
                tally.forget_peak()
        return peaks

    def missing(self, avoid: frozenset[str]) -> WorkerUnavailableError:
        """What to say when no group has a worker of each role that is not avoided."""
        for role in (PREFILL, DECODE):
            if role not in self._roles:
                return WorkerUnavailableError(
                    f"no {role} worker is registered in the directory; it may be starting or have "
                    "crashed, see /ready"
                )
        if self.groups and avoid:
            return WorkerUnavailableError(
                "every worker of a role has just failed this request; others may be starting, see "
                "/ready"
            )
        return WorkerUnavailableError(
            "the prefill and the decode pool serve different models or formats (their fingerprints "
            "differ); restart the older pool"
        )

    def _append(self, columns: Columns, worker: WorkerView) -> None:
        known = self._known[worker.worker_id]
        columns.workers.append(worker)
        columns.token_s.append(known.token_s)
        columns.pair_s.append(known.pair_s)
        columns.byte_s.append(1 / known.fetch_bytes_per_s)
        columns.kv_token_s.append(worker.bytes_per_token / known.fetch_bytes_per_s)
        columns.stay_s.append(known.stay_s)
        columns.work_s.append(0.0)
        columns.tokens.append(0)
        columns.count.append(0)
        columns.step_s.append(0.0)
        columns.free_bytes.append(0)
        place = (columns, len(columns.workers) - 1)
        self._places[worker.worker_id] = place
        self._weigh(*place)

    def _weigh(self, columns: Columns, at: int) -> None:
        """The columns that follow from the load."""
        worker = columns.workers[at]
        worker_id = worker.worker_id
        others = self._others.get(worker_id, NO_LOAD)
        tally, known = self._tallies.get(worker_id, _IDLE), self._known[worker_id]
        if worker.role == PREFILL:
            tokens = tally.tokens + others.tokens
            columns.tokens[at] = tokens
            columns.count[at] = tally.prompts + others.prompts
            columns.work_s[at] = (
                tokens * known.token_s + (tally.pairs + others.pairs) * known.pair_s
            )
        else:
            count = tally.sequences + others.sequences
            columns.count[at] = count
            # The new one's own step, and what each of the others waits longer because of it.
            columns.step_s[at] = known.step_s + (2 * count + 1) * known.sequence_s
            columns.free_bytes[at] = worker.capacity_bytes - tally.size_bytes - others.size_bytes


class _Tally:
    """Charges of one worker, and their most: the same sums as of `Load`, in place."""

    __slots__ = ("_most", "pairs", "prompts", "sequences", "size_bytes", "tokens")

    def __init__(self) -> None:
        self.tokens, self.pairs, self.prompts, self.sequences, self.size_bytes = 0, 0.0, 0, 0, 0
        self._most = [0, 0.0, 0, 0, 0]

    def add(self, load: Load, sign: int) -> None:
        self.tokens += sign * load.tokens
        self.pairs += sign * load.pairs
        self.prompts += sign * load.prompts
        self.sequences += sign * load.sequences
        self.size_bytes += sign * load.size_bytes
        most = self._most
        if self.tokens > most[0]:
            most[0] = self.tokens
        if self.pairs > most[1]:
            most[1] = self.pairs
        if self.prompts > most[2]:
            most[2] = self.prompts
        if self.sequences > most[3]:
            most[3] = self.sequences
        if self.size_bytes > most[4]:
            most[4] = self.size_bytes

    def now(self) -> Load:
        return Load(self.tokens, self.pairs, self.prompts, self.sequences, self.size_bytes)

    def peak(self) -> Load:
        tokens, products, prompts, sequences, size_bytes = self._most
        return Load(int(tokens), products, int(prompts), int(sequences), int(size_bytes))

    def forget_peak(self) -> None:
        self._most = [self.tokens, self.pairs, self.prompts, self.sequences, self.size_bytes]


_IDLE = _Tally()


def reported(worker: WorkerView) -> Load:
    """A heartbeat as a load. The pairs of what waits are not told: as if it began its prompts."""
    count = worker.running + worker.queued
    if worker.role == PREFILL:
        each = worker.queued_tokens / max(1, count)
        return Load(
            tokens=worker.queued_tokens, pairs=worker.queued_tokens * each / 2, prompts=count
        )
    return Load(sequences=count, size_bytes=worker.used_bytes)


def others_of(worker: WorkerView, most: Load) -> Load:
    """The part of a heartbeat that is not ours. `most`: the largest load that we had charged while
    the heartbeat may have been written; where it lags we rather see too little of others than our
    own finished work once more.
    """
    told = reported(worker)
    tokens = max(0, told.tokens - most.tokens)
    share = tokens / told.tokens if told.tokens else 0.0
    return Load(
        tokens=tokens,
        pairs=told.pairs * share,
        prompts=max(0, told.prompts - most.prompts),
        sequences=max(0, told.sequences - most.sequences),
        size_bytes=max(0, told.size_bytes - most.size_bytes),
    )


def most_of(loads: Sequence[Load]) -> Load:
    """Field by field."""
    if not loads:
        return NO_LOAD
    return Load(
        max(load.tokens for load in loads),
        max(load.pairs for load in loads),
        max(load.prompts for load in loads),
        max(load.sequences for load in loads),
        max(load.size_bytes for load in loads),
    )
