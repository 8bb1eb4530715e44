"""The key file: written by `penstock keys`, read by servers, replaced while it is in use."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.auth.authenticators import FileKeys, open_authenticator
from cluster.auth.key_file import add_key, revoke_key
from cluster.auth.keys import MAX_FILE_BYTES, KeyFile, KeyLimits, new_key, parse_keys, read_keys
from cluster.cli import main
from penstock.errors import AuthenticationError, UsageError

TENANTS = st.from_regex(r"\A[a-z0-9](?:[a-z0-9._-]{0,61}[a-z0-9])?\Z")
LIMITS = st.builds(
    KeyLimits,
    requests_per_minute=st.none() | st.integers(1, 10**9),
    tokens_per_day=st.none() | st.integers(1, 10**15),
)


def make(path: Path, **fields: object) -> tuple[str, str]:
    """Key and id."""
    fresh = add_key(path, lambda taken: new_key(taken=taken, **{"tenant": "acme", **fields}))  # type: ignore[arg-type]
    return fresh.text, fresh.record.id


def bearer(key: str) -> str:
    return f"Bearer {key}"


@settings(deadline=None, max_examples=60)
@given(
    tenant=TENANTS,
    name=st.text(max_size=128),
    limits=LIMITS,
    suffix=st.sampled_from([".json", ".yaml"]),
)
def test_what_is_written_is_what_is_read(
    tenant: str, name: str, limits: KeyLimits, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("keys") / f"keys{suffix}"
    ends = datetime.now(UTC).replace(microsecond=0) + timedelta(days=1)
    fresh = add_key(
        path,
        lambda taken: new_key(tenant=tenant, name=name, limits=limits, expires=ends, taken=taken),
    )
    assert read_keys(path).keys == (fresh.record,)
    assert fresh.text not in path.read_text()
    keys = FileKeys(path, reload_s=60)
    caller = keys.authenticate(bearer(fresh.text))
    keys.close()
    assert (caller.tenant, caller.key_id) == (tenant, fresh.record.id)


@given(st.binary(max_size=200))
def test_garbage_is_refused_in_one_sentence(raw: bytes) -> None:
    try:
        parse_keys(raw, "FILE")
    except UsageError as error:
        assert error.message.startswith("FILE")
        assert "\n" not in error.message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"keys": [{"id": "x"}]}, "keys[0].id"),
        ({"keys": 3}, "keys"),
        ({"version": 2, "keys": []}, "version"),
        ({"keys": [], "extra": 1}, "extra"),
        ([], "'keys:'"),
    ],
)
def test_a_wrong_file_names_the_place(content: object, words: str) -> None:
    with pytest.raises(UsageError, match="FILE") as caught:
        parse_keys(json.dumps(content).encode(), "FILE")
    assert words in caught.value.message


def test_faults_show_no_hash() -> None:
    secret = "ab" * 33
    with pytest.raises(UsageError) as caught:
        parse_keys(json.dumps({"keys": [{"id": "0" * 12, "sha256": secret}]}).encode(), "FILE")
    assert secret not in caught.value.message


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "keys.yaml"
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)
    with pytest.raises(UsageError, match="at most"):
        read_keys(path)


def test_two_keys_of_one_id_are_refused() -> None:
    record = new_key(tenant="a").record
    with pytest.raises(ValueError, match="two keys"):
        KeyFile(keys=(record, record))


def test_an_expired_a_revoked_and_a_foreign_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    now = [datetime.now(UTC)]
    short, _ = make(path, expires=now[0] + timedelta(hours=1))
    gone, gone_id = make(path)
    keys = FileKeys(path, reload_s=60, now=lambda: now[0])
    assert keys.authenticate(bearer(short)).tenant == "acme"
    now[0] += timedelta(hours=1)
    with pytest.raises(AuthenticationError, match="expired") as caught:
        keys.authenticate(bearer(short))
    assert caught.value.code == "expired_api_key"
    revoke_key(path, gone_id)
    assert keys.reload()
    with pytest.raises(AuthenticationError, match="revoked") as caught:
        keys.authenticate(bearer(gone))
    assert caught.value.code == "revoked_api_key"
    # With the right id and a wrong secret nobody learns that the key ever was.
    stranger = gone[:-1] + ("A" if gone[-1] != "A" else "B")
    for wrong in (stranger, "x", "pen-" + "0" * 12 + "-" + "A" * 43, "a" * 10_000):
        with pytest.raises(AuthenticationError, match="not valid") as caught:
            keys.authenticate(bearer(wrong))
        assert caught.value.code == "invalid_api_key"
    keys.close()


def test_a_change_holds_within_two_seconds_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, key_id = make(path)
    keys = FileKeys(path, reload_s=0.05)
    assert keys.authenticate(bearer(key)).key_id == key_id
    revoke_key(path, key_id)
    deadline = time.monotonic() + 2
    with pytest.raises(AuthenticationError):
        while time.monotonic() < deadline:
            keys.authenticate(bearer(key))
            time.sleep(0.01)
    keys.close()


def test_a_mounted_secret_changes_by_its_links(tmp_path: Path) -> None:
    """Kubernetes swaps the link `..data` to another folder; the file's own link stays."""
    first, second = tmp_path / "..1", tmp_path / "..2"
    for folder in (first, second):
        folder.mkdir()
    old, _ = make(first / "keys.yaml")
    new, _ = make(second / "keys.yaml", tenant="other")
    (tmp_path / "..data").symlink_to(first)
    (tmp_path / "keys.yaml").symlink_to(Path("..data") / "keys.yaml")
    keys = FileKeys(tmp_path / "keys.yaml", reload_s=60)
    assert keys.authenticate(bearer(old)).tenant == "acme"
    (tmp_path / "..new").symlink_to(second)
    (tmp_path / "..new").replace(tmp_path / "..data")
    assert keys.reload()
    assert keys.authenticate(bearer(new)).tenant == "other"
    with pytest.raises(AuthenticationError):
        keys.authenticate(bearer(old))
    keys.close()


