"""MkDocs' hook: adds the pages that are made from code, and what no part of the menu names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from cluster.reference import commands, http_api, settings, wire

ROOT = Path(__file__).parents[3]
_COPIED = {
    "reference/helm.md": ROOT / "helm" / "penstock" / "README.md",
    "reference/changelog.md": ROOT / "CHANGELOG.md",
}


def generated() -> dict[str, str]:
    """Pages by their place under `docs`."""
    pages = {
        "reference/http.md": http_api.page(),
        "reference/grpc.md": wire.page(),
        "reference/cli.md": commands.page(),
        "reference/settings.md": settings.page(),
    }
    return pages | {name: path.read_text() for name, path in _COPIED.items() if path.is_file()}


def on_files(files: Files, config: Any) -> Files:
    for name, text in generated().items():
        files.append(File.generated(config, name, content=text))
    named = set(_named(config["nav"] or []))
    rest = [
        f.src_uri
        for f in files.documentation_pages()
        if f.src_uri not in named and not f.src_uri.startswith("adr/")
    ]
    decisions = sorted(f.src_uri for f in files.documentation_pages() if f.src_uri[:4] == "adr/")
    nav = [*config["nav"], {"Decisions": decisions}]
    config["nav"] = [*nav, {"More": sorted(rest)}] if rest else nav
    return files


def _named(nav: list[Any]) -> list[str]:
    names: list[str] = []
    for item in nav:
        if isinstance(item, str):
            names.append(item)
        else:
            for value in item.values():
                names += _named(value) if isinstance(value, list) else [value]
    return names
