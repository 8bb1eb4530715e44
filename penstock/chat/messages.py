"""A conversation as clients send it (OpenAI's shape), read into nouns. Every fault names its place.

What a model family makes of the roles is its encoder's business.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from penstock.errors import InvalidRequestError

ROLES = ("system", "developer", "user", "assistant")
ALL_ROLES = (*ROLES, "tool", "latest_reminder")
MOST_MESSAGES = 4096
MOST_CALLS = 1024


@dataclass(frozen=True)
class ToolCall:
    """`arguments` is the text of a JSON object, as OpenAI has it; `call_id` may be empty."""

    name: str
    arguments: str
    call_id: str = ""


@dataclass(frozen=True)
class Message:
    """One turn. Fields that its role does not have are empty."""

    role: str
    text: str = ""
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    answers: str = ""
    """Of a tool's message: the id of the call that it answers."""
    tools: tuple[Mapping[str, Any], ...] = ()
    """Tool definitions that this message brings, `{"type": "function", "function": {...}}` each."""
    response_format: Mapping[str, Any] | None = None
    task: str | None = None
    open_end: bool = False
    """An assistant's message that is to be continued: no end token behind it."""


def read_messages(
    messages: Sequence[Mapping[str, Any]], roles: Sequence[str] = ROLES
) -> list[Message]:
    """Messages in OpenAI's shape, checked. Raises `InvalidRequestError` that names the place.

    A message of a role that is not in `roles`, and tool calls where `roles` has no tool, are
    refused.
    """
    if not messages:
        raise InvalidRequestError("messages is empty; send at least one", param="messages")
    if len(messages) > MOST_MESSAGES:
        raise InvalidRequestError(
            f"messages has {len(messages)} entries; at most {MOST_MESSAGES} are taken",
            param="messages",
        )
    return [_message(message, f"messages[{i}]", roles) for i, message in enumerate(messages)]


def check_answerable(messages: Sequence[Message]) -> None:
    """Whether an answer can follow. Raises `InvalidRequestError`."""
    if messages[-1].role in ("assistant", "latest_reminder"):
        whose = "the assistant's" if messages[-1].role == "assistant" else "a reminder"
        raise InvalidRequestError(
            f"the last message is {whose}; end the conversation with a user's message",
            param="messages",
        )
    if not any(message.text or message.calls for message in messages):
        raise InvalidRequestError("every message is empty", param="messages")


def check_tool_results(messages: Sequence[Message]) -> None:
    """Every tool's message must answer a call of the last assistant's message before it, once."""
    open_ids: set[str] = set()
    for i, message in enumerate(messages):
        if message.role == "assistant":
            open_ids = {call.call_id for call in message.calls if call.call_id}
        elif message.role == "tool":
            if message.answers not in open_ids:
                raise InvalidRequestError(
                    f"messages[{i}].tool_call_id is {message.answers[:80]!a}, which is no "
                    "unanswered call of the assistant's message before it",
                    param=f"messages[{i}].tool_call_id",
                )
            open_ids.remove(message.answers)


def _message(message: Any, place: str, roles: Sequence[str]) -> Message:
    if not isinstance(message, Mapping):
        raise wrong_type(place, "an object", message)
    role = message.get("role")
    if not isinstance(role, str):
        raise wrong_type(f"{place}.role", "a string", role)
    if role not in roles:
        raise InvalidRequestError(
            f"{place}.role must be one of {', '.join(roles)}, not {role[:40]!a}",
            param=f"{place}.role",
        )
    with_tools = "tool" in roles
    if message.get("function_call") or (message.get("tool_calls") and not with_tools):
        raise InvalidRequestError(
            f"{place} has tool calls, which this server does not support with this model",
            param=f"{place}.tool_calls",
            code="unsupported_value",
        )
    content = message.get("content")
    if content is None and role == "assistant":
        content = ""
    # Between the parts of a tool's result there is a blank line (V4's release encoder).
    joint = "\n\n" if role == "tool" else ""
    text = content if isinstance(content, str) else _parts(content, f"{place}.content", joint)
    if not with_tools:
        return Message(role, text)
    return Message(
        role,
        text,
        reasoning=_optional_text(message, "reasoning_content", place) or "",
        calls=_calls(message.get("tool_calls"), place, role),
        answers=_optional_text(message, "tool_call_id", place) or "",
        tools=read_tools(message.get("tools"), f"{place}.tools"),
        response_format=_optional_object(message, "response_format", place),
        task=_optional_text(message, "task", place),
        open_end=message.get("wo_eos") is True,
    )


