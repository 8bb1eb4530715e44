"""`penstock fetch`: only the model that was asked for ever stands at its place."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from cluster.fetch import fetch, folder_digest
from penstock.errors import ModelLoadError, UsageError

FILES = {"config.json": b"{}", "encoding/a.txt": b"text", "model.safetensors": b"w" * 100_000}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / ".git").mkdir()
    (folder / ".git/HEAD").write_text("not part of it")
    return folder


def manifest_digest(*names: str) -> str:
    """What `sha256sum NAMES | sha256sum` says, by hashlib alone."""
    lines = "".join(f"{hashlib.sha256(FILES[n]).hexdigest()}  {n}\n" for n in sorted(names))
    return "sha256:" + hashlib.sha256(lines.encode()).hexdigest()


WHOLE = manifest_digest(*FILES)
SMALL = manifest_digest("config.json", "encoding/a.txt")


def bring(place: Path, source: Path | str | None, digest: str | None = WHOLE, **more: bool) -> str:
    url = f"file://{source}" if isinstance(source, Path) else source
    return fetch(place, source=url, revision=None, digest=digest, weights=more.get("weights", True))


def test_the_digest_is_that_of_sha256sum(model: Path) -> None:
    assert folder_digest(model, weights=True) == WHOLE
    assert folder_digest(model, weights=False) == SMALL


def test_a_folder_arrives_whole_and_a_second_fetch_reads_nothing(
    model: Path, tmp_path: Path
) -> None:
    place = tmp_path / "models/m"
    assert bring(place, model) == WHOLE
    assert {p.name for p in place.iterdir()} == {
        "config.json",
        "encoding",
        "model.safetensors",
        ".penstock-checked",
    }
    read: list[str] = []
    fetch(
        place,
        source="file:///gone",
        revision=None,
        digest=WHOLE,
        weights=True,
        progress=lambda name, _: read.append(name),
    )
    assert read == []


def test_without_weights_comes_what_a_front_reads(model: Path, tmp_path: Path) -> None:
    assert bring(tmp_path / "m", model, SMALL, weights=False) == SMALL
    assert not (tmp_path / "m/model.safetensors").exists()


def test_another_model_is_refused_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(b"w" * 99_999 + b"x")
    with pytest.raises(ModelLoadError, match=r"not the one asked for.*" + WHOLE):
        bring(tmp_path / "models/m", model)
    assert [p.name for p in (tmp_path / "models").iterdir()] == [".m.lock"]


def test_a_file_that_changed_at_its_place_is_noticed(model: Path, tmp_path: Path) -> None:
    place = tmp_path / "m"
    bring(place, model)
    (place / "config.json").write_bytes(b"[]")
    with pytest.raises(ModelLoadError, match="not the one asked for"):
        bring(place, None)


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("file:///nowhere/at/all", ModelLoadError, "nothing at|cannot fetch"),
        ("nosuch://bucket/model", UsageError, "nosuch"),
        (None, ModelLoadError, "no model at"),
    ],
)
def test_bad_sources_are_one_sentence(
    source: str | None, error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        bring(tmp_path / "m", source)
    assert not (tmp_path / "m").exists()


def test_many_at_once_fetch_once(model: Path, tmp_path: Path) -> None:
    place = tmp_path / "m"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: bring(place, model), range(8)))
    assert set(found) == {WHOLE}
    assert [p.name for p in tmp_path.glob(".m.*")] == [".m.lock"]


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as one model needs."""

    commit = "c" * 40
    seen: list[str] = []  # noqa: RUF012

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        path = self.path.split("?")[0]
        self.seen.append(path)
        name = path.partition(f"/resolve/{self.commit}/")[2]
        if path.startswith("/api/models/org/name/tree"):
            listed = [
                {"type": "file", "path": each, "size": len(FILES[each]), "oid": "0" * 40}
                for each in FILES
            ]
            content = json.dumps(listed).encode()
        elif path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": each} for each in FILES]
            content = json.dumps(
                {"id": "org/name", "sha": self.commit, "siblings": siblings}
            ).encode()
        elif name in FILES:
            content = FILES[name]
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", self.commit)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_the_command_fetches_from_a_hub(hub: str, tmp_path: Path) -> None:
    place = tmp_path / "m"
    command = [
        *(sys.executable, "-m", "cluster.cli", "fetch", "--from=hub:org/name"),
        *(f"--revision={Hub.commit}", f"--digest={WHOLE}", str(place)),
    ]
    env = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["digest", WHOLE, "config", "digest", SMALL]
    assert (place / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    wrong = [*command[:-2], f"--digest={SMALL}", str(tmp_path / "other")]
    done = subprocess.run(wrong, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "not the one asked for" in done.stderr
    assert not (tmp_path / "other").exists()
