"""`/v1/chat/completions` and `/v1/completions`: body to `Request`, then `AnswerResponse`."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import APIRouter, Request, Response

from cluster.api.answer import Answer, AnswerResponse
from cluster.api.choices import Choice
from cluster.api.evidence import EvidenceText, PromptText, contents
from cluster.api.grounding import Grounding, check_combination, refusal_of
from cluster.api.intake import parse, read_body, state_of
from cluster.api.logprobs import Logprobs
from cluster.api.parts import AnswerParts
from cluster.api.reconnect import Kept, keep
from cluster.api.records import TokenRecord
from cluster.api.render import ChatRender, Render, TextRender
from cluster.api.schema import ChatBody, CompletionBody, Generation
from cluster.api.scope import INSIDE
from cluster.api.state import ApiState
from cluster.api.structure import grammar_of
from cluster.contracts import ServedModel
from penstock import request as nouns
from penstock.chat import Encoded
from penstock.errors import ContextLengthError, InvalidRequestError, JournalUnavailableError
from penstock.identity import namespace, tenant_tag
from penstock.telemetry import logs, trace

router = APIRouter()


@router.post("/v1/chat/completions")
async def chat_completions(request: Request) -> Response:
    """An answer to a conversation, whole or streamed."""
    return await _answer(request, _Chat)


@router.post("/v1/completions")
async def completions(request: Request) -> Response:
    """Continuations of one prompt or of several, given as text or as token ids."""
    return await _answer(request, _Text)


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request."""

    encoded: Encoded
    texts: tuple[str, ...] = ()
    """The client's own texts in it: what evidence counts characters in."""
    echo: str = ""
    """What its answer is to begin with."""
    grammar: nouns.Grammar | None = None
    placed: PromptText | None = None
    """Set if evidence is asked for."""


class _Chat:
    """How a chat differs from a text completion."""

    endpoint = "chat"
    id_prefix = "chatcmpl-"
    param = "messages"
    schema: type[Generation] = ChatBody
    render: type[Render] = ChatRender

    @staticmethod
    def encode(body: Any, state: ApiState, scope: bytes) -> list[Prompt]:
        encoded = state.chat.encode(body.messages, body.chat_options(), scope=scope)
        grammar = grammar_of(body, encoded.answer, state.tokenizer)
        return [Prompt(encoded, tuple(contents(body.messages)), grammar=grammar)]


class _Text:
    endpoint = "completions"
    id_prefix = "cmpl-"
    param = "prompt"
    schema: type[Generation] = CompletionBody
    render: type[Render] = TextRender

    @staticmethod
    def encode(body: Any, state: ApiState, scope: bytes) -> list[Prompt]:
        return [_text_prompt(prompt, state, body) for prompt in body.prompts()]


def _text_prompt(prompt: str | list[int], state: ApiState, body: Any) -> Prompt:
    if isinstance(prompt, str):
        ids = [*state.chat.start_ids, *state.tokenizer.encode(prompt)] if prompt else []
        text = prompt
    else:
        ids = prompt
        # Without a tokenizer the worker, which knows the vocabulary, refuses what is too high.
        limit = state.tokenizer.vocab_size if state.has_tokenizer else 2**31
        if ids and not 0 <= min(ids) <= max(ids) < limit:
            raise InvalidRequestError(
                f"prompt holds a token id outside the vocabulary of {limit}",
                param="prompt",
            )
        wanted = body.echo or (body.evidence and state.has_tokenizer)
        text = state.tokenizer.decode(ids) if wanted else ""
    if not ids:
        raise InvalidRequestError("the prompt is empty", param="prompt")
    return Prompt(Encoded(ids, ()), (text,), text if body.echo else "")


@dataclass(frozen=True)
class Owner:
    """Whose request it is and how urgent."""

    namespace: bytes
    tenant: bytes
    priority: nouns.Priority


async def _answer(http: Request, kind: type[_Chat] | type[_Text]) -> Response:
    started_s = time.monotonic()
    state = state_of(http)
    tenant: str = http.scope["penstock.tenant"]
    # A line of a batch has time.
    otherwise = nouns.Priority.BATCH if INSIDE in http.scope else nouns.Priority.NORMAL
    place = state.take_stream()
    try:
        raw = await read_body(http, state.config.max_body_bytes)
        # The text is parsed where it is encoded: tens of megabytes must not stop the event loop.
        work = _prepare(raw, kind, state, tenant, otherwise)
        prompts, body, owner = await state.encode(work, len(raw))
        model = await state.model(body.model)
        place.widen(len(prompts) * (body.n or 1))
        kept = await _kept(http, raw, body, prompts, kind, state)
        answer = _plan(body, prompts, owner, model, kind, state, started_s, kept)
    except BaseException:
        place.leave()
        raise
    return AnswerResponse(state.service, answer, place.leave)


async def _kept(
    http: Request,
    raw: bytes,
    body: Generation,
    prompts: Sequence[Prompt],
    kind: type[_Chat] | type[_Text],
    state: ApiState,
) -> Kept | None:
    """Its client can go on reading elsewhere if it named the stream: `cluster.api.reconnect`."""
    name, last = http.headers.get("x-request-id"), http.headers.get("last-event-id")
    journal = state.kept_streams
    if journal is None or name is None or not body.stream:
        return None
    if len(prompts) * (body.n or 1) != 1:
        return None
    tells_more = body.evidence or body.grounding == "strict" or body.asked_logprobs is not None
    try:
        return await keep(
            journal,
            tenant=http.scope["penstock.tenant"],
            name=name,
            body=raw,
            last_event_id=last,
            answer_id=kind.id_prefix + secrets.token_hex(16),
            replays=not tells_more,
        )
    except JournalUnavailableError:
        if last is not None:
            raise
        # It is answered all the same; only its client cannot come back for it.
        return None


