"""Shapes of answers, for the OpenAPI document only: routes write their bytes themselves.

`tests/cluster/api/test_schemathesis.py` holds what is sent against these. Fields may be added.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class Error(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every error, also within a stream that has begun."""

    error: Error


class PromptDetails(BaseModel):
    cached_tokens: int


class AnswerUsage(BaseModel):
    """Hit and miss together are the prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: dict[str, int] = {}
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int


class ToolFunction(BaseModel):
    name: str
    arguments: str


class ToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: ToolFunction


class Message(BaseModel):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] = []
    evidence: Any = None


class ChatChoice(BaseModel):
    index: int
    message: Message
    logprobs: dict[str, Any] | None
    finish_reason: str
    token_ids: list[int] = []
    logits_digests: list[str] = []


class TextChoice(BaseModel):
    index: int
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: str
    token_ids: list[int] = []
    logits_digests: list[str] = []
    evidence: Any = None


class Completion(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    usage: AnswerUsage
    timings: dict[str, float]


class ChatCompletion(Completion):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextCompletion(Completion):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    system_fingerprint: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class Text(BaseModel):
    prompt: str


class Health(BaseModel):
    status: Literal["ok"]


class Ready(BaseModel):
    ready: bool
    reason: str | None


class Version(BaseModel):
    version: str


class StoredFile(BaseModel):
    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    status: Literal["processed"]


class Page(BaseModel):
    object: Literal["list"]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileList(Page):
    data: list[StoredFile]


class DeletedFile(BaseModel):
    id: str
    object: Literal["file"]
    deleted: bool


class BatchCounts(BaseModel):
    total: int
    completed: int
    failed: int


class Batch(BaseModel):
    id: str
    object: Literal["batch"]
    endpoint: str
    model: str
    input_file_id: str
    completion_window: str
    status: Literal["in_progress", "completed", "cancelled"]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int | None
    completed_at: int | None
    cancelled_at: int | None
    request_counts: BatchCounts
    usage: dict[str, Any]
    metadata: dict[str, str] | None


class BatchList(Page):
    data: list[Batch]


class Cluster(BaseModel):
    object: Literal["cluster"]
    at: float
    model: dict[str, Any] | None
    problems: list[str]
    front: dict[str, int]
    pools: dict[str, dict[str, int]]
    workers: list[dict[str, Any]]
    workers_left_out: int
    store: dict[str, Any] | None
    prefix_cache: dict[str, float | None]


class RouteWorker(BaseModel):
    id: str
    role: str
    total: float | None
    parts: dict[str, float | None]
    facts: dict[str, float]
    barred: str


class RouteTold(BaseModel):
    object: Literal["route"]
    request_id: str
    at: float
    policy: str
    unit: str
    facts: dict[str, float]
    prefill: str
    decode: str
    workers: list[RouteWorker]
