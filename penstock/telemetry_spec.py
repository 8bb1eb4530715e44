"""What a process is told about telemetry: plain data, part of every process's spec."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TelemetrySpec(BaseModel):
    """Exporters of one process. Everything that could send something elsewhere is off."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metrics_host: str = "127.0.0.1"
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Each process also serves its own metrics by HTTP here (0: a free port, which its log tells);
    unset: only the front's /metrics, which has those of all.
    """
    otlp_endpoint: str | None = Field(default=None, pattern=r"^https?://")
    """Base URL of an OpenTelemetry collector for traces by OTLP/HTTP, usually with port 4318; also
    read from OTEL_EXPORTER_OTLP_ENDPOINT. Unset: no traces, at no cost.
    """
    trace_ratio: float = Field(default=1.0, ge=0.0, le=1.0)
    """Share of the requests without a trace of their client's that begin one."""
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    """Of every process; `info` has a line for each request."""


QUIET = TelemetrySpec()
