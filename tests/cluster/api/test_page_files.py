"""The page's files over HTTP: what they may do, that they are whole, and that they ship."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from api_harness import Api, make_api

import cluster.api
from cluster.api.page import POLICY, Page

STATIC = Path(cluster.api.__file__).parent / "static"
NAMES = sorted(path.name for path in STATIC.iterdir())
SCRIPTS = [name for name in NAMES if name.endswith(".js")]


def path_of(name: str) -> str:
    return "/" if name == "index.html" else f"/page/{name}"


@pytest.mark.parametrize("name", NAMES)
async def test_every_file_comes_with_the_policy_and_is_not_sent_twice(
    client: httpx.AsyncClient, name: str
) -> None:
    answer = await client.get(path_of(name))
    assert answer.status_code == 200
    assert answer.content == (STATIC / name).read_bytes()
    assert answer.headers["content-security-policy"] == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    again = await client.get(path_of(name), headers={"if-none-match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    head = await client.head(path_of(name))
    assert (head.status_code, head.content) == (200, b"")


async def test_the_policy_allows_no_other_origin_and_nothing_inline() -> None:
    rules = dict(rule.split(" ", 1) for rule in POLICY.split("; "))
    assert rules.pop("default-src") == "'none'"
    assert {"'self'", "'none'", "'script'"} == {
        v for value in rules.values() for v in value.split()
    }


@pytest.mark.parametrize(
    "path", ["/page/none.js", "/page/index.html/..", "/page/..%2fapp.py", "/page/", "/page/%00"]
)
async def test_there_is_nothing_but_the_files(client: httpx.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "unknown_url"


@pytest.mark.parametrize("name", NAMES)
def test_a_file_needs_nothing_from_elsewhere(name: str) -> None:
    text = (STATIC / name).read_text(encoding="ascii")
    urls = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+[^\s\"')]*", text))
    assert urls <= {"http://www.w3.org/2000/svg"}
    for found in re.findall(r"""(?:from|import)\s*\(?["']([^"']+)["']""", text):
        assert found.removeprefix("./") in NAMES


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_can_make_markup_of_a_text(name: str) -> None:
    text = (STATIC / name).read_text()
    ways = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|srcdoc"
    assert not re.search(ways + r"|DOMParser|createContextualFragment|setHTMLUnsafe", text)
    assert not re.search(r"localStorage|sessionStorage|document\.cookie|indexedDB", text)


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed((STATIC / "index.html").read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_markup_is_labelled_and_has_nothing_inline() -> None:
    tags = Tags().tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    labelled = {attrs.get("for") for tag, attrs in tags if tag == "label"}
    inside_label = {"strict", "max-tokens"}
    for tag, attrs in tags:
        assert not any(name.startswith("on") or name == "style" for name in attrs)
        assert tag != "style"
        if tag == "script":
            assert attrs.get("src")
        for name in ("src", "href"):
            value = attrs.get(name)
            if value and not value.startswith("#"):
                assert value.removeprefix("/page/") in NAMES
        for name in ("aria-labelledby", "aria-controls"):
            assert attrs.get(name) in (None, *ids)
        if tag in ("input", "textarea", "select"):
            named = attrs.get("id") in labelled | inside_label or "aria-label" in attrs
            assert named or "aria-labelledby" in attrs


def test_every_element_that_a_script_asks_for_by_id_is_there() -> None:
    ids = {attrs["id"] for _, attrs in Tags().tags if "id" in attrs}
    for name in SCRIPTS:
        asked = set(re.findall(r"""byId\("([\w-]+)"\)""", (STATIC / name).read_text()))
        assert asked <= ids, name


async def test_the_page_is_open_and_what_it_shows_is_not() -> None:
    api: Api = make_api(api_key="secret")
    async with api.client() as client:
        for name in NAMES:
            assert (await client.get(path_of(name))).status_code == 200
        assert (await client.get("/cluster")).status_code == 401
        assert (await client.get("/v1/models")).status_code == 401
        key = {"Authorization": "Bearer secret"}
        assert (await client.get("/cluster", headers=key)).status_code == 200


def test_the_files_are_package_data() -> None:
    assert set(Page().files) == set(NAMES)
    import tomllib

    project = tomllib.loads((STATIC.parents[2] / "pyproject.toml").read_text())
    assert "api/static/*" in project["tool"]["setuptools"]["package-data"]["cluster"]