def _prepare(
    raw: bytes,
    kind: type[_Chat] | type[_Text],
    state: ApiState,
    tenant: str,
    otherwise: nouns.Priority,
) -> Callable[[], tuple[list[Prompt], Generation, Owner]]:
    def work() -> tuple[list[Prompt], Generation, Owner]:
        body = parse(kind.schema, raw)
        key = state.config.cluster_key_bytes
        scope = namespace(key, tenant, body.cache_salt or "")
        prompts = kind.encode(body, state, scope)
        if body.evidence and state.has_tokenizer:
            prompts = [_placed(prompt, state) for prompt in prompts]
        return prompts, body, Owner(scope, tenant_tag(key, tenant), body.urgency(otherwise))

    return work


def _placed(prompt: Prompt, state: ApiState) -> Prompt:
    text = PromptText(state.tokenizer, prompt.encoded.token_ids, prompt.texts)
    return replace(prompt, placed=text)


def _plan(
    body: Generation,
    prompts: Sequence[Prompt],
    owner: Owner,
    model: ServedModel,
    kind: type[_Chat] | type[_Text],
    state: ApiState,
    started_s: float,
    kept: Kept | None,
) -> Answer:
    """From checked parts to what will run. Raises for what does not fit the model."""
    answer_id = kind.id_prefix + secrets.token_hex(16) if kept is None else kept.answer_id
    choices: list[Choice] = []
    for prompt in prompts:
        first = len(choices)
        choices += _choices(body, prompt, owner, model, kind, state, answer_id, first, kept)
    trace.note(gen_ai__request__model=model.name, gen_ai__response__id=answer_id)
    logs.remember(answer_id=answer_id)
    return Answer(
        answer_id=answer_id,
        choices=choices,
        render=kind.render(
            answer_id=answer_id,
            created=int(time.time()) if kept is None else kept.created,
            model=model,
            include_usage=body.include_usage,
            choices=len(choices),
            top_logprobs=body.asked_logprobs,
        ),
        meter=state.telemetry.request(
            kind.endpoint,
            started_s,
            max_tokens=choices[0].request.stop.max_tokens,
            choices=len(choices),
        ),
        stream=bool(body.stream),
        keep_alive_s=state.config.keep_alive_s,
        timeout_s=state.config.request_timeout_s,
        kept=kept,
    )


def _choices(
    body: Generation,
    prompt: Prompt,
    owner: Owner,
    model: ServedModel,
    kind: type[_Chat] | type[_Text],
    state: ApiState,
    answer_id: str,
    first: int,
    kept: Kept | None,
) -> list[Choice]:
    """The answers to one prompt, the first with index `first`."""
    encoded, ids = prompt.encoded, tuple(prompt.encoded.token_ids)
    seed = secrets.randbits(63) if kept is None else kept.seed
    sampling = body.sampling(state.sampling_defaults, seed)
    stop = body.stop_rule(_max_tokens(body, len(ids), model.max_model_len, kind, state))
    tokenizer = state.tokenizer if state.has_tokenizer else None
    if sampling.logit_bias and tokenizer is not None:
        highest = sampling.logit_bias[-1][0]
        if highest >= tokenizer.vocab_size:
            raise InvalidRequestError(
                f"logit_bias names token {highest}, outside the vocabulary of "
                f"{tokenizer.vocab_size}",
                param="logit_bias",
            )
    # An end token that does not end the answer is a token like any other.
    ends = frozenset[int]() if body.ignore_eos or tokenizer is None else tokenizer.eos_ids
    logprobs = body.asked_logprobs
    return [
        Choice(
            index=first + number,
            leads=number == 0,
            request=nouns.Request(
                # Not the client's X-Request-Id: leases belong to this id, so nobody else may
                # choose it.
                request_id=f"{answer_id}-{first + number}" if first + number else answer_id,
                token_ids=ids,
                namespace=owner.namespace,
                sampling=replace(sampling, choice=number),
                stop=stop,
                boundaries=encoded.boundaries,
                evidence=bool(body.evidence) or body.grounding == "strict",
                logits_digest=bool(body.logits_digest),
                top_logprobs=logprobs,
                grammar=prompt.grammar,
                resume=nouns.BEGINNING if kept is None else kept.resume,
                kept=kept is not None,
                tenant=owner.tenant,
                priority=owner.priority,
            ),
            evidence=(
                EvidenceText(tokenizer, ids, prompt.placed, names_message=kind is _Chat)
                if body.evidence
                else None
            ),
            grounding=_grounding(body, encoded, state),
            tokens=TokenRecord() if body.logits_digest else None,
            parts=None if encoded.answer.plain else AnswerParts(encoded.answer),
            logprobs=None if logprobs is None else Logprobs(tokenizer, ends=ends),
            echo=prompt.echo,
        )
        for number in range(body.n or 1)
    ]


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
            f"shorten it by {prompt_tokens - context + 1} tokens or more",
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
