"""What the source says of a setting: the string below it, which Python does not keep."""

from __future__ import annotations

import ast
import inspect
import textwrap
from itertools import pairwise
from typing import Any


def attribute_docs(cls: type) -> dict[str, str]:
    """By attribute, those of base classes included; the most derived string wins."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base.__module__ != "builtins" and not base.__module__.startswith("pydantic"):
            found |= _own(base)
    return found


def _own(cls: type) -> dict[str, str]:
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    (definition,) = ast.parse(source).body
    body = definition.body if isinstance(definition, ast.ClassDef) else []
    docs: dict[str, str] = {}
    for before, after in pairwise(body):
        if isinstance(before, ast.AnnAssign) and isinstance(before.target, ast.Name):
            text = _text(after)
            if text:
                docs[before.target.id] = text
    return docs


def _text(node: ast.stmt) -> str:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        value: Any = node.value.value
        if isinstance(value, str):
            return " ".join(value.split())
    return ""


def first_paragraph(thing: Any) -> str:
    """The first paragraph of its docstring on one line, or nothing."""
    return " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())


def cell(text: object) -> str:
    """`text` inside a table of Markdown."""
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
