"""DSML, DeepSeek-V4's markup of tool calls (spec section 9): its spellings, and calls in it.

    <|DSML|tool_calls>
    <|DSML|invoke name="f">
    <|DSML|parameter name="city" string="true">Oslo</|DSML|parameter>
    <|DSML|parameter name="days" string="false">3</|DSML|parameter>
    </|DSML|invoke>
    </|DSML|tool_calls>

with fullwidth bars (U+FF5C). `string="true"` is raw text, `"false"` a JSON value. The mark itself
is one token; all around it is text. Nothing is escaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from penstock.chat.encoder import Segment
from penstock.chat.messages import ToolCall
from penstock.errors import InvalidRequestError

MARK = "\uff5cDSML\uff5c"
CALLS, INVOKE, PARAMETER = "tool_calls", "invoke", "parameter"
_MARK = Segment(MARK, control=True)


def write_calls(calls: Sequence[ToolCall]) -> Iterable[Segment]:
    """The block behind an answer's content, its blank line included."""
    yield Segment("\n\n")
    yield from _tag("<", f"{CALLS}>\n")
    for call in calls:
        yield from _tag("<", f'{INVOKE} name="{call.name}">\n')
        for i, (key, value) in enumerate(read_arguments(call.arguments).items()):
            raw = isinstance(value, str)
            text = value if raw else to_json(value)
            kind = "true" if raw else "false"
            yield Segment("\n" if i else "")
            yield from _tag("<", f'{PARAMETER} name="{key}" string="{kind}">')
            yield Segment(text)
            yield from _tag("</", f"{PARAMETER}>")
        yield Segment("\n")
        yield from _tag("</", f"{INVOKE}>\n")
    yield from _tag("</", f"{CALLS}>")


def read_arguments(arguments: str) -> dict[str, Any]:
    """The object in `arguments`; what is none becomes the one parameter `arguments`, as text."""
    try:
        read = json.loads(arguments)
        # Escapes may spell half of a surrogate pair, which no tokenizer takes.
        to_json(read).encode()
    except (ValueError, RecursionError, InvalidRequestError):
        read = None
    return read if isinstance(read, dict) else {"arguments": arguments}


def to_json(value: Any) -> str:
    """As the release writes JSON: one line, a space behind `,` and `:`, no escapes of letters."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise InvalidRequestError("a JSON value is nested too deeply", param="tools") from None


def _tag(opening: str, rest: str) -> Iterable[Segment]:
    yield Segment(opening)
    yield _MARK
    yield Segment(rest)
