"""schemathesis against our own OpenAPI document: every operation, with requests that fit the
document and with requests that do not, in process. What comes back must be what the document says.
"""

from __future__ import annotations

import asyncio
import copy
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import requests
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import load_all_checks, not_a_server_error
from schemathesis.core.failures import FailureGroup
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    missing_required_header,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from cluster.api import create_app
from cluster.api.fake_service import FakeService
from cluster.batch.lines import Inside
from cluster.batch.room import BatchRoom
from cluster.batch.surroundings import Surroundings
from cluster.config import BatchSection, FrontSection
from kvstore.config import StoreConfig
from kvstore.server import start_server
from penstock.chat import PlainChat
from penstock.telemetry import Telemetry
from penstock.tokenizer import ByteTokenizer

CASES = 2_000
BODY_CASES, OTHER_CASES = 110, 40
"""Of each operation and mode; operations without parameters have fewer different ones."""
KEY = "sk-of-the-tests"


def negative_data_is_rejected(context: Any, response: Any, case: Any) -> bool | None:
    """`negative_data_rejection` for faults that are sent: an empty list in a form is no field."""
    if case.media_type == "multipart/form-data" and isinstance(case.body, dict):
        sent = all(value not in ([], {}, None) for value in case.body.values())
    else:
        sent = True
    return negative_data_rejection(context, response, case) if sent else None


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    response_headers_conformance,
    negative_data_is_rejected,
    missing_required_header,
    allow_header_conformance,
]
# Left out: positive_data_acceptance, as no schema says which models and files there are and which
# fields exclude each other. ignored_auth is `test_every_closed_operation_wants_the_key`.
# use_after_free and ensure_resource_availability are for chains of calls, which tests/cluster/batch
# makes; unsupported_method is for the coverage phase. Neither is run.


