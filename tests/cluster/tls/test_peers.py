"""Who is let in: every RPC of store and workers, tried by those who must be refused."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from cluster.tls.authority import new_authority, new_member
from cluster.tls.files import make
from penstock.peers import PEER_NAME, TOKEN_KEY, Peers
from protos.penstock.kv.v1 import kv_pb2
from tests.cluster.harness import Cluster, cluster

STORE, WORKERS = ("KvStore", "StoreAdmin", "Directory", "Metrics"), ("Prefill", "Decode")
# Users' own door: keys instead of the cluster's token.
OUTSIDE = {"penstock.batch.v1.Batch"}
FILES = sorted((Path(__file__).parents[3] / "protos").glob("penstock/*/v1/*_pb2.py"))
SERVICES = [
    service
    for file in FILES
    for service in import_module(
        f"protos.penstock.{file.parts[-3]}.v1.{file.stem}"
    ).DESCRIPTOR.services_by_name.values()
    if service.full_name not in OUTSIDE
]
METHODS = [(service.name, method) for service in SERVICES for method in service.methods]
REFUSED = grpc.StatusCode.UNAUTHENTICATED


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("certs")
    make(place, ("localhost", "127.0.0.1"), days=2, authority_days=2)
    return place


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[Cluster]:
    """HTTPS outside, mutual TLS and a token inside."""
    with cluster(
        "fake",
        trust=str(folder / "ca.crt"),
        front__tls_cert=str(folder / "front.crt"),
        front__tls_key=str(folder / "front.key"),
        tls__ca=str(folder / "ca.crt"),
        tls__cert=str(folder / "cluster.crt"),
        tls__key=str(folder / "cluster.key"),
        tls__cluster_token_file=str(folder / "cluster.token"),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def plain() -> Iterator[Cluster]:
    """As `penstock serve fake` starts it: loopback, nothing configured."""
    with cluster("fake") as running:
        yield running


def addresses(running: Cluster) -> dict[str, str]:
    """Of each service."""
    found = dict.fromkeys(STORE, running.store_address)
    names = {kv_pb2.WORKER_ROLE_PREFILL: "Prefill", kv_pb2.WORKER_ROLE_DECODE: "Decode"}
    return found | {names[worker.role]: worker.address for worker in running.workers()}


def attempt(channel: grpc.Channel, method: Any, metadata: Any = None) -> grpc.StatusCode:
    """How one call of `method` with an empty message ends."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = f"{'stream' if method.client_streaming else 'unary'}"
    kind += f"_{'stream' if method.server_streaming else 'unary'}"
    call = getattr(channel, kind)(path)
    given = iter([b""]) if method.client_streaming else b""
    try:
        answer = call(given, timeout=10, metadata=metadata)
        if method.server_streaming:
            # One message says as much as all of them, and Subscribe's stream has no end.
            next(answer, None)
            answer.cancel()
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def secure(address: str, ca: Path, pair: Path | None) -> grpc.Channel:
    key = cert = None
    if pair is not None:
        key, cert = pair.with_suffix(".key").read_bytes(), pair.with_suffix(".crt").read_bytes()
    credentials = grpc.ssl_channel_credentials(ca.read_bytes(), key, cert)
    options = [("grpc.ssl_target_name_override", PEER_NAME)]
    return grpc.secure_channel(address, credentials, options=options)


def test_there_are_calls_to_try() -> None:
    print([f"{service}.{method.name}" for service, method in METHODS])
    assert {service for service, _ in METHODS} == {*STORE, *WORKERS}
    assert len(METHODS) >= 12


@pytest.mark.parametrize("token", [None, "", "x" * 43, "wrong", "\u00e9"])
def test_every_call_without_the_token_is_unauthenticated(
    guarded: Cluster, folder: Path, token: str | None
) -> None:
    where = addresses(guarded)
    metadata: Any = None if token is None else [(TOKEN_KEY, token)]
    if token is not None and not token.isascii():
        # The wire knows such bytes under names with this ending only.
        metadata = [(f"{TOKEN_KEY}-bin", token.encode("latin-1"))]
    ended = {}
    for service, method in METHODS:
        with secure(where[service], folder / "ca.crt", folder / "cluster") as channel:
            ended[f"{service}.{method.name}"] = attempt(channel, method, metadata)
    print(ended)
    assert set(ended.values()) == {REFUSED}


def test_every_call_without_a_certificate_of_the_cluster_ends_at_the_handshake(
    guarded: Cluster, folder: Path, tmp_path: Path
) -> None:
    foreign = new_member(new_authority(2), 2)
    (tmp_path / "foreign.crt").write_bytes(foreign.cert)
    (tmp_path / "foreign.key").write_bytes(foreign.key)
    token = [(TOKEN_KEY, (folder / "cluster.token").read_text().strip())]
    where = addresses(guarded)
    for pair in (None, tmp_path / "foreign", folder / "front"):
        ended = {}
        for service, method in METHODS:
            with secure(where[service], folder / "ca.crt", pair) as channel:
                ended[f"{service}.{method.name}"] = attempt(channel, method, token)
        print(pair and pair.name, ended)
        assert set(ended.values()) == {grpc.StatusCode.UNAVAILABLE}
    with grpc.insecure_channel(guarded.store_address) as channel:
        assert attempt(channel, METHODS[0][1], token) == grpc.StatusCode.UNAVAILABLE


