"""Results as a PNG: needs matplotlib (the extra `plot`), nothing else of the simulator does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.simulate.figures import Result
from cluster.simulate.overload import Point
from penstock.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def require() -> None:
    """Before a minute of simulating, not after it. Raises UsageError without matplotlib."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--plot needs matplotlib, which is not installed; install it with "
            "`pip install 'penstock[plot]'` or leave --plot out"
        ) from error


def plot(path: Path, results: Mapping[str, Result], *, title: str) -> None:
    """Distributions of time to first token and E2E, means and hit rate, workers over time."""
    figure, axes = _figure(2, 2, title)
    (ttft, e2e), (bars, pools) = axes
    for name, result in results.items():
        served = [life for life in result.lives if life.served]
        _cumulative(ttft, name, sorted(life.ttft_s for life in served))
        _cumulative(e2e, name, sorted(life.e2e_s for life in served))
    for axis, what in ((ttft, "time to first token, s"), (e2e, "request, s")):
        axis.set_xscale("log")
        axis.set_xlabel(what)
        axis.set_ylabel("share of requests")
        axis.grid(alpha=0.3)
    ttft.legend(fontsize=8)
    _bars(bars, results)
    for name, result in results.items():
        _steps(pools, name, result)
    pools.set_xlabel("s")
    pools.set_ylabel("workers: prefill (solid), decode (dashed)")
    pools.set_ylim(bottom=0)
    pools.grid(alpha=0.3)
    _save(figure, path)


def plot_sweep(path: Path, points: Sequence[Point], *, title: str) -> None:
    """Goodput over load, with admission and without."""
    figure, axis = _figure(1, 1, title)
    offered = [point.offered for point in points]
    axis.plot(offered, offered, ":", color="gray", label="offered")
    axis.plot(offered, [p.admitted.goodput for p in points], "o-", label="admission")
    axis.plot(offered, [p.everything.goodput for p in points], "s--", label="everybody is let in")
    axis.set_xlabel("requests/s offered")
    axis.set_ylabel("requests/s within the SLO")
    most = max(point.admitted.goodput for point in points)
    axis.set_ylim(0, 1.3 * most if most else 1)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    _save(figure, path)


def _figure(rows: int, columns: int, title: str) -> tuple[Any, Any]:
    require()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no display, no state of the whole process.
    figure = Figure(figsize=(5.5 * columns, 3.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    return figure, figure.subplots(rows, columns)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="png", dpi=110, metadata={"Software": None})


def _cumulative(axis: Axes, name: str, values: list[float]) -> None:
    shares = [(index + 1) / len(values) for index in range(len(values))]
    axis.plot(values, shares, label=name, linewidth=1.2)


def _bars(axis: Axes, results: Mapping[str, Result]) -> None:
    names = list(results)
    axis.bar(names, [results[name].ttft_mean_s for name in names], color="tab:blue", width=0.5)
    axis.set_ylabel("mean time to first token, s")
    axis.tick_params(axis="x", labelsize=8, rotation=15)
    other = axis.twinx()
    other.plot(names, [results[name].hit_rate for name in names], "o", color="tab:red")
    other.set_ylabel("hit rate", color="tab:red")
    other.set_ylim(0, 1)


def _steps(axis: Axes, name: str, result: Result) -> None:
    times = [point[0] for point in result.series] + [result.duration_s]
    for at, style in ((1, "-"), (2, "--")):
        counts = [point[at] for point in result.series]
        axis.step(times, [*counts, counts[-1]], style, where="post", linewidth=1, label=name)
