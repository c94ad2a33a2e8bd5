"""The page in a real browser, against the real endpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.serve.conftest import KEYS, Running, idle

pytestmark = pytest.mark.browser
QUESTION = "What cheese do you have?"
SECONDS = 60_000


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    found = browser.new_context(viewport={"width": 1200, "height": 800})
    found.set_default_timeout(SECONDS)
    expect.set_options(timeout=SECONDS)
    yield found
    found.close()


@pytest.fixture
def page(context: BrowserContext) -> Iterator[Page]:
    """Fails when the page logs an error, or asks anybody but the endpoint for anything."""
    found, wrong = context.new_page(), list[str]()
    found.on("pageerror", lambda error: wrong.append(str(error)))
    found.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    hosts: set[str] = set()
    found.on("request", lambda request: hosts.add(request.url.split("/")[2]))
    yield found
    assert not [text for text in wrong if "401" not in text], wrong  # Chromium logs a refused key by itself
    assert all(host.startswith("127.0.0.1:") for host in hosts if host)


def said(page: Page, pane: int) -> str:
    return page.locator(f"#log-{pane} .said").last.inner_text()


def ask(page: Page, text: str = QUESTION) -> None:
    page.get_by_label("Your question").fill(text)
    page.keyboard.press("Enter")


def done(page: Page) -> None:
    expect(page.get_by_role("button", name="Ask")).to_be_enabled()


def test_two_models_answer_side_by_side(page: Page, open_endpoint: Running) -> None:
    page.goto(open_endpoint.url)
    expect(page.get_by_label("Your question")).to_be_focused()
    page.get_by_role("combobox", name="First model").select_option("embedded")
    page.get_by_role("combobox", name="Second model").select_option("acme/cheese")
    ask(page)
    done(page)
    client = open_endpoint.client()
    for pane, model in ((1, "base"), (2, "acme/cheese")):
        whole = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=256
        )
        assert said(page, pane) == (whole.choices[0].message.content or "").strip()
        facts = page.locator(f"#speed-{pane}").inner_text().split("\n")
        found = dict(zip(facts[::2], facts[1::2], strict=True)) if len(facts) == 6 else {}
        assert whole.usage is not None
        assert found["tokens"] == str(whole.usage.completion_tokens)
        assert float(found["tokens/s"]) > 0
        assert found["first token"].endswith("s")
    told = page.locator("#told").inner_text()
    assert "embedded finished." in told
    assert "acme/cheese finished." in told


def test_it_streams(page: Page, open_endpoint: Running) -> None:
    """The text grows while the answer is made, and the conversation goes on from it."""
    page.goto(open_endpoint.url)
    page.get_by_role("combobox", name="Second model").select_option("")
    expect(page.locator("#panes")).to_have_class("single")
    page.get_by_text("How it answers").click()
    page.get_by_label("Temperature").fill("1.5")
    page.get_by_label("Tokens at most").fill("800")
    lengths = set()
    for _ in range(5):
        ask(page, "Tell me a long story.")
        while page.get_by_role("button", name="Stop").is_enabled():
            lengths.add(len(said(page, 1)))
        if len(lengths) > 3:
            break
    assert len(lengths) > 3


def test_escape_stops_and_the_engine_with_it(page: Page, open_endpoint: Running) -> None:
    page.goto(open_endpoint.url)
    page.get_by_role("combobox", name="Second model").select_option("acme/brie")
    page.get_by_text("How it answers").click()
    page.get_by_label("Temperature").fill("2")
    page.get_by_label("Tokens at most").fill("900")
    for _ in range(20):  # until one answer is long enough
        ask(page, "Tell me everything.")
        page.wait_for_timeout(150)
        if page.get_by_role("button", name="Stop").is_enabled():
            page.keyboard.press("Escape")
        done(page)
        if page.locator(".cut").count():
            break
    assert page.locator(".cut").count()
    for _ in range(100):
        if idle(open_endpoint.engine):
            break
        page.wait_for_timeout(50)
    assert idle(open_endpoint.engine)


def test_a_conversation_goes_on_and_begins_anew(page: Page, open_endpoint: Running) -> None:
    bodies: list[Any] = []
    page.on("request", lambda r: bodies.append(r.post_data_json) if r.url.endswith("completions") else None)
    page.goto(open_endpoint.url)
    page.get_by_role("combobox", name="Second model").select_option("")
    for text in ("First.", "Second."):
        ask(page, text)
        done(page)
    assert [turn["role"] for turn in bodies[-1]["messages"]] == ["user", "assistant", "user"]
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".said").count() == 0
    page.get_by_text("How it answers").click()
    page.get_by_label("System message").fill("Be brief.")
    ask(page, "Third.")
    done(page)
    assert [turn["role"] for turn in bodies[-1]["messages"]] == ["system", "user"]


def test_keys(page: Page, closed_endpoint: Running) -> None:
    page.goto(closed_endpoint.url)
    expect(page.get_by_text("This endpoint wants a key.")).to_be_visible()
    page.get_by_label("Key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_text("This key is not known, or no longer.")).to_be_visible()
    page.get_by_label("Key").fill(KEYS["acme"])
    page.keyboard.press("Enter")
    expect(page.locator("#model-1 option")).to_have_text(["embedded", "brie", "cheese", "shared/common"])
    expect(page.locator("#keys")).to_be_hidden()
    ask(page)
    done(page)
    assert said(page, 1)
    assert KEYS["acme"] not in page.content()
    page.reload()
    expect(page.locator("#model-1 option")).to_have_count(4)


def test_an_error_is_shown_and_told(browser: Browser, open_endpoint: Running) -> None:
    context = browser.new_context()  # not the fixture's: Chromium logs the 400 as an error of the page
    page = context.new_page()
    page.goto(open_endpoint.url)
    page.get_by_role("combobox", name="Second model").select_option("")
    page.get_by_label("Your question").fill("x " * 2000)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#log-1 .wrong")).to_contain_text("context is", timeout=SECONDS)
    expect(page.locator("#told")).to_contain_text("embedded failed")
    context.close()


def test_by_keyboard_alone(page: Page, open_endpoint: Running) -> None:
    page.goto(open_endpoint.url)
    expect(page.get_by_label("Your question")).to_be_focused()
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    assert page.get_by_label("Your question").input_value() == "Hello\nthere"
    page.keyboard.press("Tab")
    expect(page.get_by_role("button", name="Ask")).to_be_focused()
    page.keyboard.press("Enter")
    done(page)
    assert said(page, 1)
    seen = []
    for _ in range(14):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement && document.activeElement.id"))
    assert {"model-1", "model-2", "log-1", "log-2", "prompt"} <= set(seen)


@pytest.mark.parametrize(("width", "scheme"), [(360, "light"), (360, "dark"), (1200, "dark"), (2400, "light")])
def test_it_fits_and_can_be_read(browser: Browser, open_endpoint: Running, width: int, scheme: Any) -> None:
    context = browser.new_context(viewport={"width": width, "height": 700}, color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(open_endpoint.url)
    page.locator("#model-1 option").first.wait_for(state="attached")
    wide = page.evaluate("document.documentElement.scrollWidth > document.documentElement.clientWidth")
    assert not wide, "nothing is cut off at the side"
    contrasts = page.evaluate(_CONTRASTS)
    assert contrasts
    assert min(contrasts.values()) >= 4.5, contrasts  # WCAG 2.2, 1.4.3
    unnamed = page.evaluate(_UNNAMED)
    assert not unnamed
    context.close()


_CONTRASTS = """() => {
  const light = (text) => {
    const [r, g, b] = text.match(/[\\d.]+/g).map(Number).map((v) => {
      v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (e) => {
    for (; e; e = e.parentElement) {
      const c = getComputedStyle(e).backgroundColor;
      if (c !== "rgba(0, 0, 0, 0)") return c;
    }
    return "rgb(255, 255, 255)";
  };
  const found = {};
  for (const e of document.querySelectorAll("h1, h2, p, label, button:enabled, select, summary, input, textarea")) {
    if (!e.offsetParent) continue;
    const [a, b] = [light(getComputedStyle(e).color), light(ground(e))].sort((x, y) => y - x);
    found[e.tagName + "#" + e.id] = (a + 0.05) / (b + 0.05);
  }
  return found;
}"""
_UNNAMED = """() => [...document.querySelectorAll("input, select, textarea, button")]
  .filter((e) => !(e.labels && e.labels.length) && !e.getAttribute("aria-labelledby") && !e.textContent.trim())
  .map((e) => e.outerHTML)"""
