"""The surface is a test: every name that outside scripts rely on, in one list.

Adding a name is a visible diff of `tests/surface.txt`; a missing one is a breaking change. To
accept what is there now: `PENSTOCK_UPDATE_SURFACE=1 .venv/bin/python -m pytest
tests/test_surface.py`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import typer
from google.protobuf.descriptor import FileDescriptor

from cluster.api import create_app
from cluster.api.fake_service import FakeService
from cluster.chart.readme import rows_of
from cluster.cli.main import build
from cluster.config import ClusterConfig, FrontSection
from penstock.telemetry import Telemetry
from penstock.telemetry.catalog import CATALOG
from penstock.telemetry.metric import PREFIX
from protos.penstock.batch.v1 import batch_pb2
from protos.penstock.kv.v1 import kv_pb2
from protos.penstock.telemetry.v1 import telemetry_pb2
from protos.penstock.worker.v1 import worker_pb2

SNAPSHOT = Path(__file__).parent / "surface.txt"


def flags() -> Iterator[str]:
    command = typer.main.get_command(build())
    pending = [("penstock", command)]
    while pending:
        path, each = pending.pop()
        for name, sub in getattr(each, "commands", {}).items():
            pending.append((f"{path} {name}", sub))
        for parameter in each.params:
            for spelling in [*parameter.opts, *parameter.secondary_opts]:
                yield f"cli {path} {spelling}"


def endpoints() -> Iterator[str]:
    api = create_app(
        FakeService(), tokenizer=None, chat=None, config=FrontSection(), telemetry=Telemetry()
    )
    for route in api.openapi()["paths"].items():
        for method in route[1]:
            yield f"http {method.upper()} {route[0]}"


def settings() -> Iterator[str]:
    for section, field in ClusterConfig.model_fields.items():
        for name in field.annotation.model_fields:  # type: ignore[union-attr]
            yield f"env PENSTOCK_{section.upper()}__{name.upper()}"


def messages() -> Iterator[str]:
    modules = (kv_pb2, worker_pb2, telemetry_pb2, batch_pb2)
    files: list[FileDescriptor] = [module.DESCRIPTOR for module in modules]
    for file in files:
        for service in file.services_by_name.values():
            for method in service.methods:
                yield f"grpc {service.full_name}/{method.name}"
        for message in file.message_types_by_name.values():
            for field in message.fields:
                yield f"proto {message.full_name}.{field.name} = {field.number}"


def helm_values() -> Iterator[str]:
    chart = Path(__file__).parents[1] / "helm/penstock/values.yaml"
    for row in rows_of(chart.read_text()):
        yield f"helm {row.name}"


def metrics() -> Iterator[str]:
    for metric in CATALOG:
        for name in (metric.name, *metric.also):
            yield f"metric {metric.kind} {PREFIX}{name}{{{','.join(metric.label_names)}}}"


def test_the_surface_is_what_the_snapshot_lists() -> None:
    now = sorted({*flags(), *endpoints(), *settings(), *messages(), *helm_values(), *metrics()})
    if os.environ.get("PENSTOCK_UPDATE_SURFACE"):
        SNAPSHOT.write_text("\n".join(now) + "\n")
    before = SNAPSHOT.read_text().splitlines()
    gone, new = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    assert not gone, f"names that scripts may rely on are gone: {gone}"
    assert not new, f"new names; accept them as this module's docstring says: {new}"
