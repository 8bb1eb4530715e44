"""One step of the batch on the engine's thread: draft, absorb all streams in one forward, draw.

Without drafts a stream's segment is its pending token and it gets one more. With drafts the segment
is the pending token and the draft; every row draws at its own position, and the sequence is taken
back to what stands (`decode.speculation`). What comes out is the same either way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from blake3 import blake3

from decode.speculation import stand, states_between
from decode.stream import Drawn, Stream
from model.engine import DraftRequest, Engine, Evidence, Logits, Segment
from model.sampler import logprobs, sample
from penstock.errors import PenstockError
from penstock.telemetry import catalog as M
from penstock.telemetry.meters import NO_METER, Meter

_DIGEST_BYTES = 8
_log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What a step brought one stream."""

    stream: Stream
    start: int
    """Position of its sequence before the step."""
    drafts: list[int] = field(default_factory=list)
    drawn: list[Drawn] = field(default_factory=list)
    states: list[tuple[int, bytes]] = field(default_factory=list)
    """Payloads by position, ascending; a stream that ended earlier does not own the later ones."""
    error: PenstockError | None = None

    @property
    def accepted(self) -> int:
        """Drafts that stand: every draw but the last one let its draft pass."""
        return max(len(self.drawn) - 1, 0)


class Stepper:
    """Belongs to the engine's thread."""

    def __init__(self, engine: Engine, meter: Meter = NO_METER) -> None:
        self._engine = engine
        self._meter = meter
        self.absorbed_tokens = 0
        """By how far the engine's sequences advanced, as the engine itself counts."""
        self.fed_tokens = 0
        """How many of those were tokens that had been drawn here."""

    def step(self, streams: Sequence[Stream]) -> list[Outcome]:
        """One outcome a stream. If the engine fails, every stream has its error: a step is all or
        nothing.
        """
        outcomes = [Outcome(stream, stream.sequence.position) for stream in streams]
        try:
            self._step(outcomes)
        except Exception as error:
            _log.exception("a decode step failed")
            failure = (
                error
                if isinstance(error, PenstockError)
                else PenstockError(f"the model failed in a decode step: {error}")
            )
            return [Outcome(o.stream, o.start, error=failure) for o in outcomes]
        return outcomes

    def _step(self, outcomes: list[Outcome]) -> None:
        stepping = [o for o in outcomes if o.stream.pending is not None]
        self._draft(stepping)
        results = self._engine.forward([_segment(o) for o in stepping]) if stepping else []
        rows = {id(o): result.logits for o, result in zip(stepping, results, strict=True)}
        plain = [o for o in outcomes if rows.get(id(o)) is None]
        last = self._engine.logits([o.stream.sequence for o in plain])
        for index, outcome in enumerate(plain):
            self._draw_all(outcome, last, index)
        for outcome in stepping:
            drafted = rows[id(outcome)]
            if drafted is not None:
                self._draw_all(outcome, drafted, 0)
        for outcome in stepping:
            if outcome.error is None:
                self._settle(outcome)

    def _draft(self, outcomes: list[Outcome]) -> None:
        info = self._engine.info
        if not info.draft_tokens:
            return
        asking, requests = [], []
        for outcome in outcomes:
            stream = outcome.stream
            # The last token of an answer is never absorbed, so there is room for the others.
            room = stream.limit - outcome.start - 1
            most = min(info.draft_tokens, stream.output.most_left - 1, room)
            count = stream.drafts.length(most, info.draft_cost)
            if count and stream.pending is not None:
                asking.append(outcome)
                requests.append(
                    DraftRequest(
                        stream.sequence,
                        stream.pending,
                        count,
                        stream.sampling,
                        stream.output.ends,
                        stream.output.least_left,
                    )
                )
        if requests:
            for outcome, drafts in zip(asking, self._engine.draft(requests), strict=True):
                outcome.drafts = drafts

    def _draw_all(self, outcome: Outcome, rows: Logits, first: int) -> None:
        """`rows.row(first)` predicts what follows the pending token, the next ones its drafts."""
        fed = outcome.stream.pending is not None

        def draw(index: int) -> int:
            position = outcome.start + fed + index
            drawn = self._draw(outcome, rows.row(first + index), position, index)
            outcome.drawn.append(drawn)
            return drawn.token

        try:
            stand(draw, outcome.drafts)
        except PenstockError as error:
            outcome.error = error
        except ValueError as error:
            # One stream's damaged logits must not end the others.
            outcome.error = PenstockError(str(error))

    def _draw(self, outcome: Outcome, row: memoryview, position: int, ahead: int) -> Drawn:
        stream = outcome.stream
        evidence: tuple[Evidence, ...] = ()
        if stream.wishes.evidence:
            begun = time.perf_counter()
            if outcome.drafts:
                self._engine.seek(stream.sequence, position)
            evidence = tuple(self._engine.evidence(stream.sequence))
            self._meter.add(M.EVIDENCE_TIME, time.perf_counter() - begun)
            self._meter.add(M.EVIDENCE_SPANS, len(evidence))
        digest = b""
        if stream.wishes.logits_digest:
            digest = blake3(row.cast("B")).digest()[:_DIGEST_BYTES]
        token = sample(
            row,
            stream.sampling,
            position=position,
            forbidden=stream.output.forbidden_after(ahead),
            adjust=stream.adjustments(drawn.token for drawn in outcome.drawn),
            allowed=None if stream.constraint is None else stream.constraint.allowed(),
        )
        if stream.constraint is not None:
            stream.constraint.accept(token)
        top = stream.wishes.top_logprobs
        told = None if top is None else logprobs(row, token, top=top)
        return Drawn(token, evidence=evidence, digest=digest, logprobs=told)

    def _settle(self, outcome: Outcome) -> None:
        """Take the rejected drafts back, and export the states that were passed on the way."""
        sequence, end = outcome.stream.sequence, outcome.start + 1 + outcome.accepted
        for position in states_between(outcome.start, end):
            self._seek(outcome, position)
            outcome.states.append((position, self._engine.export_state(sequence)))
        self._seek(outcome, end)
        self.absorbed_tokens += sequence.position - outcome.start
        self.fed_tokens += 1 + outcome.accepted

    def _seek(self, outcome: Outcome, position: int) -> None:
        sequence = outcome.stream.sequence
        if sequence.position != position:
            self._engine.seek(sequence, position)


def _segment(outcome: Outcome) -> Segment:
    stream = outcome.stream
    if stream.pending is None:
        raise ValueError("a stream without a pending token cannot step")
    tokens, drafted = (stream.pending, *outcome.drafts), bool(outcome.drafts)
    return Segment(stream.sequence, tokens, all_logits=drafted, seekable=drafted)
