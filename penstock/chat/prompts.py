"""The long prompt strings of a DeepSeek-V4 checkpoint, out of its own `encoding/` folder.

The release ships its encoder as Python source. Its string literals are read here with `ast`; the
code is never run. Names that are read: `TOOLS_TEMPLATE`, `response_format_template`, and for the
efforts `REASONING_EFFORT_MAX` (preview) or `REASONING_EFFORT_PROMPTS` with
`DEFAULT_REASONING_EFFORT` (0731, 0813). A JSON file with these keys does as well.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import Formatter
from typing import Any

from penstock.errors import InvalidRequestError, ModelLoadError
from penstock.folder import read_json

SOURCE = "encoding/encoding_dsv4.py"
PREVIEW, OFFICIAL = "preview", "official"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
LARGEST_BYTES = 4 << 20

# Which tier of a checkpoint generation OpenAI's names mean (spec section 9, trap T30): the preview
# has two, and only `max` adds a paragraph; the official ones have three, and `low` adds nothing.
_TIERS: Mapping[str, Mapping[str, str]] = {
    PREVIEW: {
        "minimal": "high",
        "low": "high",
        "medium": "high",
        "high": "high",
        "xhigh": "max",
        "max": "max",
    },
    OFFICIAL: {
        "minimal": "low",
        "low": "low",
        "medium": "high",
        "high": "high",
        "xhigh": "max",
        "max": "max",
    },
}
_NO_PARAGRAPH = {PREVIEW: "high", OFFICIAL: "low"}


@dataclass(frozen=True)
class Template:
    """A format string, taken apart: literal texts and names of placeholders, in order."""

    parts: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True)
class Prompts:
    """What a checkpoint says beside the conversation. None: its folder does not say."""

    generation: str = PREVIEW
    efforts: Mapping[str, str] = field(default_factory=dict)
    """Paragraph of each tier that the folder has."""
    default_effort: str = "high"
    tools: Template | None = None
    response_format: Template | None = None

    def paragraph(self, effort: str | None) -> str:
        """What an effort (one of `EFFORTS`) puts before a thinking conversation; often nothing.

        Raises `InvalidRequestError` if the folder lacks it.
        """
        tiers = _TIERS[self.generation]
        if effort is not None and effort not in tiers:
            raise InvalidRequestError(
                f"reasoning_effort must be one of {', '.join(EFFORTS)}, not {effort[:40]!a}",
                param="reasoning_effort",
            )
        tier = self.default_effort if effort is None else tiers[effort]
        if tier in self.efforts:
            return self.efforts[tier]
        if tier == _NO_PARAGRAPH[self.generation]:
            return ""
        name = "REASONING_EFFORT_PROMPTS" if self.generation == OFFICIAL else "REASONING_EFFORT_MAX"
        raise missing(f"reasoning_effort '{effort or tier}'", name, "reasoning_effort")


def missing(feature: str, name: str, param: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{feature} needs the text {name}, which is read from {SOURCE} of the model folder and is "
        "not there; put the release's encoding folder beside config.json",
        param=param,
        code="unsupported_value",
    )


def read_prompts(folder: Path | None) -> Prompts:
    """What the folder says. Raises `ModelLoadError` for a file that cannot be read.

    The generation is decided here and nowhere else: by the strings if they are there (a preview
    checkpoint may carry a DSpark draft), else by the `dspark_*` keys of config.json.
    """
    if folder is None:
        return Prompts()
    found: dict[str, Any] = {}
    encoding = folder / "encoding"
    # Sorted, and JSON last: what an operator wrote by hand beside the release wins.
    for path in sorted(encoding.glob("*.py")):
        if not path.name.startswith("test"):
            found |= _literals(path)
    for path in sorted(encoding.glob("*.json")):
        found |= read_json(path)
    prompts, paragraph = found.get("REASONING_EFFORT_PROMPTS"), found.get("REASONING_EFFORT_MAX")
    efforts: dict[str, str] = {}
    if isinstance(prompts, dict) and all(isinstance(text, str) for text in prompts.values()):
        default = found.get("DEFAULT_REASONING_EFFORT")
        generation, efforts = OFFICIAL, prompts
        if not isinstance(default, str) or default not in efforts:
            default = _NO_PARAGRAPH[OFFICIAL]
    elif isinstance(paragraph, str):
        generation, efforts, default = PREVIEW, {"max": paragraph}, _NO_PARAGRAPH[PREVIEW]
    else:
        config = read_json(folder / "config.json")
        draft = any(key.startswith("dspark_") for key in config)
        generation = OFFICIAL if draft else PREVIEW
        default = _NO_PARAGRAPH[generation]
    return Prompts(
        generation,
        efforts,
        str(default),
        _template(
            found,
            "TOOLS_TEMPLATE",
            {"tool_schemas", "dsml_token", "thinking_start_token", "thinking_end_token"},
        ),
        _template(found, "response_format_template", {"schema"}),
    )


def _template(found: Mapping[str, Any], name: str, known: set[str]) -> Template | None:
    text = found.get(name)
    if not isinstance(text, str):
        return None
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise ModelLoadError(f"{name} in {SOURCE} is no format string: {error}") from error
    parts: list[tuple[str, str | None]] = []
    for literal, key, spec, conversion in pieces:
        if key is not None and (key not in known or spec or conversion):
            raise ModelLoadError(
                f"{name} in {SOURCE} has the placeholder {key!a}, which this version does not know"
            )
        parts.append((literal, key))
    return Template(tuple(parts))


def _literals(path: Path) -> dict[str, Any]:
    """Names that the module's top level binds to literals. Nothing is executed."""
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ModelLoadError(f"{path} is larger than any file of its kind")
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ModelLoadError(f"cannot read {path} as Python source: {error}") from error
    found: dict[str, Any] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Assign):
            targets, value = statement.targets, statement.value
        elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
            targets, value = [statement.target], statement.value
        else:
            continue
        try:
            literal = _value(value, found)
        except (ValueError, RecursionError):
            continue
        found |= {target.id: literal for target in targets if isinstance(target, ast.Name)}
    return found


def _value(node: ast.expr, names: Mapping[str, Any]) -> Any:
    """A text, or a table of texts; texts may be joined by + and named. Raises `ValueError`."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _value(node.left, names), _value(node.right, names)
        if isinstance(left, str) and isinstance(right, str):
            # Each line may double the one before: a short file must not become a long text.
            if len(left) + len(right) > LARGEST_BYTES:
                raise ValueError("longer than any text of its kind")
            return left + right
    if isinstance(node, ast.Dict) and None not in node.keys:
        keys = [_value(key, names) for key in node.keys if key is not None]
        if all(isinstance(key, str) for key in keys):
            values = [_value(value, names) for value in node.values]
            return dict(zip(keys, values, strict=True))
    raise ValueError("not a literal")
