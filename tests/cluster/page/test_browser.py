"""The page in a real browser: asking, evidence, the cluster, keys, keyboard, hostile text."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.auth.key_file import add_key
from cluster.auth.keys import new_key
from penstock.errors import OverloadedError, StoreUnavailableError
from tests.cluster.page.conftest import Site, Tab, start_site

Open = Callable[..., Tab]
TEXT = "Some filler before it. the code of bakilo is 4821. And some more behind it.\nA second line."
HOSTILE = (
    "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
    "<svg onload=\"document.title='pwned'\">&lt;b&gt;</textarea>"
    "<iframe srcdoc='<script>1</script>'>"
)
DROP = """(pane, [name, content]) => {
  const data = new DataTransfer();
  data.items.add(new File([content], name));
  const how = {dataTransfer: data, bubbles: true, cancelable: true};
  const kinds = ["dragenter", "dragover", "drop"];
  for (const kind of kinds) pane.dispatchEvent(new DragEvent(kind, how));
}"""


def ask(tab: Tab, text: str, question: str) -> None:
    edit = tab.page.locator("#document-edit")
    if edit.is_visible():
        edit.click()
    tab.page.fill("#document-text", text)
    tab.page.fill("#question", question)
    tab.page.press("#question", "Enter")


def test_an_answer_streams_in_and_its_evidence_is_marked_in_the_document(
    site: Site, open_tab: Open
) -> None:
    site.say("4821", content=TEXT, read="is 4821.")
    site.api.service.plan.cached_tokens = 64
    tab = open_tab(site)
    ask(tab, TEXT, "What is the code of bakilo?")
    tab.settled()
    page = tab.page
    assert page.inner_text(".answer-text") == "4821"
    assert page.locator("mark").all_inner_texts() == ["is 4821."]
    # The document is all there, marks or not.
    assert page.locator("#document-read").evaluate("e => e.textContent") == TEXT
    quote = page.inner_text(".span .quote")
    assert "the code of bakilo is 4821. And" in quote
    assert page.inner_text(".weight-text") == "90 %"
    # The bar says what `usage` said.
    prompt = len(f"user: {TEXT}\n\nQuestion: what is the code of bakilo?\nassistant: ")
    legend = " ".join(page.inner_text(".legend").split())
    assert legend.startswith(f"cached 64 computed {prompt - 64} fetched {prompt}")
    share = page.locator(".bar-cached").evaluate("e => e.style.getPropertyValue('--share')")
    assert float(share) == pytest.approx(64 / prompt, abs=1e-4)
    sent = site.api.service.requests[-1]
    assert sent.evidence and sent.sampling.greedy
    assert page.inner_text("#model-name") == "fake"


def test_characters_outside_the_basic_plane_do_not_shift_the_marks(
    site: Site, open_tab: Open
) -> None:
    text = "\U0001f3db\U0001f3db\u00e9 na\u00efve \U0001f600 bakilo is 4821. \U0001f600 e"
    site.say("4821", content=text, read="is 4821. \U0001f600")
    tab = open_tab(site)
    ask(tab, text, "what is the code of bakilo?")
    tab.settled()
    assert tab.page.locator("mark").all_inner_texts() == ["is 4821. \U0001f600"]


def test_markup_in_document_question_answer_and_error_is_only_text(
    site: Site, open_tab: Open
) -> None:
    text = f"{HOSTILE} {TEXT} {HOSTILE}"
    site.say(f"<b>4821</b>{HOSTILE}", content=text, read="is 4821.")
    site.api.service.plan.answer_evidence += ((len(b"user: "), len(b"user: ") + 60, 0.5),)
    tab = open_tab(site)
    page = tab.page
    page.fill("#max-tokens", "1000")
    ask(tab, text, HOSTILE)
    tab.settled()
    assert page.locator(".answer-text").evaluate("e => e.textContent") == f"<b>4821</b>{HOSTILE}"
    assert page.locator("#document-read").evaluate("e => e.textContent") == text
    assert page.locator(".card-question").first.evaluate("e => e.textContent") == HOSTILE
    site.api.service.plan.refuse = OverloadedError(HOSTILE)
    ask(tab, text, "again?")
    page.wait_for_selector(".card.failed")
    assert page.locator(".badge.bad").evaluate("e => e.textContent") == HOSTILE
    for made in ("img[src=x]", "iframe", "svg[onload]", ".card script", ".reader script", "b"):
        assert page.locator(made).count() == 0
    assert page.title() == "Penstock"


def test_the_policy_stops_a_script_that_gets_in_all_the_same(site: Site, open_tab: Open) -> None:
    tab = open_tab(site)
    ways = (
        "e => { e.innerHTML = '<img src=x onerror=1>'; }",
        "e => { e.setAttribute('onclick', '1'); }",
        "e => { const s = document.createElement('script'); s.text = '1'; }",
        "e => { const s = document.createElement('script'); s.src = 'https://evil.example/x.js'; }",
    )
    body = tab.page.locator("body")
    for way in ways:
        with pytest.raises(Exception, match="requires 'Trusted"):
            body.evaluate(way)
    style = "e => { const s = document.createElement('style'); s.append('body{display:none}');"
    body.evaluate(style + " document.head.append(s); }")
    assert body.is_visible()
    tab.page.wait_for_timeout(200)
    assert any("style-src" in error for error in tab.errors)
    tab.errors.clear()


def test_reading_shows_its_progress_and_can_be_stopped(site: Site, open_tab: Open) -> None:
    # Six chunks: long enough to be stopped on a busy machine, too.
    text = TEXT * 120
    site.api.service.plan.prefill_pause_s = 3.0
    tab = open_tab(site)
    ask(tab, text, "what is the code of bakilo?")
    tab.page.wait_for_selector(".facts:has-text('Reading: ')")
    tab.page.click("#stop")
    tab.settled()
    assert tab.page.inner_text(".badge.bad") == "Stopped"
    until = time.monotonic() + 5
    while site.api.service.closed < site.api.service.opened and time.monotonic() < until:
        time.sleep(0.05)
    assert site.api.service.closed == site.api.service.opened == 1
    assert tab.page.locator("#ask").is_visible()


def test_strict_grounding_is_shown_as_what_it_is(site: Site, open_tab: Open) -> None:
    site.api.app.state.penstock.chat.refusal = "UNKNOWN"
    tab = open_tab(site)
    tab.page.check("#strict")
    for said, shown, verdict in (
        ("4821", "4821", "Contained in its evidence"),
        ("4822", "UNKNOWN", "Withheld"),
        ("UNKNOWN", "UNKNOWN", "The model's own refusal"),
    ):
        site.say(said, content=TEXT, read="is 4821.")
        ask(tab, TEXT, f"{said}?")
        tab.settled()
        assert tab.page.locator(".answer-text").first.inner_text() == shown
        assert verdict in tab.page.locator(".badge").first.inner_text()


def test_a_list_entry_leads_to_its_place_in_a_long_document(site: Site, open_tab: Open) -> None:
    before = "".join(f"Line {n} of a long document with nothing in it.\n" for n in range(60_000))
    text = before + TEXT + before
    assert len(text) > 5_000_000
    site.say("4821", content=text, read="is 4821.")
    tab = open_tab(site)
    began = time.monotonic()
    tab.page.locator("#document-pane").evaluate(DROP, ["long.txt", text])
    tab.page.wait_for_selector("#document-read:has-text('Line 0 of')")
    tab.page.fill("#question", "what is the code of bakilo?")
    tab.page.press("#question", "Enter")
    tab.settled()
    print(f"{len(text)} characters: answered and marked in {time.monotonic() - began:.1f} s")
    mark = tab.page.locator("mark")
    assert mark.all_inner_texts() == ["is 4821."]
    tab.page.locator("#document-read").evaluate("e => { e.scrollTop = 0; }")
    tab.page.click(".span")
    tab.page.wait_for_timeout(1500)
    box, pane = mark.bounding_box(), tab.page.locator("#document-read").bounding_box()
    assert pane["y"] <= box["y"] <= pane["y"] + pane["height"]


def test_a_dropped_file_is_read_and_what_is_no_text_is_refused(site: Site, open_tab: Open) -> None:
    tab = open_tab(site)
    pane = tab.page.locator("#document-pane")
    pane.evaluate(DROP, ["notes.txt", "dropped text"])
    tab.page.wait_for_selector("#document-fact:has-text('12 characters')")
    assert tab.page.input_value("#document-text") == "dropped text"
    pane.evaluate(DROP, ["photo.png", "PNG\0\0"])
    tab.page.wait_for_selector("#document-notice:has-text('photo.png is not a text file')")
    assert tab.page.input_value("#document-text") == "dropped text"
    tab.page.set_input_files(
        "#document-file", {"name": "b.txt", "mimeType": "text/plain", "buffer": b"chosen"}
    )
    tab.page.wait_for_selector("#document-fact:has-text('6 characters')")


def test_the_example_can_be_asked_with_one_click(site: Site, open_tab: Open) -> None:
    tab = open_tab(site)
    tab.page.click("#document-try")
    text = tab.page.input_value("#document-text")
    facts = dict(re.findall(r"the code of ([a-z]+) is (\d{4})\.", text))
    assert len(facts) == 20
    names = [q.split()[-1].rstrip("?") for q in tab.page.locator(".chip").all_inner_texts()]
    assert [name in facts for name in names] == [True, True, True, False]
    tab.page.locator(".chip").first.click()
    tab.settled()
    sent = bytes(site.api.service.requests[-1].token_ids).decode()
    assert sent.endswith(f"\n\nQuestion: what is the code of {names[0]}?\nassistant: ")


def test_everything_can_be_done_with_the_keyboard(site: Site, open_tab: Open) -> None:
    site.say("4821", content=TEXT, read="is 4821.")
    tab = open_tab(site)
    page = tab.page
    focused = "() => document.activeElement.id || document.activeElement.className"

    def press(*keys: str) -> str:
        for key in keys:
            page.keyboard.press(key)
        return str(page.locator("body").evaluate(focused))

    assert press("Tab") == "skip"
    assert press("Tab") == "tab-ask"
    assert press("ArrowRight") == "tab-cluster"
    assert page.locator("#view-cluster").is_visible()
    assert press("Home") == "tab-ask"
    assert page.locator("#view-ask").is_visible()
    assert press("Tab", "Tab") == "document-text"
    page.keyboard.type(TEXT)
    assert press("Tab") == "question"
    page.keyboard.type("what is the code of bakilo?")
    press("Enter")
    tab.settled()
    for _ in range(12):
        if press("Tab") == "span":
            break
    press("Enter")
    assert page.locator("mark.current").inner_text() == "is 4821."


def test_a_server_with_keys_is_asked_with_the_key_and_the_tab_keeps_it_to_itself(
    open_tab: Open,
) -> None:
    site = start_site(api_key="correct")
    try:
        tab = open_tab(site)
        page = tab.page
        page.wait_for_selector("#key-bar:visible")
        page.fill("#key", "wrong")
        page.press("#key", "Enter")
        page.wait_for_selector("#key-hint:has-text('refused')")
        page.fill("#key", "correct")
        page.press("#key", "Enter")
        page.wait_for_selector("#status[data-kind=good]")
        assert page.locator("#key-bar").is_hidden()
        site.say("4821", content=TEXT, read="is 4821.")
        ask(tab, TEXT, "what?")
        tab.settled()
        assert page.inner_text(".answer-text") == "4821"
        kept = "() => [localStorage.length, sessionStorage.length, document.cookie, location.href]"
        assert page.locator("body").evaluate(kept) == [0, 0, "", f"{site.url}/"]
    finally:
        site.stop()


def test_the_cluster_view_is_live_and_asks_only_while_it_is_watched(
    site: Site, open_tab: Open
) -> None:
    asked: list[float] = []
    service = site.api.service
    inner = service.workers

    async def workers() -> list[Any]:
        asked.append(time.monotonic())
        return await inner()

    service.workers = workers  # type: ignore[method-assign]
    tab = open_tab(site, "/#cluster")
    page = tab.page
    page.wait_for_selector(".worker:has-text('decode-0')")
    assert page.locator(".worker h3").all_inner_texts() == ["Answers", "prefill-0", "decode-0"]
    page.wait_for_timeout(2500)
    assert 2 <= len(asked) <= 6
    points = page.locator(".area-generated").get_attribute("points") or ""
    assert len(points.split()) >= 4 and "NaN" not in points
    service.opened += 3
    page.wait_for_selector(".worker:has-text('3 running')")
    assert page.locator("#tiles .tile-value").nth(3).inner_text() == "6"
    service.opened -= 3

    async def lost() -> list[Any]:
        raise StoreUnavailableError("the store node with the worker directory cannot be reached")

    service.workers = lost  # type: ignore[method-assign]
    page.wait_for_selector("#cluster-notice:has-text('cannot be reached')")
    page.wait_for_selector("#status:has-text('Not ready')")
    page.wait_for_selector("#prefill-body:has-text('No worker')")
    service.workers = workers  # type: ignore[method-assign]
    page.wait_for_selector("#status:has-text('Ready')")
    page.click("#tab-ask")
    page.wait_for_timeout(300)
    before = len(asked)
    page.wait_for_timeout(1500)
    assert len(asked) == before


def test_a_server_that_goes_away_is_said_and_nothing_is_lost(open_tab: Open) -> None:
    site = start_site()
    tab = open_tab(site)
    tab.page.wait_for_selector("#status[data-kind=good]")
    site.api.service.plan.token_pause_s = 0.3
    site.say("4821 and more to come", content=TEXT, read="is 4821.")
    ask(tab, TEXT, "what?")
    tab.page.wait_for_selector(".answer-text:has-text('48')")
    site.stop()
    tab.page.wait_for_selector(".card.failed")
    assert tab.page.inner_text(".answer-text").startswith("48")
    assert tab.page.input_value("#document-text") == TEXT
    ask(tab, TEXT, "again?")
    tab.page.wait_for_selector(".badge:has-text('cannot be reached')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_against_wcag(site: Site, open_tab: Open, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="no axe installed")
    site.say("4821", content=TEXT, read="is 4821.")
    # Axe itself is a script from elsewhere; the policy is tested above.
    tab = open_tab(site, bypass_csp=True, color_scheme=scheme, reduced_motion="reduce")
    tab.page.wait_for_selector("#status[data-kind=good]")
    tab.page.click("#document-try")
    ask(tab, TEXT, "what is the code of bakilo?")
    tab.settled()
    found = []
    for view in ("ask", "cluster"):
        tab.page.click(f"#tab-{view}")
        tab.page.wait_for_timeout(400)
        results = axe.Axe().run(tab.page)
        found += [
            (view, each["id"], [node["target"] for node in each["nodes"]])
            for each in results.response["violations"]
        ]
    assert found == []
    tab.errors.clear()


def test_a_key_that_may_not_read_the_cluster_is_told_what_it_lacks(
    open_tab: Open, tmp_path: Path
) -> None:
    path = tmp_path / "keys.json"
    made = add_key(path, lambda taken: new_key(tenant="a", taken=taken, scopes=("generate",)))
    site = start_site(api_keys_file=str(path))
    try:
        page = open_tab(site).page
        page.fill("#key", made.text)
        page.press("#key", "Enter")
        page.wait_for_selector("#key-hint:has-text(\"no scope 'read'\")")
        assert page.locator("#key-bar").is_visible()
    finally:
        site.stop()