def _calls(calls: Any, place: str, role: str) -> tuple[ToolCall, ...]:
    if not calls:
        return ()
    if role != "assistant":
        raise InvalidRequestError(
            f"{place} has tool_calls, but only an assistant's message may",
            param=f"{place}.tool_calls",
        )
    if not isinstance(calls, list):
        raise wrong_type(f"{place}.tool_calls", "a list", calls)
    if len(calls) > MOST_CALLS:
        raise InvalidRequestError(
            f"{place}.tool_calls has {len(calls)} entries; at most {MOST_CALLS} are taken",
            param=f"{place}.tool_calls",
        )
    return tuple(_call(call, f"{place}.tool_calls[{i}]") for i, call in enumerate(calls))


def _call(call: Any, place: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping):
        raise wrong_type(f"{place}.function", "an object", function)
    name, arguments = function.get("name"), function.get("arguments")
    check_tool_name(name, f"{place}.function.name")
    if not isinstance(arguments, str):
        raise wrong_type(f"{place}.function.arguments", "a string of JSON", arguments)
    return ToolCall(str(name), arguments, _optional_text(call, "id", place) or "")


def read_tools(tools: Any, place: str = "tools") -> tuple[Mapping[str, Any], ...]:
    """Tool definitions, checked: functions with distinct names. Raises `InvalidRequestError`."""
    if not tools:
        return ()
    if not isinstance(tools, list | tuple):
        raise wrong_type(place, "a list", tools)
    names = set()
    for i, tool in enumerate(tools):
        here = f"{place}[{i}]"
        if not isinstance(tool, Mapping):
            raise wrong_type(here, "an object", tool)
        if tool.get("type", "function") != "function":
            raise InvalidRequestError(
                f"{here}.type must be 'function'; no other kind of tool is known",
                param=f"{here}.type",
                code="unsupported_value",
            )
        function = tool.get("function")
        if not isinstance(function, Mapping):
            raise wrong_type(f"{here}.function", "an object", function)
        check_tool_name(function.get("name"), f"{here}.function.name")
        parameters = function.get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise wrong_type(f"{here}.function.parameters", "an object", parameters)
        if function["name"] in names:
            raise InvalidRequestError(
                f"{here}.function.name repeats the name {function['name']!a}",
                param=f"{here}.function.name",
            )
        names.add(function["name"])
    return tuple(tools)


def check_tool_name(name: Any, place: str) -> None:
    """Names stand between quotes in the prompt: what would end them is refused."""
    if not isinstance(name, str):
        raise wrong_type(place, "a string", name)
    allowed = all(char.isprintable() and char not in '"<> ' for char in name)
    if not 1 <= len(name) <= 256 or not allowed:
        raise InvalidRequestError(
            f"{place} must be 1 to 256 printable characters without spaces, quotes, < and >",
            param=place,
        )


def _optional_text(message: Mapping[str, Any], key: str, place: str) -> str | None:
    value = message.get(key)
    if value is not None and not isinstance(value, str):
        raise wrong_type(f"{place}.{key}", "a string", value)
    return value


def _optional_object(message: Mapping[str, Any], key: str, place: str) -> Mapping[str, Any] | None:
    value = message.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise wrong_type(f"{place}.{key}", "an object", value)
    return value


def _parts(content: Any, place: str, joint: str) -> str:
    if not isinstance(content, list):
        raise wrong_type(place, "a string or a list of text parts", content)
    texts = []
    for i, part in enumerate(content):
        here = f"{place}[{i}]"
        if not isinstance(part, Mapping):
            raise wrong_type(here, "an object", part)
        if part.get("type") != "text":
            raise InvalidRequestError(
                f"{here}.type must be 'text'; this model reads text only", param=f"{here}.type"
            )
        if not isinstance(part.get("text"), str):
            raise wrong_type(f"{here}.text", "a string", part.get("text"))
        texts.append(part["text"])
    return joint.join(texts)


def wrong_type(place: str, wanted: str, got: Any) -> InvalidRequestError:
    kind = "missing" if got is None else f"of type {type(got).__name__}"
    return InvalidRequestError(
        f"{place} must be {wanted}; it is {kind}", param=place, code="invalid_type"
    )
