"""How many GPUs a worker of V4-Flash needs: the values file's table is the model's own plan."""

from __future__ import annotations

import json
import re

from model.cache import cache_bytes
from model.config import ModelConfig
from model.grid import Grid
from model.plan import weight_bytes, work_bytes
from model.tensors import expected_tensors
from tests.helm import chart

_H200_GIB = 139
_ROW = re.compile(r"^# +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)  +(.+)$", re.MULTILINE)


def test_the_table_is_what_the_plan_says() -> None:
    text = (chart.CHART / "values-h200-flash.yaml").read_text()
    config = ModelConfig.parse(json.loads((chart.ROOT / "examples/configs/flash.json").read_text()))
    table = expected_tensors(config)
    rows = _ROW.findall(text)
    assert [int(row[0]) for row in rows] == [2, 4, 8]
    for ranks, *figures, verdict in rows:
        grid = Grid(int(ranks))
        parts = (
            weight_bytes(table, grid, element_bytes=2),
            cache_bytes(config, 1 << 20),
            work_bytes(config, grid),
        )
        plan = [round(part / (1 << 30), 1) for part in (*parts, sum(parts))]
        print(ranks, plan, verdict)
        assert plan == [float(figure) for figure in figures]
        fits = sum(parts) < _H200_GIB << 30
        assert ("does not fit" in verdict) != fits


def test_the_values_ask_for_what_the_table_says() -> None:
    docs = chart.render("values-h200-flash.yaml")
    for role in ("prefill", "decode"):
        pod = chart.group(docs, role)["template"]["spec"]
        assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
        assert pod["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-H200"}
    assert "nvidia.com/gpu" not in json.dumps(chart.group(docs, "front"))
