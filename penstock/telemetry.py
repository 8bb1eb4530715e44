"""Metrics and structured logs of one process. No global registry: pass the `Telemetry`.

Label values are bounded: only names from fixed sets become labels, never what a client sent.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily

if TYPE_CHECKING:
    from penstock.request import Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OUTCOMES = ("stop", "length", "cancelled", "refused", "failed")
_MOST_LABEL_SETS = 512
_FAST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_SLOW_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
_TOKENS = (64, 256, 1024, 4096, 16384, 65536, 262144, 1048576)

_request_id: ContextVar[str] = ContextVar("penstock_request_id", default="")


class Telemetry:
    """The front's metrics. Cheap enough to touch once per token."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: dict[str, Any] = {"namespace": "penstock", "registry": self.registry}
        self.requests = Counter(
            "requests", "Requests by how they ended", ["endpoint", "outcome"], **common
        )
        self.responses = Counter("http_responses", "HTTP responses", ["route", "status"], **common)
        self.running = Gauge("requests_running", "Requests in this front process", **common)
        self.ttft = Histogram(
            "time_to_first_token_seconds", "Arrival to first text", buckets=_SLOW_S, **common
        )
        self.itl = Histogram(
            "inter_token_seconds", "Between two pieces of text", buckets=_FAST_S, **common
        )
        self.e2e = Histogram("request_seconds", "Arrival to last event", buckets=_SLOW_S, **common)
        self.encode = Histogram(
            "encode_seconds", "Chat to token ids", buckets=(*_FAST_S, 5.0, 10.0, 30.0), **common
        )
        self.prompt = Histogram(
            "prompt_tokens_per_request", "Prompt length", buckets=_TOKENS, **common
        )
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens", **common)
        self.cached_tokens = Counter("prompt_tokens_cached", "Restored, not computed", **common)
        self.completion_tokens = Counter("completion_tokens", "Answer tokens", **common)

    def request(self, endpoint: str, started_s: float | None = None) -> RequestMeter:
        """Starts to measure one request; `started_s` is its arrival by `time.monotonic`."""
        self.running.inc()
        return RequestMeter(self, endpoint, time.monotonic() if started_s is None else started_s)

    def exposition(self, extra: Iterable[Sample] = ()) -> bytes:
        """Prometheus text: this process, then `extra` (workers, store) as gauges."""
        text: bytes = generate_latest(self.registry)
        return text + generate_latest(_gauges(extra))


class RequestMeter:
    """Measures one request; `end` counts once, whatever is called after it."""

    def __init__(self, telemetry: Telemetry, endpoint: str, started_s: float) -> None:
        self._telemetry = telemetry
        self._endpoint = endpoint
        self.started_s = started_s
        self.first_s: float | None = None
        self._last_s = started_s
        self._ended = False

    def text(self) -> None:
        """A piece of text goes out now."""
        now = time.monotonic()
        if self.first_s is None:
            self.first_s = now
            self._telemetry.ttft.observe(now - self.started_s)
        else:
            self._telemetry.itl.observe(now - self._last_s)
        self._last_s = now

    def end(self, outcome: str, usage: Usage | None = None) -> None:
        if self._ended:
            return
        self._ended = True
        telemetry = self._telemetry
        telemetry.running.dec()
        known = outcome if outcome in OUTCOMES else "stop"
        telemetry.requests.labels(self._endpoint, known).inc()
        telemetry.e2e.observe(time.monotonic() - self.started_s)
        if usage is not None:
            telemetry.prompt.observe(usage.prompt_tokens)
            telemetry.prompt_tokens.inc(usage.prompt_tokens)
            telemetry.cached_tokens.inc(usage.cached_tokens)
            telemetry.completion_tokens.inc(usage.completion_tokens)

    def timings(self) -> dict[str, float]:
        """Seconds since arrival, for the response."""
        now = time.monotonic()
        timings = {"e2e_s": now - self.started_s}
        if self.first_s is not None:
            timings["ttft_s"] = self.first_s - self.started_s
        return timings


@dataclass(frozen=True)
class Sample:
    """One gauge read from elsewhere. `name` has no prefix; bad characters are replaced."""

    name: str
    value: float
    labels: Mapping[str, str]


class _Families:
    def __init__(self, samples: Iterable[Sample]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[GaugeMetricFamily]:
        families: dict[str, tuple[GaugeMetricFamily, tuple[str, ...]]] = {}
        counts: dict[str, int] = {}
        for sample in self._samples:
            name = "penstock_" + "".join(
                c if c.isascii() and c.isalnum() else "_" for c in sample.name
            )
            keys = tuple(sorted(sample.labels))
            if name not in families:
                families[name] = (GaugeMetricFamily(name, "", labels=keys), keys)
            family, wanted = families[name]
            counts[name] = counts.get(name, 0) + 1
            if wanted == keys and counts[name] <= _MOST_LABEL_SETS:
                family.add_metric([sample.labels[k][:128] for k in keys], float(sample.value))
        return iter([family for family, _ in families.values()])


def _gauges(samples: Iterable[Sample]) -> CollectorRegistry:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(list(samples)))
    return registry


@contextlib.contextmanager
def request_scope(request_id: str) -> Iterator[None]:
    """Log lines of this task and of its children carry `request_id`."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


class JsonFormatter(logging.Formatter):
    """One JSON object per line; `extra={"facts": {...}}` adds fields."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": f"{record.created:.3f}",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := _request_id.get():
            line["request_id"] = request_id
        facts = getattr(record, "facts", None)
        if isinstance(facts, dict):
            line |= facts
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(*, level: str = "info", stream: TextIO | None = None) -> None:
    """JSON lines on stderr instead of the handlers so far. Programs call it, libraries never."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
