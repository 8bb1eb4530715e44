"""Installed packages: what is missing, too old, or in the way of ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from cluster.doctor.finding import Finding

_OURS = "penstock"
ROOMS = (
    "bench", "cluster", "decode", "kernels", "kvstore", "model", "penstock", "prefill", "protos",
    "training",
)  # fmt: skip


def packages() -> Iterator[Finding]:
    yield from requirements(_required())
    yield from clashes(packages_distributions())


def _required() -> Sequence[str]:
    try:
        return requires(_OURS) or ()
    except PackageNotFoundError:
        return ()


def requirements(wanted: Sequence[str]) -> Iterator[Finding]:
    """One finding for each requirement that is not met; one in all if they are."""
    if not wanted:
        yield Finding(
            "packages",
            "Penstock itself is not installed here, only its source is seen",
            "run `pip install -e .` in its folder",
        )
        return
    met = 0
    for text in wanted:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(
                "packages",
                f"package {requirement.name} is missing",
                f"run `pip install '{_plain(requirement)}'`",
            )
            continue
        if requirement.specifier.contains(found, prereleases=True):
            met += 1
        else:
            yield Finding(
                "packages",
                f"package {requirement.name} is {found}, but {requirement.specifier} is needed",
                f"run `pip install '{_plain(requirement)}'`",
            )
    yield Finding("packages", f"{met} required packages are there, in versions that fit")


def _plain(requirement: Requirement) -> str:
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def clashes(owners: Mapping[str, Sequence[str]]) -> Iterator[Finding]:
    """Our import names are ordinary words (`kernels`, `model`): whoever else brings one hides ours
    or is hidden by it. `owners`: distributions by import name.
    """
    clear = True
    for room in ROOMS:
        others = sorted({name for name in owners.get(room, ()) if name.lower() != _OURS})
        for other in others:
            clear = False
            yield Finding(
                "clash",
                f"the distribution `{other}` brings a package `{room}` over Penstock's own",
                f"run `pip uninstall {other}` and then "
                "`pip install --force-reinstall --no-deps penstock`",
            )
    home = _place("penstock")
    for room in ROOMS:
        place = _place(room)
        if home is not None and place is not None and place.parent != home.parent:
            clear = False
            yield Finding(
                "clash",
                f"`import {room}` finds {place}, not Penstock's own package",
                f"rename {place}, or take {place.parent} out of PYTHONPATH",
            )
    if clear:
        yield Finding("clash", "no package clashes")


def _place(room: str) -> Path | None:
    """Folder or file that an import of it would take."""
    try:
        spec = importlib.util.find_spec(room)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin is not None else None
