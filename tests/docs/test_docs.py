"""The documentation builds strictly and offline; what it names and says to type exists."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.config import ClusterConfig
from cluster.reference import http_api, settings, wire
from cluster.reference.commands import commands
from cluster.reference.commands import page as cli_page
from penstock.errors import error_codes
from penstock.telemetry.catalog import CATALOG
from penstock.telemetry.metric import PREFIX
from tests.cluster.api.api_harness import make_api

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    path
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "helm/penstock/README.md")
    if path.name != "CHANGELOG.md"
)
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_ROOMS = (
    "docs|tests|penstock|cluster|prefill|decode|model|kvstore|kernels|bench|training|examples|"
    "protos|helm"
)
_FILES = re.compile(rf"`((?:{_ROOMS})/[\w./-]+\.(?:py|md|yaml|proto|c))`")
_CURL = re.compile(r"curl \S* ?http://127.0.0.1:8000(/v1/\S+).*?-d '(.*?)'", re.DOTALL)


def read(path: Path) -> str:
    return path.read_text()


def lines_to_type() -> Iterator[tuple[str, str]]:
    """Lines of shell in fenced blocks, continued ones joined, with their page."""
    for path in PAGES:
        for language, body in _FENCE.findall(read(path)):
            if language in ("", "sh", "bash", "shell", "console"):
                for line in body.replace("\\\n", " ").splitlines():
                    yield path.name, line.strip().removeprefix("$ ")


def words(line: str) -> list[str]:
    """The words of a command; a comment behind it, variables before it and pipes are dropped."""
    try:
        parts = shlex.split(line, comments=True)
    except ValueError:
        return []
    while parts and re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", parts[0]):
        parts = parts[1:]
    for stop in ("|", "&&", ";", ">", "&"):
        if stop in parts:
            parts = parts[: parts.index(stop)]
    return parts


def test_it_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("mkdocs is missing: pip install 'penstock[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = list(tmp_path.rglob("*.html"))
    names = {str(page.relative_to(tmp_path)) for page in pages}
    assert {"index.html", "reference/http.html", "reference/cli.html", "operations.html"} <= names
    loads = re.compile(r"""<(?:script|link|img)[^>]+(?:src|href)=["'](https?:)?//""")
    for page in pages:
        assert not loads.search(page.read_text()), f"{page.name} loads something from elsewhere"
    print(f"{len(pages)} pages")


def test_pages_and_files_that_are_named_exist() -> None:
    missing = []
    for path in PAGES:
        text = _FENCE.sub("", read(path))
        named = _FILES.findall(text)
        missing += [f"{path.name}: {name}" for name in named if not (ROOT / name).exists()]
    assert not missing, "\n".join(missing)


def test_commands_of_penstock_exist_with_their_options() -> None:
    known: dict[str, Any] = dict(commands())
    checked, wrong = 0, []
    for page, line in lines_to_type():
        parts = words(line)
        if not parts or parts[0] not in ("penstock", ".venv/bin/penstock"):
            continue
        path = "penstock"
        parts = parts[1:]
        while parts and f"{path} {parts[0]}" in known:
            path, parts = f"{path} {parts[0]}", parts[1:]
        command = known[path]
        if getattr(command, "commands", None) and parts and not parts[0].startswith("-"):
            # `bench engine|store`: a choice of several, in a line that is no command.
            wrong += [f"{page}: {line}"] if "|" not in parts[0] else []
            continue
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        options |= {"--help", "-h", "--debug", "--version"}
        asked = [part.split("=")[0] for part in parts if re.match(r"--?[a-z]", part)]
        wrong += [f"{page}: {path} has no {option}" for option in asked if option not in options]
        checked += 1
    print(f"{checked} commands")
    assert checked > 30
    assert not wrong, "\n".join(wrong)


def test_targets_and_modules_that_one_is_told_to_run_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", read(ROOT / "Makefile"), re.MULTILINE))
    wrong = []
    for page, line in lines_to_type():
        parts = words(line)
        if parts[:1] == ["make"]:
            wrong += [f"{page}: make {t}" for t in parts[1:2] if t not in targets and t[0] != "-"]
        for module in re.findall(r"python3? -m ([\w.]+)", line):
            if importlib.util.find_spec(module) is None:
                wrong.append(f"{page}: python -m {module}")
    assert not wrong, "\n".join(wrong)


def test_variables_and_metrics_that_are_named_exist() -> None:
    variables = {
        f"PENSTOCK_{section.upper()}__{name.upper()}"
        for section, field in ClusterConfig.model_fields.items()
        for name in field.annotation.model_fields  # type: ignore[union-attr]
    }
    shown = {PREFIX + name for metric in CATALOG for name in (metric.name, *metric.also)}
    shown |= {f"{name}{end}" for name in shown for end in ("_bucket", "_sum", "_count")}
    wrong = []
    for path in PAGES:
        text = read(path)
        asked = set(re.findall(r"PENSTOCK_[A-Z]+__[A-Z_]+\b", text))
        unknown = {name for name in asked - variables if "_KERNELS__" not in name}
        unknown |= set(re.findall(r"`(penstock_[a-z_0-9]+)(?:\{[^}]*\})?`", text)) - shown
        wrong += [f"{path.name}: {name}" for name in sorted(unknown)]
    assert not wrong, "\n".join(wrong)


async def test_requests_that_are_shown_are_accepted() -> None:
    asked = 0
    for path in PAGES:
        for _, body in _FENCE.findall(read(path)):
            for url, content in _CURL.findall(body):
                request = json.loads(content) | {"model": "fake", "max_tokens": 4}
                async with make_api().client() as client:
                    answer = await client.post(url, json=request)
                assert answer.status_code == 200, f"{path.name}: {answer.text}"
                asked += 1
    assert asked >= 2


def test_the_reference_has_every_command_setting_field_and_code() -> None:
    cli, config, api = cli_page(), settings.page(), http_api.page()
    for path, command in commands():
        if not getattr(command, "commands", None):
            assert f"## `{path}`" in cli
            for parameter in command.params:
                if parameter.param_type_name == "option":
                    assert f"`{parameter.opts[0]}`" in cli
    for section, field in ClusterConfig.model_fields.items():
        for name in field.annotation.model_fields:  # type: ignore[union-attr]
            assert f"PENSTOCK_{section.upper()}__{name.upper()}`" in config
    for path in http_api.openapi()["paths"]:
        assert f"{path}`" in api
    assert not [code for code in error_codes() if f"| `{code}` |" not in api]
    for package in ("kv.v1", "worker.v1", "telemetry.v1"):
        assert f"## penstock.{package}" in wire.page()
