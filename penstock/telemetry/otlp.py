"""`Tracer` over the OpenTelemetry SDK and OTLP/HTTP. The SDK is loaded only with an endpoint."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from penstock.errors import PenstockError, UsageError
from penstock.telemetry import trace
from penstock.telemetry.trace import Attribute, Headers, Span, Tracer

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

    from penstock.telemetry_spec import TelemetrySpec

_EXPORT_TIMEOUT_S = 3.0
_CLOSE_TIMEOUT_S = 2.0
_SEND_EVERY_MS = 1_000
_MOST_QUEUED = 8_192
"""Finished spans that wait to be sent; new ones beyond that are dropped, no request waits."""


def open_tracer(spec: TelemetrySpec, *, process: str, instance: str = "") -> Tracer:
    """The process's tracer; `NO_TRACER` without an endpoint.

    Raises UsageError if an endpoint is set but the packages of the extra `otel` are missing.
    """
    if spec.otlp_endpoint is None:
        return trace.NO_TRACER
    try:
        return OtlpTracer(
            spec.otlp_endpoint, ratio=spec.trace_ratio, process=process, instance=instance
        )
    except ImportError as error:
        raise UsageError(
            f"traces are wanted at {spec.otlp_endpoint} but {error.name} is not installed; "
            "pip install 'penstock[otel]', or unset telemetry.otlp_endpoint and "
            "OTEL_EXPORTER_OTLP_ENDPOINT"
        ) from error


class OtlpTracer:
    """Sends finished spans from a thread of its own."""

    def __init__(self, endpoint: str, *, ratio: float, process: str, instance: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        about = {"service.name": f"penstock-{process}", "service.instance.id": instance}
        # Not the global provider: a process may hold several parts, in tests for one.
        self._provider: TracerProvider | None = TracerProvider(
            resource=Resource.create({k: v for k, v in about.items() if v}),
            sampler=ParentBased(TraceIdRatioBased(ratio)),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(
            BatchSpanProcessor(
                OTLPSpanExporter(endpoint=_traces_url(endpoint), timeout=_EXPORT_TIMEOUT_S),
                max_queue_size=_MOST_QUEUED,
                schedule_delay_millis=_SEND_EVERY_MS,
            )
        )
        self._tracer = self._provider.get_tracer("penstock")
        self._propagator = TraceContextTextMapPropagator()

    def entry(
        self, name: str, headers: Headers, *, may_begin: bool = False, **attributes: Attribute
    ) -> AbstractContextManager[Span | None]:
        parent = self._parent(headers)
        if parent is None and not may_begin:
            return contextlib.nullcontext()
        return self.run(name, parent, _dotted(attributes), kind="SERVER")

    @contextlib.contextmanager
    def run(
        self,
        name: str,
        parent: Context | None,
        attributes: dict[str, Attribute],
        *,
        kind: str = "INTERNAL",
    ) -> Iterator[Span]:
        """A span that is the current one while the block runs."""
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind

        live = self._tracer.start_span(
            name, parent or Context(), kind=SpanKind[kind], attributes=attributes
        )
        try:
            with trace.as_current(_OtlpSpan(self, live)) as span:
                yield span
        except BaseException as error:
            _blame(live, error)
            raise
        finally:
            live.end()

    def record(
        self, name: str, parent: Context, seconds: float, attributes: dict[str, Attribute]
    ) -> None:
        end = time.time_ns()
        begin = end - int(seconds * 1e9)
        live = self._tracer.start_span(name, parent, attributes=attributes, start_time=begin)
        live.end(end)

    def headers(self, context: Context) -> tuple[tuple[str, str], ...]:
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, context)
        return tuple(carrier.items())

    async def close(self) -> None:
        provider, self._provider = self._provider, None
        if provider is not None:
            # A daemon, so that a collector that hangs does not hold up the end of the process.
            closing = threading.Thread(target=provider.shutdown, daemon=True)
            closing.start()
            await asyncio.to_thread(closing.join, _CLOSE_TIMEOUT_S)

    def _parent(self, headers: Headers) -> Context | None:
        from opentelemetry.context import Context
        from opentelemetry.trace import get_current_span

        wanted = ("traceparent", "tracestate")
        carrier = {key: text for key, text in map(_text, headers) if key in wanted}
        if "traceparent" not in carrier:
            return None
        context = self._propagator.extract(carrier, Context())
        return context if get_current_span(context).get_span_context().is_valid else None


class _OtlpSpan:
    def __init__(self, tracer: OtlpTracer, live: Any) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        self._tracer = tracer
        self._live = live
        self._context = set_span_in_context(live, Context())

    @property
    def trace_id(self) -> str:
        return f"{self._live.get_span_context().trace_id:032x}"

    @property
    def headers(self) -> tuple[tuple[str, str], ...]:
        return self._tracer.headers(self._context)

    def note(self, **attributes: Attribute) -> None:
        self._live.set_attributes(_dotted(attributes))

    def rename(self, name: str) -> None:
        self._live.update_name(name)

    def child(self, name: str, **attributes: Attribute) -> AbstractContextManager[Span]:
        return self._tracer.run(name, self._context, _dotted(attributes))

    def record(self, name: str, seconds: float, **attributes: Attribute) -> None:
        self._tracer.record(name, self._context, seconds, _dotted(attributes))


def _dotted(attributes: dict[str, Attribute]) -> dict[str, Attribute]:
    """`gen_ai__request__model` is written for `gen_ai.request.model`."""
    return {key.replace("__", "."): value for key, value in attributes.items()}


def _blame(live: Any, error: BaseException) -> None:
    from opentelemetry.trace import Status, StatusCode

    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        live.set_attribute("penstock.cancelled", True)
        return
    # The code, not the sentence: sentences may repeat what a client sent.
    what = error.code if isinstance(error, PenstockError) else type(error).__name__
    live.set_attribute("error.type", str(what))
    live.set_status(Status(StatusCode.ERROR))


def _text(header: tuple[str | bytes, str | bytes]) -> tuple[str, str]:
    key, value = (x.decode("latin-1") if isinstance(x, bytes) else str(x) for x in header)
    return key.lower(), value


def _traces_url(endpoint: str) -> str:
    """OTEL_EXPORTER_OTLP_ENDPOINT is a base; a URL that names the signal already is kept."""
    base = endpoint.rstrip("/")
    return base if base.endswith("/v1/traces") else f"{base}/v1/traces"
