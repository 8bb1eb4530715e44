"""`penstock bench serve|front|store|engine|router`: the flags of the benchmarks."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.options import ConfigFile, DeviceOption, Launcher
from cluster.cli.serve import text
from penstock.errors import UsageError

Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Write the report there.")
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(
        help="Measure through public doors.", no_args_is_help=True, rich_markup_mode=None
    )
    group.command("serve", help="Latency and throughput of the HTTP endpoint.")(serve)
    group.command("front", help="Cost of a streamed token by what stands before the front.")(front)
    group.command("store", help="Bytes and lookups through the store, beside plain TCP.")(store)
    group.command("engine", help="Speed of a model, beside a plain matmul.")(engine)
    group.command("router", help="Routing decisions a second on one core.")(router)
    group.command("overload", help="Three times the capacity, and no admission.")(overload)
    group.command("interference", help="Time between tokens beside a long prompt.")(interference)
    group.command("fairness", help="A short prompt beside long ones; unlike tenants.")(fairness)
    app.add_typer(group, name="bench")


def serve(
    json_file: Json = None,
    url: Annotated[
        str | None, typer.Option(help="A running OpenAI-compatible server; else one is started.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="`fake` unless given; with --url the name to ask for.")
    ] = None,
    launcher: Launcher = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="PENSTOCK_API_KEY", help="Key of the server.")
    ] = None,
    concurrency: Annotated[
        list[int] | None, typer.Option(min=1, max=1024, help="Repeatable; 1, 4 and 16.")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="For each concurrency.")] = 8.0,
    prompt_chars: Annotated[int, typer.Option(min=1, help="Length of a prompt.")] = 2_000,
    max_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer.")] = 64,
    cached_prompt_chars: Annotated[
        int, typer.Option(min=1, help="Length of a prompt that is sent twice.")
    ] = 16_000,
    cached_pairs: Annotated[int, typer.Option(min=1, help="How many of those.")] = 5,
    ignore_eos: Annotated[
        bool,
        typer.Option("--ignore-eos/--no-ignore-eos", help="Ask for answers of full length."),
    ] = True,
    fake_step_ms: Annotated[
        float, typer.Option(min=0, help="Of `fake`: time of a decode step.")
    ] = 10.0,
    fake_prefill_tokens_per_s: Annotated[
        float, typer.Option(min=0, help="Of `fake`: speed of prefill, 0 for as fast as it goes.")
    ] = 20_000.0,
    seed: Annotated[int | None, typer.Option(help="Of the prompts; fresh unless given.")] = None,
    config: ConfigFile = None,
) -> int:
    if url is not None and (launcher is not None or config is not None):
        raise UsageError("--url measures a running server; leave --launcher and --config out")
    report = _room("report")
    report.check_writable(json_file)
    bench = _room("serve")
    plan = bench.ServePlan(
        concurrencies=tuple(concurrency or (1, 4, 16)),
        seconds=seconds,
        prompt_chars=prompt_chars,
        max_tokens=max_tokens,
        cached_prompt_chars=cached_prompt_chars,
        cached_pairs=cached_pairs,
        ignore_eos=ignore_eos,
        seed=seed,
    )
    resolved = None
    if url is None:
        resolved = _config(
            model or "fake", launcher, config, fake_step_ms, fake_prefill_tokens_per_s
        )
    result = bench.run(
        plan,
        config=resolved,
        url=url,
        model=(model or "") if resolved is None else resolved.served_name,
        key=api_key,
    )
    report.publish(result, json_file)
    return 0


def front(
    json_file: Json = None,
    streams: Annotated[int, typer.Option(min=1, max=256, help="Side by side.")] = 16,
    tokens: Annotated[int, typer.Option(min=8, help="Of each answer.")] = 200,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds of each case.")] = 3,
    step_ms: Annotated[float, typer.Option(min=0.1, help="Pace of the paced streams.")] = 10.0,
    at_once: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000, help="Instead: so many paced streams opened in one moment, once."
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, max=64, help="Decode workers that share them (--at-once).")
    ] = 1,
) -> int:
    report = _room("report")
    report.check_writable(json_file)
    if at_once is not None:
        many = _room("front_many").run(
            streams=at_once, tokens=tokens, step_ms=step_ms, workers=workers
        )
        report.publish(many, json_file)
        return 0
    result = _room("front").run(streams=streams, tokens=tokens, repeats=repeats, step_ms=step_ms)
    report.publish(result, json_file)
    return 0


def store(
    json_file: Json = None,
    block_kib: Annotated[int, typer.Option(min=1, max=65_536, help="Of a block.")] = 1024,
    blocks: Annotated[int, typer.Option(min=1, max=4096, help="In a round.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, max=50, help="Rounds that count.")] = 5,
) -> int:
    report = _room("report")
    report.check_writable(json_file)
    result = _room("store").run(block_kib=block_kib, blocks=blocks, repeats=repeats)
    report.publish(result, json_file)
    return 0


def engine(
    json_file: Json = None,
    model: Annotated[str, typer.Option(help="A model folder, `ledger` or `fake`.")] = "ledger",
    length: Annotated[
        list[int] | None, typer.Option(min=16, help="Prompt tokens; repeatable; 8192 and 32768.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Of each answer.")] = 64,
    repeats: Annotated[int, typer.Option(min=1, help="Requests of each length.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the prompts.")] = 1,
    alone: Annotated[
        bool, typer.Option("--alone", help="The engine in process, without a cluster.")
    ] = False,
    against: Annotated[
        str | None, typer.Option(help="With --alone: `transformers` beside it, in the same run.")
    ] = None,
    against_most: Annotated[
        int, typer.Option(min=16, help="With --against: its longest prompt.")
    ] = 8192,
    against_chunk: Annotated[
        int, typer.Option(min=0, help="With --against: its prompt tokens a call; 0 for all.")
    ] = 512,
    random_model: Annotated[
        bool, typer.Option("--random-model", help="With --alone: a Flash-shaped one of 114 M too.")
    ] = False,
    budget_s: Annotated[
        float, typer.Option(min=0, help="With --alone: begins no repetition after this time.")
    ] = 60.0,
    device: DeviceOption = None,
    config: ConfigFile = None,
) -> int:
    from cluster.config import resolve
    from cluster.launchers.common import free_port

    report = _room("report")
    report.check_writable(json_file)
    if not alone and (against is not None or random_model):
        raise UsageError("--against and --random-model measure the engine alone; add --alone")
    if alone:
        compare = _room("engine_compare")
        result = compare.run(
            compare.Plan(
                models=(model, compare.RANDOM_MODEL) if random_model else (model,),
                lengths=tuple(length or (1024, 8192, 65_536)),
                against=against,
                against_most=against_most,
                against_chunk=against_chunk,
                repeats=repeats,
                steps=tokens,
                budget_s=budget_s,
                seed=seed,
            )
        )
        report.publish(result, json_file)
        return 0
    flags = {
        "model.model": model,
        "model.device": text(device),
        "launcher.kind": "local",
        "front.port": free_port(),
    }
    result = _room("engine").run(
        resolve(flags, file=config).config,
        lengths=tuple(length or (8192, 32_768)),
        tokens=tokens,
        repeats=repeats,
        seed=seed,
    )
    report.publish(result, json_file)
    return 0


def router(
    json_file: Json = None,
    workers: Annotated[int, typer.Option(min=2, max=65_536, help="Half of each role.")] = 64,
    prefixes: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Resident, each with a state.")
    ] = 100_000,
    decisions: Annotated[int, typer.Option(min=1, help="In a round.")] = 20_000,
    repeats: Annotated[int, typer.Option(min=1, max=50, help="Rounds.")] = 5,
    seed: Annotated[int, typer.Option(help="Of fleet and prompts.")] = 1,
) -> int:
    report = _room("report")
    report.check_writable(json_file)
    bench = _room("router")
    plan = bench.Plan(
        workers=workers, prefixes=prefixes, decisions=decisions, repeats=repeats, seed=seed
    )
    report.publish(bench.run(plan), json_file)
    return 0


def overload(
    json_file: Json = None,
    factor: Annotated[float, typer.Option(min=0.1, help="Times the capacity.")] = 3.0,
    seconds: Annotated[float, typer.Option(min=2, help="Of each load.")] = 20.0,
    seed: Annotated[int | None, typer.Option(help="Of arrivals and prompts.")] = None,
) -> int:
    report, bench = _room("report"), _room("overload")
    report.check_writable(json_file)
    report.publish(bench.run(bench.Plan(factor=factor, seconds=seconds, seed=seed)), json_file)
    return 0


def interference(
    json_file: Json = None,
    streams: Annotated[int, typer.Option(min=1, max=64, help="Answers being written.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Long prompts, one after the other.")] = 3,
    seed: Annotated[int | None, typer.Option(help="Of the prompts.")] = None,
) -> int:
    report, bench = _room("report"), _room("interference")
    report.check_writable(json_file)
    report.publish(bench.run(bench.Plan(streams=streams, rounds=rounds, seed=seed)), json_file)
    return 0


def fairness(
    json_file: Json = None,
    shorts: Annotated[int, typer.Option(min=1, help="Short prompts, alone and beside.")] = 12,
    seconds: Annotated[float, typer.Option(min=2, help="Of the two tenants' load.")] = 20.0,
    seed: Annotated[int | None, typer.Option(help="Of the prompts.")] = None,
) -> int:
    report, bench = _room("report"), _room("fairness")
    report.check_writable(json_file)
    plan = bench.Plan(shorts=shorts, tenant_seconds=seconds, seed=seed)
    report.publish(bench.run(plan), json_file)
    return 0


def _config(
    model: str, launcher: Any, file: Path | None, step_ms: float, prefill_tokens_per_s: float
) -> Any:
    from cluster.config import resolve
    from cluster.launchers.common import free_port

    flags: dict[str, Any] = {
        "model.model": model,
        "launcher.kind": text(launcher),
        "front.port": free_port(),
    }
    if model == "fake":
        flags["model.fake_decode_step_ms"] = step_ms
        flags["model.fake_prefill_tokens_per_s"] = prefill_tokens_per_s
    return resolve(flags, file=file).config


def _room(name: str) -> Any:
    """By name: benchmarks stand above the cluster, which must not import them (import-linter)."""
    return importlib.import_module(f"bench.{name}")
