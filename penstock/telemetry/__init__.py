"""Metrics, traces and structured logs of one process. No global registry: pass the object."""

from penstock.telemetry.front import CONTENT_TYPE, RequestMeter, Telemetry
from penstock.telemetry.logs import JsonFormatter, configure_logging, request_scope

__all__ = [
    "CONTENT_TYPE",
    "JsonFormatter",
    "RequestMeter",
    "Telemetry",
    "configure_logging",
    "request_scope",
]
