"""`penstock serve`: flags to configuration to a running cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cluster.cli.options import (
    ConfigFile,
    ContextParallel,
    DeviceOption,
    DraftTokensOption,
    ExpertParallel,
    KvCacheDtypeOption,
    Launcher,
    NumericsOption,
    RoundingOption,
    TensorParallel,
)

Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="A model folder, `ledger` (shipped) or `fake`."),
]


def register(app: typer.Typer) -> None:
    app.command("serve", help="Start a cluster and serve it until Ctrl-C.")(serve)


def serve(
    model: Model = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="HTTP port.")] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="Name under which clients ask for the model.")
    ] = None,
    max_model_len: Annotated[int | None, typer.Option(help="Longest context, in tokens.")] = None,
    tensor_parallel_size: TensorParallel = None,
    expert_parallel_size: ExpertParallel = None,
    prefill_context_parallel_size: ContextParallel = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Most sequences in a decode worker's batch.")
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of one prefill step (a chunk).")
    ] = None,
    num_speculative_tokens: DraftTokensOption = None,
    kv_cache_dtype: KvCacheDtypeOption = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Key that clients must send; several separated by commas."),
    ] = None,
    api_keys_file: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Keys with tenants and limits; see `penstock keys`."),
    ] = None,
    tls_cert: Annotated[str | None, typer.Option(help="Certificate file, PEM.")] = None,
    tls_key: Annotated[str | None, typer.Option(help="Its private key, PEM.")] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Allow --host without a key and TLS.")
    ] = False,
    config: ConfigFile = None,
    prefill_replicas: Annotated[int | None, typer.Option(help="Prefill workers.")] = None,
    decode_replicas: Annotated[int | None, typer.Option(help="Decode workers.")] = None,
    kv_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory of the KV store, such as 4GiB.")
    ] = None,
    decode_kv_memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="KV pages of one decode worker.")
    ] = None,
    kv_disk: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Disk tier of the KV store, such as 100GiB.")
    ] = None,
    kv_disk_dir: Annotated[
        str | None, typer.Option(metavar="DIR", help="Its folder; default: ~/.cache/penstock/kv.")
    ] = None,
    redis_url: Annotated[str | None, typer.Option(help="Redis as the index.")] = None,
    journal_url: Annotated[
        str | None, typer.Option(help="Where batch jobs live: sqlite:///PATH or a durable Redis.")
    ] = None,
    numerics: NumericsOption = None,
    rounding: RoundingOption = None,
    device: DeviceOption = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the gRPC batch service.")] = None,
    batch_sources: Annotated[
        str | None,
        typer.Option(
            metavar="PLACES",
            help="Where batch jobs may read documents: file:///data/,https://host/,s3://bucket/.",
        ),
    ] = None,
    launcher: Launcher = None,
) -> int:
    from cluster.config import resolve
    from model.ranks.check import check_ranks
    from penstock.chat import check_encoding

    flags = {
        "model.model": model,
        "front.host": host,
        "front.port": port,
        "model.served_name": served_model_name,
        "model.max_model_len": max_model_len,
        "parallel.tensor": tensor_parallel_size,
        "parallel.expert": expert_parallel_size,
        "parallel.prefill_context": prefill_context_parallel_size,
        "decode.max_running": max_num_seqs,
        "prefill.chunk_tokens": max_num_batched_tokens,
        "model.num_speculative_tokens": num_speculative_tokens,
        "model.kv_cache_dtype": text(kv_cache_dtype),
        "front.api_key": api_key,
        "front.api_keys_file": api_keys_file,
        "front.tls_cert": tls_cert,
        "front.tls_key": tls_key,
        "front.insecure": insecure or None,
        "prefill.replicas": prefill_replicas,
        "decode.replicas": decode_replicas,
        "kvstore.memory_bytes": kv_memory,
        "kvstore.disk_bytes": kv_disk,
        "kvstore.disk_dir": kv_disk_dir,
        "decode.kv_memory_bytes": decode_kv_memory,
        "kvstore.redis_url": redis_url,
        "model.numerics": text(numerics),
        "model.rounding": rounding,
        "model.device": text(device),
        "batch.journal_url": journal_url,
        "batch.grpc_port": grpc_port,
        "batch.sources": batch_sources,
        "launcher.kind": text(launcher),
    }
    resolved = resolve(flags, file=config)
    # Named here, before any process starts that could only fail on it.
    for role in ("prefill", "decode"):
        check_ranks(resolved.config.model_spec(), resolved.config.parallel.of_role(role))
    check_encoding(resolved.config.model.model)
    keys_file = resolved.config.front.api_keys_file
    if keys_file is not None:
        from cluster.auth.keys import read_keys

        read_keys(Path(keys_file))
    if resolved.config.batch.journal_url is not None:
        from kvstore.journal.journal import check_url

        check_url(resolved.config.batch.journal_url)
    front = resolved.config.front
    if front.tls_cert is not None and front.tls_key is not None:
        from penstock.peers import check_pair

        check_pair(front.tls_cert, front.tls_key, "--tls-cert", "--tls-key")
    resolved.config.tls.check()
    from cluster.launch import run

    return run(resolved.config, lambda: resolve(flags, file=config).config)


def text(choice: Any) -> str | None:
    return None if choice is None else str(choice)
