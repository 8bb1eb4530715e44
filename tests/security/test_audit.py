"""The audit of pins against a service of our own: what it fails on, and what it lets pass."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.security.audit import audit

pytest.importorskip("pip_audit", reason="the dev extra is not installed")
FIXED = "2.10.1"


class Osv(BaseHTTPRequestHandler):
    """OSV's `POST /v1/query`, which knows one vulnerability."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        package = asked["package"]["name"].lower()
        known = package == "jinja2" and asked["version"] == "2.10"
        ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": FIXED}]}]
        affected = {"package": {"name": "jinja2", "ecosystem": "PyPI"}, "ranges": ranges}
        vuln = {"id": "PYSEC-2019-217", "summary": "sandbox escape", "affected": [affected]}
        content = json.dumps({"vulns": [vuln]} if known else {}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: object) -> None:
        return


@contextlib.contextmanager
def service() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Osv)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1/query"
    finally:
        server.shutdown()
        server.server_close()


def pins(folder: Path, *lines: str) -> Path:
    path = folder / "pins.txt"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_vulnerable_pin_fails_and_says_what_to_pin(tmp_path: Path) -> None:
    with service() as url:
        code, text = audit(pins(tmp_path, "jinja2==2.10", "numpy==2.3.5"), service=url)
    print(text)
    assert code == 1 and "jinja2 2.10 has PYSEC-2019-217" in text and f"pin {FIXED}" in text


def test_clean_pins_pass(tmp_path: Path) -> None:
    with service() as url:
        code, text = audit(pins(tmp_path, f"jinja2=={FIXED}", "numpy==2.3.5"), service=url)
    print(text)
    assert code == 0 and "2 of 2" in text


def test_a_service_that_cannot_be_reached_is_one_line_and_no_failure(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/v1/query"
    code, text = audit(pins(tmp_path, "numpy==2.3.5"), service=url)
    print(text)
    assert code == 0 and "not done" in text and "\n" not in text


def test_a_service_that_hangs_ends_at_the_deadline(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1/query"
        began = time.monotonic()
        code, text = audit(pins(tmp_path, "numpy==2.3.5"), service=url, deadline_s=4.0)
    print(text)
    assert code == 0 and "not done" in text and time.monotonic() - began < 10


def test_pins_that_are_none_are_an_error(tmp_path: Path) -> None:
    code, text = audit(pins(tmp_path, "numpy>=2"), service="http://127.0.0.1:9/")
    print(text)
    assert code == 2
