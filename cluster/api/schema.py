"""Bodies that clients send. Unknown fields are accepted, wrong types are refused, null is absent.

What OpenAI's API has and this server does not do yet is refused by name, never silently dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cluster.api import fields
from cluster.api.errors import ForbiddenValueError
from penstock.chat import ChatOptions
from penstock.errors import InvalidRequestError
from penstock.request import MOST_TOP_LOGPROBS, Priority, Sampling, StopRule

MOST_CHOICES = 128
LONGEST_SALT = 256
"""Answers in one response: prompts times n."""
Fraction = Annotated[float, Field(allow_inf_nan=False)]
T = TypeVar("T")
# One fault is enough: a million wrong elements must not make a million errors.
Items = Annotated[list[T], Field(fail_fast=True)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)


class StreamOptions(Body):
    include_usage: bool | None = None


class Generation(Body):
    """What chat and text completions share."""

    model: str = Field(max_length=512)
    temperature: Fraction | None = None
    top_p: Fraction | None = None
    top_k: int | None = None
    seed: Seed | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | Items[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    evidence: bool | None = None
    """Extension: name the spans of the prompt that attention selected."""
    logits_digest: bool | None = None
    """Extension: a digest of the logits that each token was drawn from, and the token ids."""
    cache_salt: Annotated[str, Field(max_length=LONGEST_SALT)] | None = None
    """Extension: cached prefixes are shared only between requests of the same salt."""
    priority: int | Literal["interactive", "normal", "batch"] | None = None
    """Extension: who goes first where work has to wait. A number is vLLM's: below 0 interactive,
    above 0 batch.
    """
    user: Annotated[str, Field(max_length=512)] | None = None
    frequency_penalty: Fraction | None = None
    presence_penalty: Fraction | None = None
    logit_bias: dict[str, Fraction] | None = None
    best_of: int | None = None
    grounding: Literal["off", "strict"] | None = None
    """Extension: `strict` turns an answer that its evidence does not contain into a refusal."""

    @model_validator(mode="after")
    def _supported(self) -> Generation:
        for name in ("n", "best_of"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequestError(f"{name} must be at least 1, not {value}", param=name)
        if self.n is not None and self.n > MOST_CHOICES:
            raise InvalidRequestError(f"n must be at most {MOST_CHOICES}, not {self.n}", param="n")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ForbiddenValueError(
                "best_of is not supported by this server except as n itself: all answers are "
                "returned; send n and choose",
                param="best_of",
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError(
                "stream_options is allowed only together with stream: true", param="stream_options"
            )
        return self

    @staticmethod
    def _refuse_if(name: str, wrong: bool) -> None:
        if wrong:
            raise ForbiddenValueError(
                f"{name} is not supported by this server; leave it out", param=name
            )

    @property
    def token_limit(self) -> tuple[str, int | None]:
        """Name and value of the field that bounds the answer."""
        return "max_tokens", self.max_tokens

    def sampling(self, defaults: dict[str, float], seed: int) -> Sampling:
        temperature = self.temperature
        if temperature is None:
            temperature = defaults.get("temperature", 1.0)
        top_p = defaults.get("top_p", 1.0) if self.top_p is None else self.top_p
        top_k = int(defaults.get("top_k", 0)) if self.top_k is None else self.top_k
        # vLLM's spelling of "all tokens".
        top_k = 0 if top_k == -1 else top_k
        if top_k >= 2**31:
            raise InvalidRequestError("top_k must be below 2147483648", param="top_k")
        return Sampling(
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed if self.seed is None else self.seed % 2**64,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=_bias(self.logit_bias or {}),
        )

    def urgency(self, otherwise: Priority) -> Priority:
        """The class that was asked for, or `otherwise`."""
        if self.priority is None:
            return otherwise
        if isinstance(self.priority, str):
            return Priority[self.priority.upper()]
        classes = Priority.INTERACTIVE, Priority.NORMAL, Priority.BATCH
        return classes[(self.priority >= 0) + (self.priority > 0)]

    @property
    def asked_logprobs(self) -> int | None:
        """How many likeliest tokens to tell beside each token; None: nothing."""
        raise NotImplementedError

    def stop_rule(self, max_tokens: int) -> StopRule:
        strings = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return StopRule(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            ignore_eos=bool(self.ignore_eos),
            strings=strings,
        )

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


def _bias(given: Mapping[str, float]) -> tuple[tuple[int, float], ...]:
    """By token id; ids are strings in JSON."""
    found: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdecimal() and len(key) <= 10):
            raise InvalidRequestError(
                f"logit_bias maps token ids to numbers, and {key[:40]!a} is no token id",
                param="logit_bias",
            )
        if found.setdefault(int(key), bias) != bias:
            raise InvalidRequestError(
                f"logit_bias names token {int(key)} twice", param="logit_bias"
            )
    return tuple(sorted(found.items()))


class TemplateArguments(Body):
    """What vLLM's clients send to the chat template."""

    thinking: bool | None = None
    enable_thinking: bool | None = None
    """Another spelling of `thinking`."""
    drop_thinking: bool | None = None
    """Leave out the reasoning of earlier turns (unless there are tools); true unless given."""
    task: str | None = None
    """A quick task of DeepSeek-V4 instead of an answer, as `title` or `query`."""


