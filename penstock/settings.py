"""The base of every room's configuration section, sizes, and errors that say what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, WithJsonSchema

from penstock.errors import UsageError

_UNITS: Mapping[str, int] = {
    "": 1,
    "B": 1,
    "K": 10**3,
    "KB": 10**3,
    "M": 10**6,
    "MB": 10**6,
    "G": 10**9,
    "GB": 10**9,
    "T": 10**12,
    "TB": 10**12,
    "KIB": 1 << 10,
    "MIB": 1 << 20,
    "GIB": 1 << 30,
    "TIB": 1 << 40,
}
_SIZE = re.compile(r"\s*(\d{1,20}(?:\.\d{1,9})?)\s*([A-Za-z]{0,3})\s*")


class Section(BaseModel):
    """Frozen; a key that it does not know is an error, never ignored."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def parse_size(value: Any) -> Any:
    """Bytes of `4GiB`, `512 MiB`, `1.5GB` or a number; anything else is left to pydantic."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    unit = _UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        raise ValueError(f"'{value}' is not a size; write it as 4GiB, 512MiB or a number of bytes")
    return int(float(match.group(1)) * unit) if "." in match.group(1) else int(match[1]) * unit


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "minimum": 0},
                {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*([KMGTkmgt][Ii]?)?[Bb]?\s*$"},
            ]
        }
    ),
]
"""A number of bytes; in text also `4GiB`, `512MiB`, `10GB`."""


def format_size(size_bytes: int) -> str:
    """Exact: `4GiB` where it divides, else bytes."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size_bytes and size_bytes % _UNITS[unit.upper()] == 0:
            return f"{size_bytes // _UNITS[unit.upper()]}{unit}"
    return str(size_bytes)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'port'?`, or the known words if none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    return f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(names)}"


S = TypeVar("S", bound=BaseModel)


def validated(section: type[S], values: Mapping[str, Any], origin: Mapping[str, str]) -> S:
    """`section` from nested `values`. Raises `UsageError`: the first fault in one sentence, with
    the setting's dotted name and where its value came from (`origin`, by dotted name).
    """
    try:
        return section.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = [str(part) for part in first["loc"]]
        name = ".".join(path)
        place = next(
            (f" ({origin[key]})" for key in _upwards(name) if key in origin),
            "",
        )
        if first["type"] == "extra_forbidden":
            known = _fields(section, path[:-1])
            hint = did_you_mean(path[-1], known)
            raise UsageError(f"unknown setting '{name}'{place}{hint}", param=name) from None
        message = first["msg"].removeprefix("Value error, ")
        # A secret must not come back on a terminal or in a log.
        given = None if _secret(section, path) else first.get("input")
        shown = f", not {given!r}" if isinstance(given, str | int | float | bool) else ""
        if first["type"] == "value_error":
            shown = ""
        lead = f"setting '{name}'{place}: " if name else ""
        raise UsageError(f"{lead}{message}{shown}", param=name or None) from None


def _upwards(name: str) -> Iterable[str]:
    while name:
        yield name
        name = name.rpartition(".")[0]


def _secret(section: type[BaseModel], path: list[str]) -> bool:
    """Whether the setting asks not to be shown."""
    known: Any = section
    for part in path:
        field = getattr(known, "model_fields", {}).get(part)
        if field is None:
            return False
        if not field.repr:
            return True
        known = field.annotation
    return False


def _fields(section: type[BaseModel], path: list[str]) -> list[str]:
    current: Any = section
    for part in path:
        current = current.model_fields[part].annotation
    return list(current.model_fields)
