"""`docs/metrics.md` from the catalogue: `python -m penstock.telemetry.table > docs/metrics.md`."""

from __future__ import annotations

from penstock.telemetry.catalog import CATALOG
from penstock.telemetry.metric import PREFIX, WORKERS, Label, Metric

_HEAD = """# Metrics

Made from `penstock/telemetry/catalog.py` by `python -m penstock.telemetry.table`; do not edit.

`GET /metrics` of the front tells its own metrics, then those of every live worker and of the store
node, which it reads from them over gRPC (`penstock.telemetry.v1.Metrics`) at that moment. A
Prometheus that scrapes every process by itself asks the front with `?scope=front` and the others at
`telemetry.metrics_port` (`PENSTOCK_TELEMETRY__METRICS_PORT`); otherwise each front replica would
show every worker once more.

Every series of a worker carries `role` and `worker`. Other labels have a closed set of values or a
highest number of them; whatever goes beyond is counted as `other`. What "vLLM" names has vLLM's
meaning and bucket borders. "Also as" are other names of the same series.
"""
_PARTS = (
    ("Front", ("front",)),
    ("Every worker", WORKERS),
    ("Prefill workers", ("prefill",)),
    ("Decode workers", ("decode",)),
    ("Store node", ("store",)),
)


def page() -> str:
    """The whole document."""
    lines = [_HEAD]
    everywhere = [m for m in CATALOG if len(m.where) > len(WORKERS)]
    lines += ["## Every process (the front and the store without `worker`)", "", *_rows(everywhere)]
    for title, where in _PARTS:
        lines += [f"## {title}", "", *_rows([m for m in CATALOG if m.where == where])]
    return "\n".join(lines).rstrip() + "\n"


def _rows(metrics: list[Metric]) -> list[str]:
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for metric in metrics:
        labels = "; ".join(map(_label, metric.labels))
        rows.append(f"| `{metric.shown}` | {metric.kind} | {labels} | {_meaning(metric)} |")
    return [*rows, ""]


def _label(label: Label) -> str:
    if label.listed_in:
        return f"`{label.name}`: those of `{label.listed_in}`"
    bound = ", ".join(label.values) if label.values else f"at most {label.most}"
    return f"`{label.name}`: {bound}"


def _meaning(metric: Metric) -> str:
    parts = [metric.meaning + "."]
    if metric.buckets:
        parts.append("Buckets " + " ".join(f"{b:g}" for b in metric.buckets) + ".")
    if metric.vllm:
        parts.append(f"vLLM: `{metric.vllm}`.")
    if metric.also:
        parts.append("Also as " + ", ".join(f"`{PREFIX}{name}`" for name in metric.also) + ".")
    if metric.still:
        parts.append(f"Stands still while all is well: {metric.still}.")
    return " ".join(parts)


if __name__ == "__main__":
    print(page(), end="")
