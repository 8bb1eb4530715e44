"""The front's own metrics: requests as clients see them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from penstock.telemetry import catalog as M
from penstock.telemetry import logs, trace
from penstock.telemetry.merge import merge
from penstock.telemetry.meters import Meters
from penstock.telemetry.trace import NO_TRACER, Tracer

if TYPE_CHECKING:
    from penstock.errors import PenstockError
    from penstock.request import Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Telemetry:
    """The front's metrics and where its traces begin. Cheap enough to touch once per token."""

    def __init__(self, tracer: Tracer = NO_TRACER) -> None:
        self.tracer = tracer
        self.meters = Meters("front")
        self._running = 0
        self.meters.read(M.REQUESTS_RUNNING, lambda: self._running)

    def request(
        self,
        endpoint: str,
        started_s: float | None = None,
        *,
        max_tokens: int | None = None,
        choices: int = 1,
    ) -> RequestMeter:
        """Starts to measure one request; `started_s` is its arrival by `time.monotonic`."""
        self._running += 1
        started_s = time.monotonic() if started_s is None else started_s
        return RequestMeter(self, endpoint, started_s, max_tokens, choices)

    def responded(self, route: str, status: int) -> None:
        """An HTTP response has ended; `route` is a pattern, never a path that a client sent."""
        self.meters.add(M.RESPONSES, route=route, status=str(status))

    def encoded(self, seconds: float) -> None:
        self.meters.observe(M.ENCODE_TIME, seconds)

    def failed(self, error: PenstockError) -> None:
        """A request ends in `error`; one that has a meter says it there."""
        logs.remember(error=error.code or "")
        self.meters.add(M.FAILURES, code=error.code or "")

    def exposition(self, others: Iterable[bytes] = ()) -> bytes:
        """Prometheus text: this process, then what other processes tell."""
        return merge([self.meters.text(), *others])


class RequestMeter:
    """Measures one request; `end` counts once, whatever is called after it."""

    def __init__(
        self,
        telemetry: Telemetry,
        endpoint: str,
        started_s: float,
        max_tokens: int | None,
        choices: int,
    ) -> None:
        self._telemetry = telemetry
        self._endpoint = endpoint
        self._max_tokens = max_tokens
        self._choices = choices
        self.started_s = started_s
        self.first_s: float | None = None
        self._last_s = started_s
        self._ended = False

    def text(self) -> None:
        """A piece of text goes out now."""
        now = time.monotonic()
        if self.first_s is None:
            self.first_s = now
            self._telemetry.meters.observe(M.TTFT, now - self.started_s)
        else:
            self._telemetry.meters.observe(M.ITL, now - self._last_s)
        self._last_s = now

    def handed_over(self, arrived_s: float) -> None:
        """Tokens that were read at `arrived_s` are with the connection now."""
        self._telemetry.meters.observe(M.FRONT_TOKEN, time.monotonic() - arrived_s)

    def end(
        self,
        outcome: str,
        usage: Usage | None = None,
        timings: Mapping[str, float] | None = None,
    ) -> None:
        """`outcome`: a finish reason, or one of `catalog.OUTCOMES`. `timings`: the flow's own."""
        if self._ended:
            return
        self._ended = True
        telemetry, meters = self._telemetry, self._telemetry.meters
        telemetry._running -= 1
        known = outcome if outcome in M.OUTCOMES else "stop"
        meters.add(M.REQUESTS, endpoint=self._endpoint, outcome=known)
        meters.observe(M.E2E, time.monotonic() - self.started_s)
        if usage is None:
            return
        meters.add(M.SUCCESS, finished_reason=outcome)
        logs.remember(
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=usage.cached_tokens,
            completion_tokens=usage.completion_tokens,
            finish_reason=outcome,
        )
        trace.note(
            gen_ai__usage__input_tokens=usage.prompt_tokens,
            gen_ai__usage__output_tokens=usage.completion_tokens,
            penstock__cached_tokens=usage.cached_tokens,
            penstock__finish_reason=outcome,
        )
        meters.observe(M.REQUEST_PROMPT_TOKENS, usage.prompt_tokens)
        meters.observe(M.REQUEST_GENERATION_TOKENS, usage.completion_tokens)
        meters.observe(M.REQUEST_N, self._choices)
        if self._max_tokens is not None:
            meters.observe(M.REQUEST_MAX_TOKENS, self._max_tokens)
        meters.add(M.PROMPT_TOKENS, usage.prompt_tokens)
        meters.add(M.CACHED_TOKENS, usage.cached_tokens)
        meters.add(M.GENERATION_TOKENS, usage.completion_tokens)
        if self.first_s is not None and usage.completion_tokens > 1:
            spread_s = self._last_s - self.first_s
            meters.observe(M.TPOT, spread_s / (usage.completion_tokens - 1))
        self._phases(timings or {})

    def fail(self, error: PenstockError) -> None:
        """The request ends in `error`."""
        if not self._ended:
            self._telemetry.failed(error)
        self.end("refused" if error.http_status < 500 else "failed")

    def timings(self) -> dict[str, float]:
        """Seconds since arrival, for the response."""
        now = time.monotonic()
        timings = {"e2e_s": now - self.started_s}
        if self.first_s is not None:
            timings["ttft_s"] = self.first_s - self.started_s
        return timings

    def _phases(self, timings: Mapping[str, float]) -> None:
        meters = self._telemetry.meters
        marks = [timings.get(name) for name in ("reserve_s", "ttft_s", "total_s")]
        granted, first, end = marks
        if granted is not None:
            meters.observe(M.QUEUE_TIME, granted)
        if granted is not None and first is not None:
            meters.observe(M.PREFILL_TIME, first - granted)
        if first is not None and end is not None:
            meters.observe(M.DECODE_TIME, end - first)
        if granted is not None and end is not None:
            meters.observe(M.INFERENCE_TIME, end - granted)
