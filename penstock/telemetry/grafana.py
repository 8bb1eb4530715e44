"""Grafana dashboards as JSON: `python -m penstock.telemetry.grafana FOLDER` writes all of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from penstock.telemetry.dashboards import DASHBOARDS, Dashboard, Panel

_WIDTH, _HEIGHT = 8, 8
_PER_ROW = 24 // _WIDTH


def render(dashboard: Dashboard) -> str:
    """JSON for Grafana 10 and later; the data source and the namespace are chosen on the page."""
    source = {"type": "prometheus", "uid": "${datasource}"}
    shown: list[dict[str, Any]] = []
    top = 0
    for title, row in dashboard.rows:
        shown.append(
            {
                "type": "row",
                "title": title,
                "collapsed": False,
                "id": len(shown) + 1,
                "gridPos": {"x": 0, "y": top, "w": 24, "h": 1},
                "panels": [],
            }
        )
        for place, panel in enumerate(row):
            line, column = divmod(place, _PER_ROW)
            where = {"x": column * _WIDTH, "y": top + 1 + line * _HEIGHT}
            position = where | {"w": _WIDTH, "h": _HEIGHT}
            shown.append(_panel(panel, source, len(shown) + 1, position))
        top += 1 + -(-len(row) // _PER_ROW) * _HEIGHT
    page = {
        "uid": dashboard.name,
        "title": dashboard.title,
        "tags": ["penstock"],
        "schemaVersion": 39,
        "version": 1,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_source_variable(), _namespace_variable(source)]},
        "panels": shown,
    }
    return json.dumps(page, indent=1) + "\n"


def _panel(
    panel: Panel, source: dict[str, str], number: int, position: dict[str, int]
) -> dict[str, Any]:
    defaults: dict[str, Any] = {"unit": panel.unit, "min": 0}
    if panel.most is not None:
        defaults["max"] = panel.most
    return {
        "type": "timeseries",
        "id": number,
        "title": panel.title,
        "description": panel.about,
        "datasource": source,
        "gridPos": position,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom"},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {"refId": chr(ord("A") + i), "datasource": source, "expr": expr, "legendFormat": legend}
            for i, (expr, legend) in enumerate(panel.queries)
        ],
    }


def _source_variable() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Source"}


def _namespace_variable(source: dict[str, str]) -> dict[str, Any]:
    return {
        "name": "namespace",
        "type": "query",
        "label": "Namespace",
        "datasource": source,
        "query": "label_values(penstock_requests_limit, namespace)",
        "refresh": 2,
        "includeAll": True,
        # Without Kubernetes there is no such label, and everything is meant.
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        (folder / f"{dashboard.name}.json").write_text(render(dashboard))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
