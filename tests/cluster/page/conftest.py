"""A real headless Chromium, and the page's app under a real server in a thread.

Debian's `chromium` (or any Chrome) on the PATH is used; nothing is downloaded.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn

from tests.cluster.api.api_harness import Api, make_api, no_signals

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@dataclass
class Site:
    """The app over `FakeService`. Its plan may be changed at any time."""

    api: Api
    url: str = ""
    stop: Callable[[], None] = field(default=lambda: None)

    def say(self, answer: str, *, content: str, read: str, mass: float = 0.9) -> None:
        """The model answers so, one token a character, and attends to `read` in the message."""
        start = len(b"user: ") + len(content[: content.index(read)].encode())
        span = (start, start + len(read.encode()), mass)
        self.api.service.plan.answer = [(ord(c) % 256, c) for c in answer]
        self.api.service.plan.answer_evidence = (span,)


def start_site(**front: Any) -> Site:
    ready = threading.Event()
    site = Site(make_api(**{"max_body_bytes": 16 << 20, **front}, context=1 << 23))
    config = uvicorn.Config(site.api.app, host="127.0.0.1", port=0, log_level="warning")
    server = uvicorn.Server(config)

    async def run() -> None:
        task = asyncio.create_task(server.serve())
        while not server.started:  # noqa: ASYNC110  uvicorn has no event for it
            await asyncio.sleep(0.01)
        site.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        ready.set()
        await task

    def serve() -> None:
        with no_signals(server):
            asyncio.run(run())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    assert ready.wait(20)

    def stop() -> None:
        server.should_exit = True
        server.force_exit = True
        thread.join(20)

    site.stop = stop
    return site


@pytest.fixture
def site() -> Iterator[Site]:
    site = start_site()
    yield site
    site.stop()


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    # Not for the session: while it is open the main thread's event loop counts as running.
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install '.[test]'"
    )
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip("no Chromium on the PATH: apt-get install --no-install-recommends chromium")
    with playwright.sync_playwright() as p:
        # A container's user namespaces are often closed to it; the page under test is our own.
        browser = p.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Tab:
    """A page that fails the test for any request to elsewhere and any script error."""

    page: Any
    elsewhere: list[str]
    errors: list[str]

    def settled(self) -> None:
        self.page.wait_for_selector(".card")
        self.page.wait_for_selector(".card.busy", state="detached", timeout=20_000)


@pytest.fixture
def open_tab(chromium: Any) -> Iterator[Callable[..., Tab]]:
    opened: list[tuple[Any, Tab]] = []

    def open_(site: Site, path: str = "/", **options: Any) -> Tab:
        context = chromium.new_context(viewport={"width": 1280, "height": 800}, **options)
        context.set_default_timeout(10_000)
        page = context.new_page()
        tab = Tab(page, [], [])

        def check(route: Any) -> None:
            if route.request.url.startswith(site.url + "/"):
                route.continue_()
            else:
                tab.elsewhere.append(route.request.url)
                route.abort()

        context.route("**/*", check)
        page.on("pageerror", lambda error: tab.errors.append(str(error)))
        page.on(
            "console",
            lambda line: tab.errors.append(line.text) if "Content Security" in line.text else None,
        )
        page.goto(site.url + path)
        opened.append((context, tab))
        return tab

    yield open_
    for context, tab in opened:
        context.close()
        assert tab.elsewhere == []
        assert tab.errors == []
