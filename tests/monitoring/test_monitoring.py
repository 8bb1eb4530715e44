"""Dashboards and alerts ask for metrics and labels that exist; alerts fire when they should."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from penstock.telemetry.catalog import CATALOG
from penstock.telemetry.dashboards import DASHBOARDS, panels
from penstock.telemetry.grafana import render
from penstock.telemetry.metric import PREFIX

HERE = Path(__file__).parent
CHART = HERE.parents[1] / "helm" / "penstock"
RULES = CHART / "rules" / "penstock.yaml"
# What Prometheus adds to a target's series, and what every worker's series carry.
_COMMON_LABELS = frozenset({"namespace", "instance", "job", "pod", "le", "role", "worker"})
_WORDS = re.compile(r'"[^"]*"|[a-zA-Z_:][a-zA-Z0-9_:]*')

promtool = os.environ.get("PENSTOCK_PROMTOOL") or shutil.which("promtool")
with_promtool = pytest.mark.skipif(
    promtool is None,
    reason="no promtool: Debian's package `prometheus` has it; or set PENSTOCK_PROMTOOL",
)


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard_expressions() -> Iterator[tuple[str, str]]:
    for path in sorted((CHART / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield f"{path.name}: {panel['title']}", target["expr"]


def expressions() -> list[tuple[str, str]]:
    from_rules = [(rule.get("alert") or rule["record"], rule["expr"]) for rule in rules()]
    return [*from_rules, *dashboard_expressions()]


def samples() -> dict[str, frozenset[str]]:
    """Every name that a scrape can hold, with its own labels."""
    names: dict[str, frozenset[str]] = {}
    for metric in CATALOG:
        suffixes = ("_bucket", "_sum", "_count") if metric.kind == "histogram" else ("",)
        for name in (metric.name, *metric.also):
            for suffix in suffixes:
                names[PREFIX + name + suffix] = frozenset(metric.label_names)
    return names


def test_every_expression_asks_for_metrics_that_exist() -> None:
    known = set(samples()) | {rule["record"] for rule in rules() if "record" in rule}
    asked = 0
    for place, expr in expressions():
        for word in _WORDS.findall(expr):
            if word.startswith("penstock"):
                assert word in known, f"{place} asks for {word}, which nobody emits"
                asked += 1
    print(f"{asked} uses of metrics in {len(expressions())} expressions")
    assert asked > 100


def test_every_selector_and_grouping_uses_labels_that_exist() -> None:
    own = samples()
    for place, expr in expressions():
        uses = set(re.findall(r"penstock[a-zA-Z0-9_:]*", expr))
        allowed = _COMMON_LABELS.union(*(own.get(name, frozenset()) for name in uses))
        for group in re.findall(r"(?:by|on|without|ignoring) \(([^)]*)\)", expr):
            for label in filter(None, map(str.strip, group.split(","))):
                assert label in allowed, f"{place} groups by {label}"
        for name, selector in re.findall(r"(penstock[a-zA-Z0-9_:]*)\{([^}]*)\}", expr):
            labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
            wrong = labels - own.get(name, frozenset()) - _COMMON_LABELS
            assert not wrong, f"{place} selects {name} by {wrong}"


def test_values_that_alerts_select_are_values_that_labels_have() -> None:
    values = {
        (PREFIX + metric.name, label.name): label.values
        for metric in CATALOG
        for label in metric.labels
        if label.values
    }
    checked = 0
    for place, expr in expressions():
        for name, selector in re.findall(r"(penstock\w*)\{([^}]*)\}", expr):
            for label, how, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', selector):
                known = values.get((name, label))
                if known is None:
                    continue
                asked = value.split("|") if "~" in how else [value]
                assert set(asked) <= set(known), f"{place}: {label} is never {asked}"
                checked += 1
    assert checked >= 3


def test_the_dashboards_in_the_chart_are_those_of_the_code() -> None:
    folder = CHART / "dashboards"
    assert {path.name for path in folder.glob("*")} == {f"{d.name}.json" for d in DASHBOARDS}
    for dashboard in DASHBOARDS:
        assert (folder / f"{dashboard.name}.json").read_text() == render(dashboard), (
            ".venv/bin/python -m penstock.telemetry.grafana helm/penstock/dashboards"
        )
        shown = json.loads(render(dashboard))["panels"]
        assert len({panel["id"] for panel in shown}) == len(shown)
        places = {(p["gridPos"]["x"], p["gridPos"]["y"]) for p in shown}
        assert len(places) == len(shown), "no panel lies upon another"
        assert all(panel.about and panel.queries for panel in panels(dashboard))


def test_every_alert_says_how_bad_it_is_and_what_to_do() -> None:
    for rule in rules():
        if "alert" in rule:
            assert rule["labels"]["severity"] in ("critical", "warning")
            assert set(rule["annotations"]) >= {"summary", "description"}, rule["alert"]


def test_every_alert_has_a_test_in_which_it_fires() -> None:
    tested = re.findall(
        r'alertname="(\w+)",alertstate="firing"', (HERE / "alerts.yaml").read_text()
    )
    assert {rule["alert"] for rule in rules() if "alert" in rule} == set(tested)


@with_promtool
def test_alerts_fire_when_they_should_and_only_then(tmp_path: Path) -> None:
    shutil.copy(RULES, tmp_path / RULES.name)
    shutil.copy(HERE / "alerts.yaml", tmp_path)
    done = run("test", "rules", str(tmp_path / "alerts.yaml"))
    assert done.returncode == 0, done.stdout + done.stderr


@with_promtool
def test_prometheus_understands_every_expression(tmp_path: Path) -> None:
    done = run("check", "rules", str(RULES))
    assert done.returncode == 0, done.stdout + done.stderr
    as_rules = [
        {"record": f"panel:{number}", "expr": _filled(expr)}
        for number, (_, expr) in enumerate(dashboard_expressions())
    ]
    file = tmp_path / "panels.yaml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": as_rules}]}))
    done = run("check", "rules", str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(as_rules)} rules found" in done.stdout


def _filled(expr: str) -> str:
    """As Grafana fills its variables in."""
    return expr.replace("$__rate_interval", "5m").replace("$namespace", ".*")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert promtool is not None
    return subprocess.run([promtool, *arguments], capture_output=True, text=True, timeout=60)
