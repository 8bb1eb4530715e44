"""`python -m cluster.chart [CHART]`: writes what is generated in the chart (`make helm`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from cluster.chart.readme import readme
from cluster.chart.schema import values_schema


def generated(chart: Path) -> dict[str, str]:
    """Contents by file name."""
    return {
        "values.schema.json": json.dumps(values_schema(), indent=1) + "\n",
        "README.md": readme(chart),
    }


def main() -> int:
    chart = Path(sys.argv[1] if len(sys.argv) > 1 else "helm/penstock")
    for name, content in generated(chart).items():
        (chart / name).write_text(content)
        print(f"wrote {chart / name}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