class Conversation(Body):
    """What decides how messages become a prompt."""

    tools: Items[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    """`none` leaves the tools out of the prompt; `required` or a function by name forces a call."""
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """`none`, `minimal`, `low`, `medium`, `high`, `xhigh` or `max`; any but `none` means thinking.
    What each adds to the prompt is the model's."""
    chat_template_kwargs: TemplateArguments | None = None

    def chat_options(self) -> ChatOptions:
        """Raises `InvalidRequestError` for what cannot be promised."""
        tools = tuple(self.tools or ())
        self._check_choice(tools)
        given = self.chat_template_kwargs or TemplateArguments()
        if None not in (given.thinking, given.enable_thinking) and (
            given.thinking != given.enable_thinking
        ):
            raise InvalidRequestError(
                "chat_template_kwargs.thinking and enable_thinking contradict each other; send one",
                param="chat_template_kwargs.enable_thinking",
            )
        return ChatOptions(
            tools=() if self.tool_choice == "none" else tools,
            thinking=given.enable_thinking if given.thinking is None else given.thinking,
            effort=self.reasoning_effort,
            drop_thinking=given.drop_thinking,
            task=given.task,
        )

    def _check_choice(self, tools: Sequence[Mapping[str, Any]]) -> None:
        choice = self.tool_choice
        if choice in (None, "auto", "none"):
            return
        if choice != "required" and not isinstance(choice, dict):
            raise InvalidRequestError(
                "tool_choice must be 'auto', 'none', 'required' or a function by name, not "
                f"{str(choice)[:40]!a}",
                param="tool_choice",
            )
        if not tools:
            raise InvalidRequestError("tool_choice needs tools; send some", param="tool_choice")
        if isinstance(choice, dict):
            self._check_named(choice, tools)

    @staticmethod
    def _check_named(choice: Mapping[str, Any], tools: Sequence[Mapping[str, Any]]) -> None:
        if choice.get("type") != "function":
            raise ForbiddenValueError(
                "tool_choice.type must be 'function'; no other kind is supported",
                param="tool_choice.type",
            )
        function = choice.get("function")
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            raise InvalidRequestError(
                "tool_choice.function.name is required",
                param="tool_choice.function.name",
                code="missing_required_parameter",
            )
        known = [f.get("name") for t in tools if isinstance(f := t.get("function"), dict)]
        if name not in known:
            raise InvalidRequestError(
                f"tool_choice names the function {name[:100]!a}, which is not among tools",
                param="tool_choice.function.name",
            )


class ChatBody(Generation, Conversation):
    messages: Items[dict[str, Any]]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    response_format: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        fields.refuse(body, fields.CHAT)
        return body

    @model_validator(mode="after")
    def _chat_supported(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError(
                "top_logprobs is allowed only together with logprobs: true", param="top_logprobs"
            )
        _check_top("top_logprobs", self.top_logprobs)
        return self

    def urgency(self, otherwise: Priority) -> Priority:
        """The class that was asked for, or `otherwise`."""
        if self.priority is None:
            return otherwise
        if isinstance(self.priority, str):
            return Priority[self.priority.upper()]
        classes = Priority.INTERACTIVE, Priority.NORMAL, Priority.BATCH
        return classes[(self.priority >= 0) + (self.priority > 0)]

    @property
    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def token_limit(self) -> tuple[str, int | None]:
        if self.max_completion_tokens is not None:
            return "max_completion_tokens", self.max_completion_tokens
        return "max_tokens", self.max_tokens


class CompletionBody(Generation):
    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    echo: bool | None = None
    logprobs: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, body: Any) -> Any:
        fields.refuse(body, fields.TEXT)
        return body

    @model_validator(mode="after")
    def _completion_supported(self) -> CompletionBody:
        _check_top("logprobs", self.logprobs)
        if self.echo and self.logprobs is not None:
            raise ForbiddenValueError(
                "echo together with logprobs is not supported: the prompt's own tokens have no log "
                "probabilities here; send one of them",
                param="echo",
            )
        return self

    def urgency(self, otherwise: Priority) -> Priority:
        """The class that was asked for, or `otherwise`."""
        if self.priority is None:
            return otherwise
        if isinstance(self.priority, str):
            return Priority[self.priority.upper()]
        classes = Priority.INTERACTIVE, Priority.NORMAL, Priority.BATCH
        return classes[(self.priority >= 0) + (self.priority > 0)]

    @property
    def asked_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Each prompt, as text or as token ids. Raises `InvalidRequestError` if there is none or
        too many.
        """
        given = self.prompt
        several = isinstance(given, list) and bool(given) and isinstance(given[0], str | list)
        prompts = [*given] if several else [given]
        if len(prompts) * (self.n or 1) > MOST_CHOICES:
            raise InvalidRequestError(
                f"{len(prompts)} prompts with {self.n or 1} answers each are more than the "
                f"{MOST_CHOICES} answers that one request may have; send several requests",
                param="prompt",
            )
        return prompts  # type: ignore[return-value]  # lists are of one kind: checked above


def _check_top(name: str, value: int | None) -> None:
    if value is not None and not 0 <= value <= MOST_TOP_LOGPROBS:
        raise InvalidRequestError(
            f"{name} must be between 0 and {MOST_TOP_LOGPROBS}, not {value}", param=name
        )


class TokenizeBody(Conversation):
    prompt: str | None = None
    messages: Items[dict[str, Any]] | None = None


class DetokenizeBody(Body):
    tokens: Items[int]
