"""`python -m kvstore`: one store node as a process. Prints `ready ADDRESS` once it serves."""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import signal
import sys
import threading
from collections.abc import Sequence

import uvloop
from pydantic import ValidationError

from kvstore.config import StoreConfig, StoreSpec
from kvstore.server import start_server
from penstock.errors import PenstockError, UsageError
from penstock.peers import Peers
from penstock.telemetry.logs import configure_logging
from penstock.telemetry_spec import QUIET, TelemetrySpec


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 stopped, 1 cannot start, 2 wrong command line."""
    options = _parser().parse_args(arguments)
    try:
        if options.config_stdin:
            config = StoreSpec.model_validate_json(_first_line())
        else:
            config = StoreSpec(
                listen=options.listen,
                memory_bytes=options.memory,
                redis_url=options.redis_url,
                node_id=options.node_id,
                peers=Peers(
                    ca=options.tls_ca,
                    cert=options.tls_cert,
                    key=options.tls_key,
                    cluster_token_file=options.cluster_token_file,
                ),
                telemetry=TelemetrySpec(
                    metrics_host=options.metrics_host,
                    metrics_port=options.metrics_port,
                    otlp_endpoint=options.otlp_endpoint,
                    log_level=options.log_level,
                ),
            )
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        print(f"kvstore: {place}: {first['msg']}", file=sys.stderr)
        return 2
    configure_logging(level=config.telemetry.log_level, process="store")
    try:
        uvloop.run(_serve(config, exit_with_parent=options.exit_with_parent))
    except PenstockError as error:
        print(f"kvstore: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kvstore", description=__doc__)
    default = StoreConfig()
    parser.add_argument("--listen", default=default.listen, help="HOST:PORT; port 0: a free one")
    parser.add_argument(
        "--memory", type=int, default=default.memory_bytes, metavar="BYTES", help="memory tier"
    )
    parser.add_argument("--redis-url", default=None, help="index in Redis instead of in the node")
    parser.add_argument("--node-id", default="", help="name in the index; default: a random one")
    for name, what in (
        ("ca", "the cluster's authority, PEM"),
        ("cert", "this node's certificate, PEM"),
        ("key", "its private key, PEM"),
    ):
        parser.add_argument(f"--tls-{name}", default=_setting(f"TLS__{name}"), help=what)
    parser.add_argument(
        "--cluster-token-file",
        default=_setting("TLS__CLUSTER_TOKEN_FILE"),
        help="file with the secret that every call must carry",
    )
    parser.add_argument(
        "--metrics-host",
        default=_setting("TELEMETRY__METRICS_HOST") or QUIET.metrics_host,
        help="where to serve GET /metrics",
    )
    parser.add_argument(
        "--metrics-port",
        type=int,
        default=_setting("TELEMETRY__METRICS_PORT"),
        help="serve GET /metrics there too; 0: a free port",
    )
    parser.add_argument(
        "--log-level", default=_setting("TELEMETRY__LOG_LEVEL") or QUIET.log_level, help="warning"
    )
    parser.add_argument(
        "--otlp-endpoint",
        default=_setting("TELEMETRY__OTLP_ENDPOINT")
        or os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"),
        metavar="URL",
        help="collector of traces",
    )
    parser.add_argument(
        "--config-stdin",
        action="store_true",
        help="all settings as JSON on stdin's first line (a Redis URL may hold a password)",
    )
    parser.add_argument(
        "--exit-with-parent", action="store_true", help="stop when standard input reaches its end"
    )
    return parser


def _setting(name: str) -> str | None:
    return os.environ.get(f"PENSTOCK_{name.upper()}") or None


def _first_line() -> str:
    # Unbuffered: what follows belongs to the parent's leash.
    line = bytearray()
    while (byte := os.read(0, 1)) and byte != b"\n":
        line += byte
    return line.decode(errors="replace")


async def _serve(config: StoreSpec, *, exit_with_parent: bool) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    if exit_with_parent:
        threading.Thread(target=_watch_parent, args=(loop, stop), daemon=True).start()
    server = await start_server(config, config.peers, config.telemetry)
    # What was imported stays: the collector need not walk it under every transfer.
    gc.collect()
    gc.freeze()
    print(f"ready {server.address}", flush=True)
    await stop.wait()
    await server.stop()


def _watch_parent(loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Reads until end of file: a thread, for standard input may be what no loop can watch."""
    while os.read(0, 4096):
        pass
    loop.call_soon_threadsafe(stop.set)


if __name__ == "__main__":
    sys.exit(main())
