"""10,000 requests that nobody means: damaged bodies to every endpoint that takes one. None may be
answered with a failure of the server's own, and none may leave anything behind.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

from api_harness import chat, make_api

REQUESTS = 10_000
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        chat(max_tokens=2),
        chat(max_tokens=2, n=2, logprobs=True, top_logprobs=3, logit_bias={"97": 3.5}, stop=["x"]),
        chat(
            max_tokens=2,
            stream=True,
            stream_options={"include_usage": True},
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"properties": {"a": {"enum": [1, "b"]}}}},
            },
        ),
        chat(max_tokens=2, evidence=True, cache_salt="s", seed=-3, temperature=0.5, top_p=0.9),
    ],
    "/v1/completions": [
        {"model": "fake", "prompt": ["ab", "c"], "max_tokens": 2, "echo": True},
        {"model": "fake", "prompt": [[97, 98]], "max_tokens": 2, "logprobs": 2, "best_of": 1},
    ],
    "/tokenize": [{"prompt": "ab"}, {"messages": chat()["messages"]}],
    "/detokenize": [{"tokens": [97, 98]}],
}
ODD: list[Any] = [None, True, -1, 0, 2**31, 2**63, 2**64, 1e308, "", "\x00", "a" * 999, [], {}]
ODD += [[[]], {"": {}}, "\ud83d", [None], "fake", {"type": "json_schema"}, {"role": "user"}]


def damaged(value: Any, draw: random.Random) -> Any:
    """`value` with one place changed, somewhere inside."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        if draw.random() < 0.15:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: damaged(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], damaged(value[at], draw), *value[at + 1 :]]
    return draw.choice(ODD)


def bytes_of(body: Any, draw: random.Random) -> bytes:
    """The body as JSON, a third of the time with some bytes lost, doubled or changed."""
    raw = bytearray(json.dumps(body).encode())
    if draw.random() < 0.33:
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(raw) + 1)
            raw[at : at + draw.randint(0, 9)] = draw.randbytes(draw.randint(0, 3))
    return bytes(raw)


async def test_no_malformed_request_is_a_failure_of_the_servers() -> None:
    api, draw, seen = make_api(), random.Random(20261127), Counter[int]()
    paths = sorted(BODIES)
    async with api.client() as client:
        for _ in range(REQUESTS):
            path = draw.choices(paths, [1, 1, 4, 2])[0]
            body: Any = draw.choice(BODIES[path])
            for _ in range(draw.randint(1, 3)):
                body = damaged(body, draw)
            raw = bytes_of(body, draw)
            answer = await client.post(path, content=raw)
            seen[answer.status_code] += 1
            assert answer.status_code in (200, 400, 404), (path, raw, answer.text)
            assert "internal_error" not in answer.text, (path, raw)
            assert "Traceback" not in answer.text, (path, raw)
    print(f"{REQUESTS} damaged requests: {dict(seen)}")
    assert seen[400] > REQUESTS // 2
    assert api.service.opened == api.service.closed
    assert api.app.state.penstock._streams == 0
