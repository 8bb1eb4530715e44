"""Tracing costs nothing while it is off, and says what is missing when it is on."""

from __future__ import annotations

import builtins
import subprocess
import sys
from typing import Any

import pytest

from penstock.errors import UsageError
from penstock.telemetry import trace
from penstock.telemetry.otlp import open_tracer
from penstock.telemetry.trace import NO_TRACER
from penstock.telemetry_spec import QUIET, TelemetrySpec


def test_off_means_one_look_at_a_variable() -> None:
    assert open_tracer(QUIET, process="front") is NO_TRACER
    headers = [(b"traceparent", b"00-" + b"1" * 32 + b"-" + b"2" * 16 + b"-01")]
    with NO_TRACER.entry("x", headers, may_begin=True) as span:
        assert span is None
        assert trace.span("a") is trace.span("b"), "no object is made"
        assert trace.outgoing() == ()
        trace.note(x=1)
        trace.record("x", 1.0)


def test_off_loads_no_package_of_opentelemetry() -> None:
    code = (
        "import sys, cluster.front, prefill.worker, kvstore.server; "
        "from penstock.telemetry.otlp import open_tracer; "
        "from penstock.telemetry_spec import QUIET; open_tracer(QUIET, process='front'); "
        # redis-py loads the metrics' half of the SDK by itself.
        "print([m for m in sys.modules if m.startswith('opentelemetry') "
        "and ('sdk.trace' in m or 'exporter' in m)])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_missing_package_is_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("opentelemetry.exporter"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UsageError, match=r"pip install 'penstock\[otel\]'"):
        open_tracer(TelemetrySpec(otlp_endpoint="http://127.0.0.1:1"), process="front")
