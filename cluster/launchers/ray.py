"""The product's launcher: Ray Serve deployments for the pools and the front, one store node beside
them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from cluster.autoscale import most_replicas
from cluster.config import ClusterConfig
from cluster.contracts import Endpoint
from cluster.launchers.common import (
    front_spec,
    http_url,
    require_free_ports,
    start_store,
    wait_until_ready,
    with_token,
    worker_spec,
)
from penstock.child import ChildProcess
from penstock.errors import PenstockError, UnavailableError

_log = logging.getLogger(__name__)


class RayLauncher:
    """Starts its own Ray unless the configuration names a cluster to join; never touches another
    one.
    """

    def __init__(self, config: ClusterConfig) -> None:
        self._config = with_token(config)
        self._store: ChildProcess | None = None
        self._ray_dir: Path | None = None
        self._janitor: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()

    def start(self) -> Endpoint:
        config = self._config
        require_free_ports(config)
        self._store, store_address = start_store(config)
        self._start_ray()
        self._deploy(store_address)
        url = http_url(config)
        wait_until_ready(url, timeout_s=config.launcher.start_timeout_s, alive=self._check)
        return Endpoint(url, store_address, config.tls)

    def _start_ray(self) -> None:
        settings = self._config.launcher
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "1")
        if settings.ray_address is None:
            # A Ray of our own speaks to itself over loopback only; a token would protect nothing
            # more.
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")
            os.environ.pop("RAY_ADDRESS", None)
        import ray

        common: dict[str, Any] = {
            "include_dashboard": False,
            "log_to_driver": _log.isEnabledFor(logging.DEBUG),
            "logging_level": logging.WARNING,
            "configure_logging": False,
        }
        # Ray puts its own handlers in place of ours, which end the process without a clean-up.
        main = threading.current_thread() is threading.main_thread()
        ours = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)} if main else {}
        try:
            if settings.ray_address is not None:
                ray.init(address=settings.ray_address, log_to_driver=common["log_to_driver"])
                return
            # Unix socket paths end at 107 bytes, so the directory's name must be short.
            self._ray_dir = Path(tempfile.mkdtemp(prefix="pen-ray-"))
            self._janitor = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "cluster.launchers.janitor",
                    str(os.getpid()),
                    str(self._ray_dir),
                ],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
            ray.init(
                address="local",
                num_cpus=max(8, os.cpu_count() or 1, self._cpus_wanted()),
                object_store_memory=settings.object_store_bytes,
                _temp_dir=str(self._ray_dir),
                _node_ip_address="127.0.0.1",
                **common,
            )
        except SystemExit:
            # A SIGTERM that met Ray's handler: hand it to ours.
            if main:
                signal.signal(signal.SIGTERM, ours[signal.SIGTERM])
                signal.raise_signal(signal.SIGTERM)
            raise
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = settings.ray_address or "a Ray of its own"
            raise UnavailableError(f"cannot start {where}: {str(error).splitlines()[0]}") from error
        finally:
            for number, handler in ours.items():
                signal.signal(number, handler)

    def _cpus_wanted(self) -> int:
        """Ray counts, it does not measure: one for every rank and front, and Serve's own."""
        config = self._config
        workers = {
            "prefill": most_replicas(config.prefill.replicas, config.prefill.autoscaling),
            "decode": most_replicas(config.decode.replicas, config.decode.autoscaling),
        }
        ranks = sum(n * config.parallel.of_role(role).world for role, n in workers.items())
        return ranks + config.front.replicas + 2

    def _deploy(self, store_address: str) -> None:
        from ray import serve
        from ray.serve.config import HTTPOptions

        from cluster import deployments
        from cluster.front import FrontReplica
        from cluster.pools import DecodeReplica, PrefillReplica

        config = self._config
        # Serve's own log goes to files in the Ray directory; its chatter is not the user's.
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            serve.start(
                http_options=HTTPOptions(
                    host=config.front.host,
                    port=config.front.port,
                    ssl_certfile=config.front.tls_cert,
                    ssl_keyfile=config.front.tls_key,
                ),
                proxy_location="HeadOnly",
                logging_config=deployments.QUIET,
            )
        except RuntimeError as error:
            # Serve's report of its proxy is a traceback; its last line says what went wrong.
            cause = str(error).strip().splitlines()[-1].removeprefix("RuntimeError: ")
            raise UnavailableError(f"Ray Serve could not start its proxy: {cause}") from error
        # On one machine a model that fails to load fails again; elsewhere it may be one bad node.
        retries = 1 if config.launcher.ray_address is None else 20
        targets = []
        for role, replica in (("prefill", PrefillReplica), ("decode", DecodeReplica)):
            spec = worker_spec(config, role=role, worker_id=role, store_address=store_address)
            told = spec.model_dump_json()
            app = deployments.pool(
                replica,
                told,
                role=role,
                config=config,
                retries=retries,
                store_address=store_address,
                secrets=True,
            )
            targets.append(serve.RunTarget(app, name=role, route_prefix=None))
        told = front_spec(config, store_address=store_address).model_dump_json()
        app = deployments.front(FrontReplica, told, config=config)
        targets.append(serve.RunTarget(app, name="front", route_prefix="/"))
        try:
            serve.run_many(targets)
        except RuntimeError as error:
            raise PenstockError(_cause(str(error), _reports())) from error

    def _check(self) -> None:
        if self._store is not None and not self._store.running:
            raise UnavailableError("the KV store node has ended; its last words are in the log")

    def wait(self) -> None:
        """Restarts nothing itself: Serve restarts replicas. A dead store node ends the cluster."""
        while not self._stopping.wait(0.5):
            self._check()

    def rollout(self) -> None:
        """Serve replaces replicas itself, one after the other, when what is deployed changes."""
        _log.warning("no rollout: Ray Serve does that itself (docs/rollout.md)")

    def stop(self) -> None:
        self._stopping.set()
        if "ray" in sys.modules:
            import ray

            if ray.is_initialized():
                from ray import serve

                # Ray tells of its controller's end on stdout, where only our own lines belong.
                with (
                    Path(os.devnull).open("w") as nowhere,
                    contextlib.redirect_stdout(nowhere),
                ):
                    try:
                        cast(Any, serve).shutdown()
                    except (RuntimeError, TimeoutError, ray.exceptions.RayError) as error:
                        _log.warning("Serve did not shut down cleanly: %s", error)
                    ray.shutdown()
        if self._store is not None:
            self._store.stop()
            self._store = None
        if self._ray_dir is not None:
            # Ray's processes need a moment to close their files.
            time.sleep(0.2)
            shutil.rmtree(self._ray_dir, ignore_errors=True)
            self._ray_dir = None
        if self._janitor is not None:
            self._janitor.communicate(b"done", timeout=5.0)
            self._janitor = None


def _reports() -> list[str]:
    """What Serve knows of each deployment; a traceback of its constructor if that failed."""
    from ray import serve

    status = serve.status()
    return [d.message for app in status.applications.values() for d in app.deployments.values()]


def _cause(summary: str, reports: Sequence[str]) -> str:
    """One sentence: the error with which a worker's constructor ended, else Serve's summary."""
    for report in reports:
        # A chain of tracebacks ends with the error that was raised last.
        ours = re.findall(r"^penstock\.errors\.\w+: (.+)$", report, re.MULTILINE)
        if ours:
            return str(ours[-1])
    for report in reports:
        errors = re.findall(r"^[\w.]+(?:Error|Exception): (?!Traceback)(.+)$", report, re.MULTILINE)
        if errors:
            return str(errors[-1])
    return next((line.strip() for line in summary.splitlines() if line.strip()), "no deployment")
