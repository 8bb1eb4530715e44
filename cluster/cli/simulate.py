"""`penstock simulate TRACE`: the cluster under a virtual clock (docs/simulator.md)."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penstock.errors import UsageError

if TYPE_CHECKING:
    from cluster.simulate.figures import Result
    from cluster.simulate.world import Plan

_INFINITE = "never evicts"


def register(app: typer.Typer) -> None:
    app.command("simulate", help="Serve a trace by virtual workers: policies, sizes, capacity.")(
        simulate
    )


def simulate(
    trace: Annotated[
        str,
        typer.Argument(
            metavar="TRACE",
            help="JSONL as Mooncake's, or generated:requests=1000,rate=10,prompt=4096,answer=256,"
            "turns=1,pause=30,spread=0.8,period=0,burst=1.",
        ),
    ],
    prefill: Annotated[int, typer.Option(min=1, help="Prefill workers.")] = 1,
    decode: Annotated[int, typer.Option(min=1, help="Decode workers.")] = 1,
    model: Annotated[str, typer.Option(help="Costs of flash, pro, ledger or fake.")] = "flash",
    costs: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Coefficients over those of --model.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="One coefficient; repeatable."),
    ] = None,
    policy: Annotated[
        str, typer.Option(help="cost, round-robin, least-load, block-overlap (commas), or all.")
    ] = "cost",
    store_bytes: Annotated[
        str,
        typer.Option(metavar="SIZE", help="30GB, 10% of the trace's different bytes, or infinite."),
    ] = "infinite",
    eviction: Annotated[str, typer.Option(help="reuse, lru or s3-fifo.")] = "reuse",
    speed: Annotated[float, typer.Option(min=1e-3, help="Requests come so much faster.")] = 1.0,
    shrink: Annotated[int, typer.Option(min=1, help="Lengths are divided by it.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="The first requests only.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="What clients reserve; else what they get.")
    ] = None,
    slo_ttft: Annotated[float, typer.Option(min=0, help="Seconds to the first token.")] = 5.0,
    slo_itl: Annotated[
        float, typer.Option(min=0, help="Seconds between tokens, a request's mean.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Of a generated trace.")] = 0,
    overload: Annotated[
        str | None,
        typer.Option(
            metavar="LOADS",
            help="Goodput at these multiples of the load, as 0.5,1,3, with admission and without.",
        ),
    ] = None,
    autoscale_prefill: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=VALUE,...",
            help="Scale the prefill pool: min_replicas=1,max_replicas=8,queue_s=2,...",
        ),
    ] = None,
    autoscale_decode: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=VALUE,...",
            help="Scale the decode pool: min_replicas=1,max_replicas=8,token_gap_ms=50,...",
        ),
    ] = None,
    start_s: Annotated[
        float, typer.Option(min=0, help="Seconds until a worker that was asked for takes work.")
    ] = 30.0,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Send the trace there as well, or to a cluster of its own (`fake`), and compare.",
        ),
    ] = None,
    fit_on: Annotated[
        str, typer.Option(metavar="TRACE", help="With --against: what costs are fitted on.")
    ] = "generated:requests=40,rate=0.8,prompt=800,answer=24",
    fake_step_ms: Annotated[
        float, typer.Option(min=0, help="With --against fake: time of a decode step.")
    ] = 50.0,
    fake_prefill_tokens_per_s: Annotated[
        float, typer.Option(min=0, help="With --against fake: speed of prefill.")
    ] = 2000.0,
    json_file: Annotated[Path | None, typer.Option("--json", metavar="FILE")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", metavar="FILE.png")] = None,
) -> int:
    from cluster.policy import RoutingPolicy
    from cluster.simulate import plot as plots
    from cluster.simulate import report
    from cluster.simulate.costs import open_costs
    from cluster.simulate.figures import Slo
    from cluster.simulate.store import unique_bytes
    from cluster.simulate.trace import open_trace
    from cluster.simulate.world import Plan

    if plot is not None:
        plots.require()
    for path in (json_file, plot):
        _check_writable(path)
    names = _names(policy, list(RoutingPolicy), "--policy")
    found = open_trace(trace, seed=seed).scaled(speed=speed, shrink=shrink, limit=limit)
    found = found.in_blocks()
    known = open_costs(model, file=costs, given=_pairs(set_ or []))
    unique = unique_bytes(found, known)
    capacity = _capacity(store_bytes, unique)
    plan = Plan(
        known,
        prefill=prefill,
        decode=decode,
        store_bytes=capacity,
        eviction=_eviction(eviction),
        slo=Slo(slo_ttft, slo_itl),
        max_tokens=max_tokens,
        scaling=_scaling(autoscale_prefill, autoscale_decode, start_s),
    )
    if against is not None:
        if plot is not None or len(names) > 1:
            raise UsageError("--against compares one policy and draws no picture")
        speeds = {
            "model.fake_decode_step_ms": fake_step_ms,
            "model.fake_prefill_tokens_per_s": fake_prefill_tokens_per_s,
        }
        light = open_trace(fit_on, seed=seed + 1)
        return _compare(replace(plan, policy=names[0]), found, light, against, speeds, json_file)
    if overload is not None:
        return _overload(replace(plan, policy=names[0]), found, overload, json_file, plot)
    began_s = time.perf_counter()
    results = _run(plan, found, names)
    took_s = time.perf_counter() - began_s
    store = "a store that never evicts" if capacity is None else f"{capacity / 1e9:.2f} GB"
    title = (
        f"{found.name}: {len(found.requests):,} requests in {found.duration_s:,.0f} s, "
        f"{unique / 1e9:.2f} GB of different bytes; {model}, {prefill} + {decode} workers, {store}"
    )
    report.show(results, title=title)
    per_s = len(found.requests) * len(results) / took_s
    typer.echo(f"{took_s:.1f} s for {len(results)} runs: {per_s:,.0f} simulated requests/s")
    settings = {
        "trace": trace, "requests": len(found.requests), "seed": seed, "speed": speed,
        "shrink": shrink, "model": model, "prefill": prefill, "decode": decode,
        "store_bytes": capacity, "unique_bytes": unique, "eviction": eviction,
        "slo_ttft_s": slo_ttft, "slo_itl_s": slo_itl, "costs": known.model_dump(),
    }  # fmt: skip
    if json_file is not None:
        report.write_json(json_file, results, settings=settings)
    if plot is not None:
        plots.plot(plot, results, title=title)
    return 0


def _overload(plan: Plan, found: Any, loads: str, json_file: Path | None, plot: Path | None) -> int:
    import json

    from cluster.simulate import plot as plots
    from cluster.simulate import report
    from cluster.simulate.overload import sweep

    try:
        speeds = [float(part) for part in loads.split(",")]
    except ValueError:
        speeds = []
    if not speeds or not all(0 < speed < 1e6 for speed in speeds):
        raise UsageError(f"--overload {loads[:40]!a}: multiples of the load, as 0.5,1,2,3")
    points = sweep(plan, found, speeds)
    title = (
        f"{found.name}: {len(found.requests):,} requests, {plan.prefill} + {plan.decode} workers"
    )
    report.show_sweep(points, title=title)
    if json_file is not None:
        rows = [
            {
                "speed": point.speed,
                "offered": point.offered,
                "admission": point.admitted.to_json(),
                "without": point.everything.to_json(),
            }
            for point in points
        ]
        json_file.write_text(json.dumps(rows, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if plot is not None:
        plots.plot_sweep(plot, points, title=title)
    return 0


def _compare(
    plan: Plan, found: Any, light: Any, against: str, speeds: dict[str, Any], file: Path | None
) -> int:
    import importlib

    from cluster.config import resolve
    from cluster.launchers.common import free_port

    # By name: benchmarks stand above the cluster, which must not import them (import-linter).
    reality = importlib.import_module("bench.reality")
    report = importlib.import_module("bench.report")
    own = against == "fake"
    config = None
    if own:
        flags = speeds | {
            "model.model": "fake",
            "launcher.kind": "local",
            "front.port": free_port(),
            "router.policy": plan.policy.value,
            "prefill.replicas": plan.prefill,
            "prefill.chunk_tokens": plan.costs.chunk_tokens,
            "prefill.max_running": plan.costs.prefill_running,
            "decode.replicas": plan.decode,
            "decode.max_running": plan.costs.decode_running,
        }
        config = resolve(flags).config
    report.publish(
        reality.run(
            plan,
            found,
            light,
            config=config,
            url=None if own else against,
            model="fake" if own else "",
        ),
        file,
    )
    return 0


def _run(plan: Plan, found: Any, names: list[Any]) -> dict[str, Result]:
    from cluster.simulate.world import simulate as run

    results = {name.value: run(replace(plan, policy=name), found) for name in names}
    if plan.store_bytes is not None:
        # What no eviction at all would have given, beside it.
        best = replace(plan, policy=names[0], store_bytes=None)
        results[f"{names[0].value}, {_INFINITE}"] = run(best, found)
    return results


def _names(text: str, known: list[Any], flag: str) -> list[Any]:
    if text == "all":
        return known
    by_name = {each.value: each for each in known}
    names = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [name for name in names if name not in by_name]
    if wrong or not names:
        raise UsageError(
            f"{flag} {(wrong or [text])[0][:40]!a} is none of {', '.join(by_name)} and all"
        )
    return [by_name[name] for name in dict.fromkeys(names)]


def _eviction(name: str) -> Any:
    from kvstore.policy.choice import Eviction

    (found,) = _names(name, list(Eviction), "--eviction")[:1]
    return found


def _capacity(text: str, unique: int) -> int | None:
    from penstock.settings import parse_size

    if text == "infinite":
        return None
    try:
        if text.endswith("%"):
            size = int(unique * float(text[:-1]) / 100)
        else:
            size = int(parse_size(text))
    except ValueError:
        size = 0
    if size < 1:
        raise UsageError(
            f"--store-bytes {text[:40]!a}: a size as 30GB, a share as 10%, or infinite"
        )
    return size


def _scaling(prefill: str | None, decode: str | None, start_s: float) -> Any:
    from cluster.autoscale import AutoscalingSection
    from cluster.simulate.scaling import Scaling
    from penstock.settings import validated

    def section(text: str | None, flag: str) -> AutoscalingSection | None:
        if text is None:
            return None
        values = _pairs([part for part in text.split(",") if part.strip()], flag)
        return validated(
            AutoscalingSection, values | {"enabled": True}, dict.fromkeys(values, flag)
        )

    if prefill is None and decode is None:
        return None
    return Scaling(
        prefill=section(prefill, "--autoscale-prefill"),
        decode=section(decode, "--autoscale-decode"),
        start_s=start_s,
    )


def _pairs(given: list[str], flag: str = "--set") -> dict[str, str]:
    pairs = [each.partition("=") for each in given]
    for name, sign, _ in pairs:
        if not sign:
            raise UsageError(f"{flag} {name[:40]!a} must be NAME=VALUE, as decode_step_s=0.01")
    return {name.strip(): value for name, _, value in pairs}


def _check_writable(path: Path | None) -> None:
    """Before a minute of simulating, not after it."""
    if path is None:
        return
    try:
        with path.open("a", encoding="utf-8"):
            return
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
