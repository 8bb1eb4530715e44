"""`/v1/chat/completions` and `/v1/completions`: body to `Request`, then `AnswerResponse`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter, Request, Response

from cluster.api.answer import Answer, AnswerResponse
from cluster.api.evidence import EvidenceText, PromptText, contents
from cluster.api.grounding import Grounding, check_combination, refusal_of
from cluster.api.intake import parse, read_body, state_of
from cluster.api.parts import AnswerParts
from cluster.api.render import ChatRender, Render, TextRender, TokenRecord
from cluster.api.schema import ChatBody, CompletionBody, Generation
from cluster.api.state import ApiState
from cluster.contracts import ServedModel
from penstock import request as nouns
from penstock.chat import Encoded
from penstock.errors import ContextLengthError, InvalidRequestError
from penstock.identity import namespace

router = APIRouter()


def _body_of(schema: type[Generation]) -> dict[str, Any]:
    """OpenAPI for a body that the route reads by itself."""
    content = {"application/json": {"schema": schema.model_json_schema()}}
    return {"requestBody": {"required": True, "content": content}}


@router.post("/v1/chat/completions", openapi_extra=_body_of(ChatBody))
async def chat_completions(request: Request) -> Response:
    """An answer to a conversation, whole or streamed."""
    return await _answer(request, _Chat)


@router.post("/v1/completions", openapi_extra=_body_of(CompletionBody))
async def completions(request: Request) -> Response:
    """A continuation of one prompt, given as text or as token ids."""
    return await _answer(request, _Text)


class _Chat:
    """How a chat differs from a text completion."""

    endpoint = "chat"
    id_prefix = "chatcmpl-"
    param = "messages"
    schema: type[Generation] = ChatBody
    render: type[Render] = ChatRender

    @staticmethod
    def encode(body: Any, state: ApiState, scope: bytes) -> Encoded:
        return state.chat.encode(body.messages, body.chat_options(), scope=scope)

    @staticmethod
    def texts(body: Any, encoded: Encoded, state: ApiState) -> list[str]:
        """What evidence counts characters in."""
        return contents(body.messages)


class _Text:
    endpoint = "completions"
    id_prefix = "cmpl-"
    param = "prompt"
    schema: type[Generation] = CompletionBody
    render: type[Render] = TextRender

    @staticmethod
    def encode(body: Any, state: ApiState, scope: bytes) -> Encoded:
        prompt = body.one_prompt()
        if isinstance(prompt, str):
            ids = [*state.chat.start_ids, *state.tokenizer.encode(prompt)] if prompt else []
        else:
            ids = prompt
            # Without a tokenizer the worker, which knows the vocabulary, refuses what is too high.
            limit = state.tokenizer.vocab_size if state.has_tokenizer else 2**31
            if ids and not 0 <= min(ids) <= max(ids) < limit:
                raise InvalidRequestError(
                    f"prompt holds a token id outside the vocabulary of {limit}",
                    param="prompt",
                )
        if not ids:
            raise InvalidRequestError("the prompt is empty", param="prompt")
        return Encoded(ids, ())

    @staticmethod
    def texts(body: Any, encoded: Encoded, state: ApiState) -> list[str]:
        prompt = body.one_prompt()
        return [prompt if isinstance(prompt, str) else state.tokenizer.decode(encoded.token_ids)]


async def _answer(http: Request, kind: type[_Chat] | type[_Text]) -> Response:
    started_s = time.monotonic()
    state = state_of(http)
    tenant: str = http.scope["penstock.tenant"]
    give_back = state.take_stream()
    try:
        raw = await read_body(http, state.config.max_body_bytes)
        # The text is parsed where it is encoded: tens of megabytes must not stop the event loop.
        work = _prepare(raw, kind, state, tenant)
        encoded, body, scope, evidence = await state.encode(work, len(raw))
        model = await state.model(body.model)
        answer = _plan(body, encoded, scope, evidence, model, kind, state, started_s)
    except BaseException:
        give_back()
        raise
    return AnswerResponse(state.service, answer, give_back)


def _prepare(
    raw: bytes, kind: type[_Chat] | type[_Text], state: ApiState, tenant: str
) -> Callable[[], tuple[Encoded, Generation, bytes, EvidenceText | None]]:
    def work() -> tuple[Encoded, Generation, bytes, EvidenceText | None]:
        body = parse(kind.schema, raw)
        scope = namespace(state.config.cluster_key_bytes, tenant, body.cache_salt or "")
        encoded = kind.encode(body, state, scope)
        evidence = _evidence(body, encoded, kind, state) if body.evidence else None
        return encoded, body, scope, evidence

    return work


def _evidence(
    body: Generation, encoded: Encoded, kind: type[_Chat] | type[_Text], state: ApiState
) -> EvidenceText:
    prompt = encoded.token_ids
    if not state.has_tokenizer:
        return EvidenceText(None, prompt, names_message=kind is _Chat)
    text = PromptText(state.tokenizer, prompt, kind.texts(body, encoded, state))
    return EvidenceText(state.tokenizer, prompt, text, names_message=kind is _Chat)


def _plan(
    body: Generation,
    encoded: Encoded,
    scope: bytes,
    evidence: EvidenceText | None,
    model: ServedModel,
    kind: type[_Chat] | type[_Text],
    state: ApiState,
    started_s: float,
) -> Answer:
    """From checked parts to what will run. Raises for what does not fit the model."""
    prompt = encoded.token_ids
    grounding = _grounding(body, encoded, state)
    answer_id = kind.id_prefix + secrets.token_hex(16)
    request = nouns.Request(
        # Not the client's X-Request-Id: leases belong to this id, so nobody else may choose it.
        request_id=answer_id,
        token_ids=tuple(prompt),
        namespace=scope,
        sampling=body.sampling(state.sampling_defaults, secrets.randbits(63)),
        stop=body.stop_rule(_max_tokens(body, len(prompt), model.max_model_len, kind, state)),
        boundaries=encoded.boundaries,
        evidence=bool(body.evidence) or grounding is not None,
        logits_digest=bool(body.logits_digest),
    )
    render = kind.render(
        answer_id=answer_id,
        created=int(time.time()),
        model=model,
        include_usage=body.include_usage,
    )
    return Answer(
        request=request,
        render=render,
        evidence=evidence,
        grounding=grounding,
        tokens=TokenRecord() if body.logits_digest else None,
        parts=None if encoded.answer.plain else AnswerParts(encoded.answer),
        meter=state.telemetry.request(kind.endpoint, started_s, max_tokens=request.stop.max_tokens),
        stream=bool(body.stream),
        keep_alive_s=state.config.keep_alive_s,
        timeout_s=state.config.request_timeout_s,
    )


def _grounding(body: Generation, encoded: Encoded, state: ApiState) -> Grounding | None:
    if body.grounding != "strict":
        return None
    check_combination(body)
    return Grounding(
        refusal=refusal_of(state.chat.refusal),
        form=encoded.answer,
        tokenizer=state.tokenizer,
        prompt=encoded.token_ids,
    )


def _max_tokens(
    body: Generation,
    prompt_tokens: int,
    context: int,
    kind: type[_Chat] | type[_Text],
    state: ApiState,
) -> int:
    """What was asked for if it fits; without a wish what fits, up to the configured default."""
    name, asked = body.token_limit
    room = context - prompt_tokens
    if room < 1:
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens and the model's context is {context}; "
            "shorten it",
            param=kind.param,
        )
    if asked is None:
        least = body.min_tokens or 1
        return max(1, min(room, max(state.config.default_max_tokens, least)))
    if asked < 1:
        raise InvalidRequestError(f"{name} must be at least 1, not {asked}", param=name)
    if asked > room:
        raise ContextLengthError(
            f"the prompt has {prompt_tokens} tokens and {name} is {asked}, together more than the "
            f"model's context of {context}; lower {name} to {room} or less",
            param=kind.param,
        )
    return asked
