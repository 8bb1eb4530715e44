"""What both launchers do alike: the store node, the specs of workers and front, waiting until all
is ready.
"""

from __future__ import annotations

import random
import secrets
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable

from cluster.config import ClusterConfig
from cluster.front import FrontSpec
from kvstore.config import StoreSpec
from penstock.child import ChildProcess
from penstock.errors import PenstockError, UnavailableError
from penstock.worker import WorkerSpec

_STORE_START_TIMEOUT_S = 30.0
_READY_POLL_S = 0.1
# Below Linux's ephemeral ports (32768 and up) and clear of Ray's and Redis's defaults.
_PORTS = range(20_000, 30_000)


def http_url(config: ClusterConfig) -> str:
    """The address users type. A wildcard host is reached over loopback from here."""
    scheme = "https" if config.front.tls_cert else "http"
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(config.front.host, config.front.host)
    return f"{scheme}://{host}:{config.front.port}"


def require_free_ports(config: ClusterConfig) -> None:
    """Raises `PenstockError` naming the port if something listens on one of the front's already."""
    require_free_port(config.front.host, config.front.port, "--port")
    if config.batch.grpc_port is not None:
        require_free_port(config.front.host, config.batch.grpc_port, "--grpc-port")


def require_free_port(host: str, port: int, flag: str) -> None:
    """Raises `PenstockError` naming the port if something listens there already."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise PenstockError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another with {flag}"
            ) from error


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on now, below the range from which the system draws its own.

    A port of that range may be taken by any outgoing connection before the cluster, which needs
    seconds to start, comes to bind it.
    """
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise UnavailableError(f"found no free port of {host} among {_PORTS.start} to {_PORTS.stop}")


def with_token(config: ClusterConfig) -> ClusterConfig:
    """`config` with a cluster token of its own if it names none.

    Loopback is open to every user of a machine, and who may write to the store could put another's
    bytes under any id. A store that runs already has the token that it was started with.
    """
    if config.tls.has_token or config.launcher.store_address is not None:
        return config
    drawn = config.tls.model_copy(update={"cluster_token": secrets.token_urlsafe(32)})
    return config.model_copy(update={"tls": drawn})


def start_store(config: ClusterConfig) -> tuple[ChildProcess | None, str]:
    """The store node (None if the configuration names one that runs already) and its address."""
    store = config.kvstore
    if config.launcher.store_address is not None:
        return None, config.launcher.store_address
    # Started again it must be found where it was: workers and fronts know this address.
    host, _, port = store.listen.rpartition(":")
    if port == "0":
        store = store.model_copy(update={"listen": f"{host}:{free_port(host.strip('[]'))}"})
    spec = StoreSpec(**store.model_dump(), peers=config.tls, telemetry=config.telemetry)
    child = ChildProcess(
        "kvstore",
        "kvstore",
        ["--config-stdin", "--exit-with-parent"],
        first_line=spec.model_dump_json(),
    )
    try:
        child.spawn()
        return child, child.await_ready(_STORE_START_TIMEOUT_S)
    except PenstockError:
        child.stop()
        raise


def worker_spec(
    config: ClusterConfig, *, role: str, worker_id: str, store_address: str
) -> WorkerSpec:
    """What a worker of this role is told."""
    pool = config.prefill if role == "prefill" else config.decode
    return WorkerSpec(
        worker_id=worker_id,
        model=config.model_spec(),
        store_address=store_address,
        index_url=config.kvstore.redis_url,
        listen_host=config.launcher.worker_host,
        peers=config.tls,
        ranks=config.parallel.of_role(role),
        telemetry=config.telemetry,
        chunk_tokens=config.prefill.chunk_tokens,
        answer_room_tokens=config.decode.answer_room_tokens,
        grant_ttl_s=config.decode.grant_ttl_s,
        max_running=pool.max_running,
        max_queued=pool.max_queued,
        kv_memory_bytes=pool.kv_memory_bytes,
    )


def front_spec(config: ClusterConfig, *, store_address: str) -> FrontSpec:
    return FrontSpec(config=config, store_address=store_address)


def wait_until_ready(url: str, *, timeout_s: float, alive: Callable[[], None]) -> None:
    """Polls `/ready`. `alive` raises if a part has died. Raises with the last reason on timeout."""
    deadline, reason = time.monotonic() + timeout_s, "the front does not answer"
    # Our own certificate may be self-signed; this asks only whether our own process is up.
    context = ssl._create_unverified_context() if url.startswith("https") else None
    while True:
        alive()
        try:
            with urllib.request.urlopen(f"{url}/ready", timeout=2.0, context=context) as answer:
                if answer.status == 200:
                    return
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace")[:300]
        except OSError as error:
            reason = str(error)
        if time.monotonic() > deadline:
            raise UnavailableError(f"the cluster was not ready after {timeout_s:.0f} s: {reason}")
        time.sleep(_READY_POLL_S)