def test_a_file_gone_wrong_changes_nothing_and_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "keys.yaml"
    key, _ = make(path)
    keys = FileKeys(path, reload_s=60)
    with caplog.at_level(logging.ERROR):
        path.write_text("keys: [broken")
        assert not keys.reload()
        assert keys.authenticate(bearer(key)).tenant == "acme"
        path.unlink()
        assert not keys.reload()
        assert not keys.reload(), "said once, not every second"
    assert keys.authenticate(bearer(key)).tenant == "acme"
    assert len(caplog.records) == 2
    assert "stay in use" in caplog.text
    assert key not in caplog.text
    path.write_text("keys: []")
    assert keys.reload()
    with pytest.raises(AuthenticationError):
        keys.authenticate(bearer(key))
    keys.close()


def test_twenty_writers_at_once_lose_no_key(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: make(path), range(20)))
    assert {key.id for key in read_keys(path).keys} == {key_id for _, key_id in made}
    assert path.stat().st_mode & 0o777 == 0o600


def test_command_line_keys_and_file_keys_together(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    key, _ = make(path)
    both = open_authenticator(api_keys=("simple",), keys_file=str(path))
    assert both.authenticate(bearer(key)).tenant == "acme"
    assert len(both.authenticate(bearer("simple")).tenant) == 64
    both.close()


def test_keys_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tmp_path / "keys.yaml")
    made = ["keys", "new", "--file", file, "--tenant", "acme", "--scope", "generate"]
    assert main([*made, "--name", "ci", "--expires", "90d", "--tokens-per-day", "5"]) == 0
    shown = capsys.readouterr()
    key = shown.out.strip()
    assert "--api-keys-file" in shown.err
    assert main(["keys", "list", "--file", file, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["tenant"] == "acme" and row["state"] == "active" and row["scopes"] == ["generate"]
    assert row["limits"] == {"tokens_per_day": 5}
    assert "sha256" not in row
    assert main(["keys", "revoke", key, "--file", file]) == 0
    capsys.readouterr()
    assert main(["keys", "list", "--file", file]) == 0
    assert "revoked" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "word"),
    [
        (["new", "--tenant", "A B"], "tenant"),
        (["new", "--tenant", "a", "--expires", "soon"], "90d"),
        (["new", "--tenant", "a", "--expires", "2001-01-01"], "past"),
        (["new", "--tenant", "a", "--expires", "9999999d"], "--expires"),
        (["new", "--tenant", "a", "--scope", "root"], "scopes"),
        (["new", "--tenant", "a", "--tokens-per-day", "0"], "tokens_per_day"),
        (["list"], "penstock keys new"),
        (["revoke", "nobody"], "penstock keys new"),
    ],
)
def test_keys_command_refuses(
    args: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["keys", *args, "--file", str(tmp_path / "keys.yaml")]) == 2
    shown = capsys.readouterr()
    assert word in shown.err and shown.err.count("\n") == 1


def test_serve_names_a_key_file_that_is_not_there() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "serve", "fake", "--api-keys-file", "none.yaml"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "none.yaml" in done.stderr and "penstock keys new" in done.stderr