@asynccontextmanager
async def front(folder: Path) -> AsyncIterator[FastAPI]:
    """All of the API, with files and batches, closed by a key."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    config = BatchSection(journal_url=f"sqlite:///{folder}/journal.db", grpc_port=port)
    store = await start_server(StoreConfig())

    def open_batch(around: Surroundings, inside: Inside) -> BatchRoom:
        return BatchRoom(config, around, lambda: grpc.aio.insecure_channel(store.address), inside)

    tokenizer = ByteTokenizer()
    app = create_app(
        FakeService(max_model_len=128),
        tokenizer=tokenizer,
        chat=PlainChat(tokenizer),
        config=FrontSection(api_key=KEY, default_max_tokens=4, keep_alive_s=0.1),
        telemetry=Telemetry(),
        batch=open_batch,
    )
    try:
        async with app.router.lifespan_context(app):
            yield app
    finally:
        await store.stop(0.1)


class Door:
    """The app, for a caller that is not async. One event loop for all requests."""

    def __init__(self, folder: Path) -> None:
        self.runner = asyncio.Runner()
        self._front = front(folder)
        self.app = self.runner.run(self._front.__aenter__())
        transport = httpx.ASGITransport(self.app)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://api")

    def operations(self, document: dict[str, Any]) -> list[Any]:
        schema = schemathesis.openapi.from_dict(document)
        return [found.ok() for found in schema.get_all_operations()]

    def narrowed(self) -> dict[str, Any]:
        """The document with values that exist here, so that what comes next is reached, too."""
        document = copy.deepcopy(self.app.openapi())
        lines = b'{"custom_id":"a","method":"POST","url":"/v1/completions",'
        lines += b'"body":{"model":"fake","prompt":"a"}}\n'
        file_id = self._created("/v1/files", data={"purpose": "batch"}, files={"file": lines})
        asked = {"input_file_id": file_id, "endpoint": "/v1/completions"}
        batch_id = self._created("/v1/batches", json={**asked, "completion_window": "24h"})
        asked = {"model": "fake", "prompt": "a", "max_tokens": 1}
        route_id = self._created("/v1/completions", json=asked)
        parts = document["components"]["schemas"]
        for name in ("ChatBody", "CompletionBody"):
            parts[name]["properties"]["model"] = {"enum": ["fake"]}
            parts[name]["required"] = [*parts[name]["required"], "max_tokens"]
            parts[name]["properties"]["max_tokens"] = {"enum": [1, 2, 8]}
        said = {"role": {"enum": ["user", "system"]}, "content": {"type": "string", "maxLength": 9}}
        message = {"type": "object", "required": ["role", "content"], "properties": said}
        messages = {"type": "array", "minItems": 1, "maxItems": 3, "items": message}
        parts["ChatBody"]["properties"]["messages"] = messages
        parts["BatchBody"]["properties"]["input_file_id"] = {"enum": [file_id]}
        known = {
            "file_id": [file_id, "file-output-x"],
            "batch_id": [batch_id],
            "model_id": ["fake"],
            "request_id": [route_id],
        }
        for methods in document["paths"].values():
            for operation in methods.values():
                for parameter in operation.get("parameters", ()):
                    if parameter["in"] == "path":
                        parameter["schema"] = {"enum": known[parameter["name"]]}
        # Deleting comes last: it would take away what the others read.
        paths = document["paths"]
        paths["/v1/files/{file_id}"] = paths.pop("/v1/files/{file_id}")
        return document

    def _created(self, path: str, **sent: Any) -> str:
        headers = {"authorization": f"Bearer {KEY}"}
        answer = self.runner.run(self.client.post(path, headers=headers, **sent))
        assert answer.status_code == 200, answer.text
        made: str = answer.json()["id"]
        return made

    def send(self, case: Any) -> httpx.Response:
        """The bytes that schemathesis itself would send."""
        given = case.as_transport_kwargs(base_url="http://api")
        known = {"method", "url", "headers", "files", "data", "params", "cookies", "json"}
        ready = requests.Request(**{k: v for k, v in given.items() if k in known}).prepare()
        body = ready.body.encode() if isinstance(ready.body, str) else ready.body
        return self.runner.run(
            self.client.request(
                str(ready.method),
                str(ready.url),
                headers=dict(ready.headers),
                content=body,
            )
        )

    def close(self) -> None:
        self.runner.run(self.client.aclose())
        self.runner.run(self._front.__aexit__(None, None, None))
        self.runner.close()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    load_all_checks()
    door = Door(tmp_path)
    yield door
    door.close()


@pytest.mark.timeout(180)
def test_the_server_does_what_its_document_says(door: Door) -> None:
    seen: Counter[tuple[str, int]] = Counter()
    key = {"Authorization": f"Bearer {KEY}"}
    faults: list[str] = []
    served: set[str] = set()

    def holds(operation: Any, mode: GenerationMode, most: int, checks: list[Any]) -> None:
        @settings(
            max_examples=most,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )
        @given(case=operation.as_strategy(generation_mode=mode, headers=key))
        def check(case: Any) -> None:
            answer = door.send(case)
            seen[mode.value, answer.status_code] += 1
            if answer.status_code == 200:
                served.add(operation.label)
            case.validate_response(answer, checks=checks)

        check()

    # What only the narrowing forbids (a text of ten characters), the server rightly accepts.
    narrow = [check for check in CHECKS if check is not negative_data_is_rejected]
    for document, checks in ((door.app.openapi(), CHECKS), (door.narrowed(), narrow)):
        for operation in door.operations(document):
            most = BODY_CASES if operation.body else OTHER_CASES
            modes = [GenerationMode.POSITIVE]
            # Any text is an id that might be: paths alone cannot be wrong.
            modes += [GenerationMode.NEGATIVE] if operation.body or operation.query else []
            for mode in modes:
                try:
                    holds(operation, mode, most, checks)
                except (Exception, FailureGroup) as error:
                    faults.append(f"{operation.label} {mode.value}: {error!r} {error}")
    total = sum(seen.values())
    print(f"{total} cases: {dict(sorted(seen.items()))}")
    assert not faults, "\n\n".join(faults)
    assert total >= CASES
    assert served == {operation.label for operation in door.operations(door.app.openapi())}
    assert seen["positive", 200] > 300
    assert seen["negative", 400] > 100


def test_every_closed_operation_wants_the_key(door: Door) -> None:
    closed = 0
    for operation in door.operations(door.app.openapi()):
        declared = operation.definition.raw.get("security")
        path = operation.path.replace("{", "").replace("}", "")
        answer = door.runner.run(door.client.request(operation.method.upper(), path))
        if declared:
            assert declared == [{"bearer": []}]
            assert answer.status_code == 401, operation.label
            closed += 1
        else:
            assert answer.status_code == 200, operation.label
    assert closed >= 15
