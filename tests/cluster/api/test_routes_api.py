"""`GET /cluster/routes/{id}` and `penstock explain`: a tenant's own decisions, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from cluster.api import create_app
from cluster.api.fake_service import FakeService
from cluster.cli.main import main
from cluster.config import FrontSection
from penstock.chat import PlainChat
from penstock.telemetry import Telemetry
from penstock.tokenizer import ByteTokenizer

MINE, THEIRS = ({"authorization": f"Bearer {key}"} for key in ("mine", "theirs"))
SECRET = "the password is swordfish"


def client() -> httpx.AsyncClient:
    tokenizer = ByteTokenizer()
    app = create_app(
        FakeService(),
        tokenizer=tokenizer,
        chat=PlainChat(tokenizer),
        config=FrontSection(api_key="mine,theirs"),
        telemetry=Telemetry(),
    )
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://front")


async def test_a_tenant_sees_its_own_route_without_a_word_of_the_prompt(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with client() as http:
        asked = {"model": "fake", "prompt": SECRET, "max_tokens": 3, "cache_salt": "s"}
        answer = await http.post("/v1/completions", json=asked, headers=MINE)
        place = f"/cluster/routes/{answer.json()['id']}"
        told = await http.get(place, headers=MINE)
        assert told.status_code == 200
        found = told.json()
        assert found["facts"]["prompt_tokens"] == len(SECRET)
        assert {row["role"] for row in found["workers"]} == {"prefill", "decode"}
        assert "swordfish" not in told.text
        refused = await http.get(place, headers=THEIRS)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "route_not_found")
        assert (await http.get(place)).status_code == 401
        unknown = await http.get("/cluster/routes/chatcmpl-none", headers=MINE)
        assert unknown.json() == refused.json(), "another tenant's looks like none"
    file = tmp_path / "route.json"
    file.write_text(told.text)
    assert main(["explain", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "policy cost: prefill-0 and decode-0" in shown
    assert "* prefill-0" in shown
    assert main(["explain", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


@pytest.mark.parametrize(
    ("argument", "content", "told", "code"),
    [
        ("route.json", None, "neither a file nor the id", 2),
        ("route.json", "not json", "cannot be read as JSON", 2),
        ("route.json", "[]", "holds no route", 2),
        ("../../etc/passwd?", None, "neither a file nor the id", 2),
        ("chatcmpl-1", None, "does not answer as a Penstock server", 1),
    ],
)
def test_what_cannot_be_explained_is_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argument: str,
    content: str | None,
    told: str,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path(argument).write_text(content)
    assert main(["explain", argument, "--url", "http://127.0.0.1:9"]) == code
    assert told in capsys.readouterr().err