def test_on_loopback_every_call_without_the_launchers_token_is_unauthenticated(
    plain: Cluster,
) -> None:
    where = addresses(plain)
    for metadata in (None, [(TOKEN_KEY, "x" * 43)], [("authorization", "Bearer sk-whatever")]):
        ended = {}
        for service, method in METHODS:
            with grpc.insecure_channel(where[service]) as channel:
                ended[f"{service}.{method.name}"] = attempt(channel, method, metadata)
        print(metadata, ended)
        assert set(ended.values()) == {REFUSED}


@pytest.mark.parametrize("which", ["guarded", "plain"])
def test_members_are_let_in(which: str, folder: Path, request: pytest.FixtureRequest) -> None:
    running: Cluster = request.getfixturevalue(which)
    token = [(TOKEN_KEY, running.peers.token())]
    where = addresses(running)
    ended = {}
    for service, method in METHODS:
        address = where[service]
        with (
            secure(address, folder / "ca.crt", folder / "cluster")
            if running.peers.secure
            else grpc.insecure_channel(address)
        ) as channel:
            ended[f"{service}.{method.name}"] = attempt(channel, method, token)
    print(ended)
    assert not {REFUSED, grpc.StatusCode.UNAVAILABLE} & set(ended.values())
    assert ended["KvStore.Stat"] == grpc.StatusCode.OK
    assert running.complete([5] * 600, max_tokens=3).completion_tokens == 3


def test_health_may_be_asked_without_the_token_and_says_no_more_than_that(plain: Cluster) -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(plain.store_address) as channel:
        asked = health_pb2.HealthCheckRequest(service="penstock.kv.v1.KvStore")
        answer = health_pb2_grpc.HealthStub(channel).Check(asked, timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    with grpc.insecure_channel(plain.store_address) as channel:
        method = channel.unary_unary("/grpc.health.v1.Healthy/../penstock.kv.v1.KvStore/Stat")
        with pytest.raises(grpc.RpcError) as refused:
            method(b"", timeout=5)
    assert refused.value.code() == REFUSED


def test_the_front_speaks_tls_alone_and_names_its_hosts(guarded: Cluster, folder: Path) -> None:
    assert guarded.url.startswith("https://")
    assert guarded.client.get("/ready").status_code == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"{guarded.url}/ready", timeout=5)
    with pytest.raises(httpx.HTTPError):
        httpx.get(guarded.url.replace("https", "http") + "/ready", timeout=5)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_the_front_offers_no_old_tls(guarded: Cluster) -> None:
    import socket
    import ssl

    host, port = guarded.url.removeprefix("https://").rsplit(":", 1)
    versions = {}
    for version in (ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version = context.maximum_version = version
        try:
            with (
                socket.create_connection((host, int(port)), 5) as raw,
                context.wrap_socket(raw) as wrapped,
            ):
                versions[version.name] = wrapped.version()
        except (ssl.SSLError, OSError) as error:
            versions[version.name] = type(error).__name__
    print(versions)
    assert versions["TLSv1_2"] == "TLSv1.2" and versions["TLSv1_3"] == "TLSv1.3"
    assert versions["TLSv1_1"] not in ("TLSv1.1", "TLSv1")


def test_a_store_of_another_token_is_named_to_who_starts_a_worker(
    guarded: Cluster, folder: Path
) -> None:
    from penstock.worker import ModelSpec, WorkerSpec

    files = {name: getattr(guarded.peers, name) for name in ("ca", "cert", "key")}
    spec = WorkerSpec(
        worker_id="stranger",
        model=ModelSpec(model="fake"),
        store_address=guarded.store_address,
        peers=Peers(**files, cluster_token="another-token-of-somebody"),
    )
    done = subprocess.run(
        [sys.executable, "-m", "prefill", "--spec-stdin"],
        input=spec.model_dump_json() + "\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    print(done.stderr)
    assert done.returncode == 1 and "PENSTOCK_TLS__CLUSTER_TOKEN" in done.stderr
    assert "another-token" not in done.stderr
    assert "stranger" not in {worker.worker_id for worker in guarded.workers()}


def test_no_command_line_shows_the_token(plain: Cluster) -> None:
    token = plain.peers.token()
    assert token is not None and token not in repr(plain.peers)
    seen = 0
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = entry.read_bytes()
        except OSError:
            continue
        seen += 1
        assert token.encode() not in command
    print(f"{seen} command lines without the token")
    assert seen > 3


def test_a_store_started_by_hand_takes_its_certificates_from_flags(folder: Path) -> None:
    command = [sys.executable, "-m", "kvstore", "--tls-ca", str(folder / "ca.crt")]
    command += ["--tls-cert", str(folder / "cluster.crt"), "--tls-key", str(folder / "cluster.key")]
    command += ["--cluster-token-file", str(folder / "cluster.token")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as store:
        try:
            assert store.stdout is not None
            address = store.stdout.readline().split()[1]
            stat = next(method for _, method in METHODS if method.name == "Stat")
            token = [(TOKEN_KEY, (folder / "cluster.token").read_text().strip())]
            with secure(address, folder / "ca.crt", folder / "cluster") as channel:
                assert attempt(channel, stat, token) == grpc.StatusCode.OK
                assert attempt(channel, stat) == REFUSED
        finally:
            store.terminate()
