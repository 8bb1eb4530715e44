"""`penstock certs`: what it makes is what other people's tools accept, and nothing more."""

from __future__ import annotations

import json
import shutil
import ssl
import stat
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli import main
from cluster.tls.authority import about, new_authority, new_front, new_member
from cluster.tls.files import known, make, warning
from penstock.errors import UsageError
from penstock.peers import PEER_NAME, Peers

HOSTS = ("api.example.org", "10.0.0.7")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "certs"
    make(place, HOSTS, days=365, authority_days=3650)
    return place


def verified(folder: Path, name: str, purpose: str) -> bool:
    command = [shutil.which("openssl") or "openssl", "verify", "-x509_strict", "-purpose", purpose]
    command += ["-CAfile", str(folder / "ca.crt"), str(folder / f"{name}.crt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    print(done.stdout, done.stderr)
    return done.returncode == 0


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl command here")
def test_openssl_accepts_members_for_both_ends_and_fronts_for_a_server_alone(folder: Path) -> None:
    assert verified(folder, "cluster", "sslserver") and verified(folder, "cluster", "sslclient")
    assert verified(folder, "front", "sslserver") and not verified(folder, "front", "sslclient")


def test_keys_and_token_are_for_their_owner_alone(folder: Path) -> None:
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in folder.iterdir()}
    print(modes)
    secret = {name for name in modes if name.endswith((".key", ".token"))}
    assert secret == {"ca.key", "cluster.key", "front.key", "cluster.token"}
    assert {modes[name] for name in secret} == {0o600}


def test_a_second_authority_never_replaces_the_first(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert main(["certs", "new", "--dir", str(folder)]) == 2
    said = capsys.readouterr().err
    assert "already holds an authority" in said and "penstock certs renew" in said
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_renewing_keeps_authority_token_and_hosts(folder: Path) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert main(["certs", "renew", "--dir", str(folder), "--days", "10"]) == 0
    after = {file.name: file.read_bytes() for file in folder.iterdir()}
    same = {name for name in before if before[name] == after[name]}
    assert same == {"ca.crt", "ca.key", "cluster.token"}
    assert about(after["front.crt"]).hosts == HOSTS
    Peers(
        ca=str(folder / "ca.crt"), cert=str(folder / "cluster.crt"), key=str(folder / "cluster.key")
    ).check()


def test_show_tells_what_has_ended(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["certs", "show", "--dir", str(folder), "--json"]) == 0
    rows = {Path(row["file"]).stem: row for row in json.loads(capsys.readouterr().out)}
    assert rows["front"]["hosts"] == list(HOSTS) and rows["ca"]["authority"]
    assert rows["cluster"]["hosts"] == [PEER_NAME]
    now = datetime.now(UTC)
    front = folder / "front.crt"
    assert warning(front, now) == ""
    assert "expires in 4 days" in warning(front, now + timedelta(days=360))
    assert "has expired" in warning(front, now + timedelta(days=366))
    assert [each.days_left(now) > 0 for each in known(folder)] == [True] * 3


@pytest.mark.parametrize("host", ["", "a b", "https://a", "A.example", "a/b", PEER_NAME, "x" * 300])
def test_what_is_no_host_is_refused_with_its_name(host: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--host"):
        make(tmp_path / "c", (host,), days=1, authority_days=1)
    assert not (tmp_path / "c").exists()


LABEL = st.from_regex(r"\A[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?\Z")
NAME = st.lists(LABEL, min_size=1, max_size=4).map(".".join)
AUTHORITY = new_authority(30)


@settings(deadline=None, max_examples=40)
@given(hosts=st.lists(NAME | st.ip_addresses().map(str), min_size=1, max_size=5, unique=True))
def test_a_front_names_exactly_its_hosts(hosts: list[str]) -> None:
    pair = new_front(AUTHORITY, tuple(hosts), 7)
    assert sorted(about(pair.cert).hosts) == sorted(hosts)
    cert = x509.load_pem_x509_certificate(pair.cert)
    cert.verify_directly_issued_by(x509.load_pem_x509_certificate(AUTHORITY.cert))
    key = serialization.load_pem_private_key(pair.key, None)
    assert key.public_key() == cert.public_key()


def test_an_authority_signs_with_its_own_key_only() -> None:
    other = new_authority(30)
    with pytest.raises(UsageError, match="do not belong together"):
        new_member(type(other)(AUTHORITY.cert, other.key), 7)


def test_files_that_do_not_belong_together_are_named_before_anything_starts(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["serve", "fake", "--launcher", "local", "--tls-cert", str(folder / "front.crt")]
    assert main([*wrong, "--tls-key", str(folder / "cluster.key")]) == 2
    said = capsys.readouterr().err
    assert "--tls-cert" in said and "belong together" in said
    assert main([*wrong, "--tls-key", str(tmp_path / "none.key")]) == 2
    assert "cannot read" in capsys.readouterr().err
    encrypted = tmp_path / "locked.key"
    key = serialization.load_pem_private_key((folder / "front.key").read_bytes(), None)
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"word"),
        )
    )
    assert main([*wrong, "--tls-key", str(encrypted)]) == 2
    assert "unencrypted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"PENSTOCK_TLS__CA": "ca.crt"}, ["tls", "only ca is given"]),
        ({"PENSTOCK_TLS__CLUSTER_TOKEN": "hunter2"}, ["cluster_token", "16 to 512"]),
        ({"PENSTOCK_TLS__CLUSTER_TOKEN_FILE": "/nowhere/token"}, ["/nowhere/token", "cannot read"]),
        (
            {"PENSTOCK_TLS__CLUSTER_TOKEN": "t" * 20, "PENSTOCK_TLS__CLUSTER_TOKEN_FILE": "f"},
            ["not both"],
        ),
        ({"PENSTOCK_LAUNCHER__WORKER_HOST": "0.0.0.0"}, ["worker_host", "penstock certs new"]),
        ({"PENSTOCK_KVSTORE__LISTEN": "0.0.0.0:7000"}, ["kvstore.listen", "tls.ca"]),
        ({"PENSTOCK_KVSTORE__DATA_LISTEN": "0.0.0.0:7001"}, ["kvstore.data_listen", "tls.ca"]),
    ],
)
def test_wrong_settings_are_one_sentence_without_the_secret(
    env: dict[str, str],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main(["serve", "fake", "--launcher", "local"]) == 2
    said = capsys.readouterr().err
    print(said)
    assert all(word in said for word in words) and said.count("\n") == 1
    assert "hunter2" not in said and "t" * 20 not in said


def test_the_chain_is_one_that_pythons_ssl_trusts(folder: Path) -> None:
    context = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    assert [each["subject"] for each in context.get_ca_certs()]
