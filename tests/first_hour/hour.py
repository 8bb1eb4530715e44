"""A newcomer's first hour: install, serve, ask, then break things on purpose.

    python tests/first_hour/hour.py                  # with the penstock beside this python
    python tests/first_hour/hour.py --install DIR    # first install this checkout into DIR
    python tests/first_hour/hour.py --launcher ray   # as `penstock serve` unless told otherwise

Every command is one that a person would type, run as a process of its own. What must hold: the good
ones work, and each broken one ends with one sentence that names the cause and the next step, never
a traceback. Exit code 0 only then. `test_first_hour.py` runs the parts with what is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
CONTEXT = 8192
SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


@dataclass
class Said:
    """What a command answered."""

    code: int
    out: str
    err: str

    def names(self, *words: str, code: int) -> None:
        """One sentence with all the words, and the exit code; nothing that only we could read."""
        text = self.err.strip()
        assert self.code == code, f"exit code {self.code}, not {code}: {text or self.out}"
        assert "Traceback" not in self.err + self.out, self.err
        assert text.startswith("penstock: ") and "\n" not in text, f"not one sentence: {text!r}"
        missing = [word for word in words if word not in text]
        assert not missing, f"{missing} not in: {text}"


@dataclass
class Hour:
    """The newcomer's desk: a folder, a shell and a `penstock`."""

    folder: Path
    penstock: str
    launcher: str = "local"
    told: list[str] = field(default_factory=list)

    def run(self, *words: str, timeout_s: float = 180.0, **env: str) -> Said:
        """`penstock WORDS`, as typed."""
        self.say(f"$ penstock {' '.join(words)}")
        done = subprocess.run(
            [self.penstock, *words],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, **env},
            check=False,
        )
        said = Said(done.returncode, done.stdout, done.stderr)
        for line in (said.out + said.err).strip().splitlines()[:8]:
            self.say(f"  {line}")
        return said

    def say(self, line: str) -> None:
        self.told.append(line)
        print(line, flush=True)

    def document(self, name: str, facts: int) -> tuple[Path, dict[str, str]]:
        """A text with so many facts in the form that `ledger` knows."""
        draw = random.Random(facts)
        codes: dict[str, str] = {}
        while len(codes) < facts:
            name_ = "".join(draw.choices(SYLLABLES, k=4))
            codes[name_] = f"{draw.randrange(10_000):04d}"
        path = self.folder / name
        path.write_text(" ".join(f"the code of {n} is {c}." for n, c in codes.items()) + "\n")
        return path, codes

    @contextlib.contextmanager
    def serving(self, *words: str) -> Iterator[str]:
        """`penstock serve WORDS` in another terminal, ended by Ctrl-C; the URL that it says."""
        port = free_port()
        line = ["serve", *words, "--port", str(port), "--launcher", self.launcher]
        self.say(f"$ penstock {' '.join(line)} &")
        with (self.folder / "serve.err").open("w") as errors:
            process = subprocess.Popen(
                [self.penstock, *line],
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        try:
            assert process.stdout is not None
            began = time.monotonic()
            ready = process.stdout.readline().strip()
            assert ready.startswith("ready "), (self.folder / "serve.err").read_text()
            self.say(f"  {ready}   ({time.monotonic() - began:.0f} s)")
            yield ready.split()[1]
        finally:
            process.send_signal(signal.SIGINT)
            code = process.wait(60)
        assert code == 0, f"Ctrl-C ended serve with {code}"
        assert "Traceback" not in (self.folder / "serve.err").read_text()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def install(folder: Path) -> str:
    """A fresh environment with this checkout in it, as README says; its `penstock`."""
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    constraints = ROOT / "constraints.txt"
    lines = constraints.read_text().splitlines()
    torch = next(line for line in lines if line.startswith("torch=="))
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    subprocess.run([*pip, torch], check=True)
    subprocess.run([*pip, "-c", str(constraints), str(ROOT)], check=True)
    return str(folder / "bin" / "penstock")


def cluster(hour: Hour, redis: Any) -> contextlib.AbstractContextManager[str]:
    """The one that most parts of the hour ask."""
    return hour.serving("ledger", "--max-model-len", str(CONTEXT), "--redis-url", redis.url)


def look_around(hour: Hour) -> None:
    """Before anything is started."""
    said = hour.run("--version")
    assert said.code == 0 and said.out.startswith("penstock ")
    said = hour.run("--help")
    assert said.code == 0 and all(word in said.out for word in ("serve", "ask", "doctor", "batch"))
    said = hour.run("doctor", "--launcher", hour.launcher, "--port", str(free_port()))
    assert said.code == 0, said.out
    assert "ok   model 'ledger'" in said.out


def ask(hour: Hour, url: str) -> None:
    """The document is read once; the second question finds it in the cache; so does curl."""
    document, codes = hour.document("letters.txt", 60)
    names = list(codes)
    asking = ("ask", "--document", document.name, "--url", url, "--evidence", "--json")
    cached = []
    for name in names[3:5]:
        said = hour.run(*asking, "--question", f"what is the code of {name}?")
        assert said.code == 0, said.err
        (answer,) = json.loads(said.out)
        assert answer["answer"].strip() == codes[name], (name, answer["answer"], codes[name])
        spans = answer["evidence"]
        assert any(codes[name] in str(span.get("text", "")) for span in spans), spans
        cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == 0 < cached[1], cached
    text = document.read_text() + f"\n\nQuestion: what is the code of {names[7]}?"
    body = {"model": "ledger", "temperature": 0, "messages": [{"role": "user", "content": text}]}
    answer = post(f"{url}/v1/chat/completions", body)
    assert answer["choices"][0]["message"]["content"].strip() == codes[names[7]], answer
    hour.say(f"  curl: {answer['choices'][0]['message']['content'].strip()}")


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
    except urllib.error.HTTPError as error:
        found = json.load(error)
    return found


def wrong_flag(hour: Hour) -> None:
    hour.run("serve", "ledger", "--prot", "8001").names("--prot", "--port", "--help", code=2)
    hour.run("sevre", "ledger").names("sevre", "serve", "--help", code=2)
    said = hour.run("serve", "ledger", "--port", "80000")
    said.names("front.port", "65535", "80000", code=2)
    said = hour.run("serve", "ledger", PENSTOCK_FRONT__PROT="1")
    said.names("PENSTOCK_FRONT__PROT", "did you mean 'port'", code=2)


def wrong_path(hour: Hour) -> None:
    said = hour.run("serve", "./no/such/model", "--launcher", hour.launcher)
    said.names("./no/such/model", "config.json", "hf download", code=1)
    said = hour.run("ask", "--document", "lettres.txt", "--question", "what?")
    said.names("lettres.txt", "No such file", "--document", code=2)
    said = hour.run("serve", "ledger", "--config", "penstock.yml")
    said.names("penstock.yml", "No such file", "--config", code=2)
    said = hour.run("serve", "ledger", "--api-keys-file", "keys.yaml")
    said.names("keys.yaml", code=2)
    hour.document("letters.txt", 60)
    said = hour.run("ask", "--document", "letters.txt", "--question", "what?",
                    "--url", f"http://127.0.0.1:{free_port()}")  # fmt: skip
    said.names("no server answers", "penstock serve", code=1)


def too_long(hour: Hour, url: str) -> None:
    """A document longer than the model's context; and the next one, shorter, is answered."""
    document, _ = hour.document("archive.txt", CONTEXT // 6)
    said = hour.run("ask", "--document", document.name, "--question", "what?", "--url", url)
    said.names("tokens", str(CONTEXT), "shorten it by", code=1)
    body = {"model": "ledger", "prompt": "x", "max_tokens": CONTEXT * 2}
    error = post(f"{url}/v1/completions", body)["error"]
    hour.say(f"  curl: {error['message']}")
    assert error["code"] == "context_length_exceeded" and "lower max_tokens to" in error["message"]


def busy_port(hour: Hour, url: str) -> None:
    port = url.rpartition(":")[2]
    said = hour.run("serve", "ledger", "--port", port, "--launcher", hour.launcher)
    said.names(port, "in use", "--port", code=1)
    said = hour.run("doctor", "--port", port, "--launcher", hour.launcher)
    assert said.code == 1 and f":{port}" in said.out and "holds it; stop" in said.out, said.out


def killed_redis(hour: Hour, url: str, redis: Any) -> None:
    """The index dies under a running cluster: answers go on; the doctor and a new start name it."""
    document, codes = hour.document("ledger.txt", 40)
    (first, second, *_) = codes
    asking = ("ask", "--document", document.name, "--url", url, "--json", "--question")
    said = hour.run(*asking, f"what is the code of {first}?")
    assert json.loads(said.out)[0]["answer"].strip() == codes[first], said
    hour.say("$ kill -9 redis-server")
    redis.kill()
    for name in (second, first):
        said = hour.run(*asking, f"what is the code of {name}?")
        assert said.code == 0 and json.loads(said.out)[0]["answer"].strip() == codes[name]
    place = redis.url.partition("//")[2].partition("/")[0]
    said = hour.run("doctor", "--redis-url", redis.url, "--port", "0", "--launcher", hour.launcher)
    assert said.code == 1 and "FAIL Redis does not answer" in said.out, said.out
    assert place in said.out and "start it or leave out --redis-url" in said.out, said.out
    said = hour.run("serve", "ledger", "--redis-url", redis.url, "--port", str(free_port()),
                    "--launcher", hour.launcher)  # fmt: skip
    said.names("Redis", place, "start Redis there", "leave it out", code=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--install", type=Path, metavar="DIR", help="a fresh environment there")
    parser.add_argument("--launcher", choices=("local", "ray"), default="local")
    options = parser.parse_args()
    # Its own helper starts a real redis-server.
    sys.path.insert(0, str(ROOT))
    from tests.kvstore.redis_server import running_redis

    began = time.monotonic()
    penstock = str(Path(sys.executable).with_name("penstock"))
    if options.install is not None:
        penstock = install(options.install)
        print(f"installed in {time.monotonic() - began:.0f} s")
    with tempfile.TemporaryDirectory() as folder:
        hour = Hour(Path(folder), penstock, options.launcher)
        look_around(hour)
        wrong_flag(hour)
        wrong_path(hour)
        with running_redis() as redis, cluster(hour, redis) as url:
            ask(hour, url)
            too_long(hour, url)
            busy_port(hour, url)
            killed_redis(hour, url, redis)
    print(f"the first hour took {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
