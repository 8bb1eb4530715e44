"""The catalogue is the one place of every metric: bounded, documented, complete."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from kvstore.contracts import StoreStat
from kvstore.meters import SOURCES
from penstock.errors import PenstockError
from penstock.telemetry.catalog import CATALOG, ERROR_CODES
from penstock.telemetry.metric import Label, Metric
from penstock.telemetry.table import page

METRICS_PAGE = Path(__file__).parents[3] / "docs" / "metrics.md"
_MOST_SERIES = 5_000


def test_the_documented_table_is_the_code() -> None:
    assert METRICS_PAGE.read_text() == page(), (
        "docs/metrics.md is old: .venv/bin/python -m penstock.telemetry.table > docs/metrics.md"
    )


def test_no_name_means_two_things() -> None:
    names = [name for metric in CATALOG for name in (metric.name, *metric.also)]
    assert len(names) == len(set(names))


def test_every_label_is_bounded_and_so_are_all_series_of_a_process() -> None:
    series = 0
    for metric in CATALOG:
        each = math.prod(label.bound for label in metric.labels)
        samples = len(metric.buckets) + 3 if metric.buckets else 1
        series += each * samples * (1 + len(metric.also))
    print(f"{len(CATALOG)} metrics, at most {series} series in one process of each kind")
    assert series < _MOST_SERIES


def test_every_error_of_the_tree_has_its_code_in_the_label() -> None:
    pending, codes = [PenstockError], set()
    while pending:
        kind = pending.pop()
        pending += kind.__subclasses__()
        if kind.__module__ == PenstockError.__module__:
            codes.add(kind.code)
    # A wrong command line never comes to be a request.
    assert codes - {"invalid_configuration"} == set(ERROR_CODES)


def test_every_figure_of_the_store_is_a_metric() -> None:
    fields = {field.name for field in dataclasses.fields(StoreStat)} - {"index_backend"}
    assert set(SOURCES) == fields


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": "Requests"}, "no name"),
        ({"name": "requests"}, "ends in _total"),
        ({"kind": "gauge"}, "ends in _total"),
        ({"buckets": (1.0,)}, "histogram has buckets"),
        ({"kind": "histogram", "name": "x", "buckets": (2.0, 1.0)}, "ascend"),
        ({"meaning": ""}, "neither"),
    ],
)
def test_a_wrong_declaration_fails_at_import(change: dict[str, object], why: str) -> None:
    right = {"name": "x_total", "kind": "counter", "where": ("front",), "meaning": "x"}
    Metric(**right)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=why):
        Metric(**(right | change))  # type: ignore[arg-type]


def test_a_label_without_bound_cannot_be_declared() -> None:
    with pytest.raises(ValueError, match="how many at most"):
        Label("user")
