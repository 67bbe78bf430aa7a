"""The page in a browser: headless Chromium, against a real server on loopback, mounted below a prefix."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from hermes_async import Engine, EngineConfig
from hermes_async.demo import MODEL_PATH
from tests.server.browser import CHROMIUM, PREFIX, OpenPage, chromium, serving

pytest.importorskip("playwright.sync_api", reason="the page's tests need Playwright's Python package")
if CHROMIUM is None:
    pytest.skip("the page's tests need the distribution's Chromium", allow_module_level=True)

LONG = 400
"""Tokens of an answer that is not complete before a test looks at it."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server of the demo model, in less memory than its weights take."""
    config = EngineConfig(num_loading_agents=2, max_tokens_per_sweep=16, max_sequences=4, kv_budget=3 << 20)
    with serving(Engine(MODEL_PATH, memory_budget=6 << 20, config=config), "demo") as url:
        yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as running:
        yield running


@pytest.fixture
def page(browser: Any, server: str) -> Iterator[OpenPage]:
    """The page; nothing may be said in its console."""
    page = OpenPage(browser, server)
    yield page
    page.context.close()
    assert page.said == []


def width_beyond_window(page: OpenPage) -> int:
    beyond: int = page.tab.evaluate("document.documentElement.scrollWidth - innerWidth")
    return beyond


def test_tokens_arrive_and_stages_and_memory_move(page: OpenPage) -> None:
    page.open()
    tab = page.tab
    assert tab.locator("#model").text_content() == "demo"
    assert tab.locator("#connection").text_content() == "live"
    tab.evaluate(
        """() => {
            window.strips = new Set();
            const cells = [...document.querySelectorAll("#strip .cell")];
            const look = () => strips.add(cells.map((cell) => cell.dataset.state).join(""));
            new MutationObserver(look).observe(document.querySelector("#strip"), {subtree: true, attributes: true});
        }"""
    )
    unused = tab.get_by_role("row", name="KV cache").text_content()
    answer = page.send("What is the news?")
    page.wait_for_text(answer)
    page.wait_for_text(answer, len(answer.locator(".text").text_content()))
    assert answer.get_attribute("data-state") == "running"
    tab.wait_for_function("() => strips.size > 5 && [...strips].some((strip) => strip.includes('c'))")
    assert tab.get_by_role("row", name="KV cache").text_content() != unused
    request = tab.locator("#requests .request")
    assert request.locator(".who").text_content() == "Conversation 1"
    assert f"of {LONG} tokens" in request.locator(".what").text_content()
    tab.wait_for_function("() => parseFloat(document.querySelector('.figure .value').textContent) > 0")
    assert re.match(r"Sweep \d+", tab.locator("#sweep").text_content())
    memory = page.snapshot()["memory"]
    names = ("weights_bytes", "ring_bytes", "kv_bytes", "workspace_bytes", "other_bytes", "free_bytes")
    assert sum(memory[name] for name in names) == memory["budget_bytes"] == 6 << 20
    bar = tab.locator(".scale-budget").bounding_box()
    last = tab.locator(".scale-budget .part:visible").last.bounding_box()
    assert last["x"] + last["width"] <= bar["x"] + bar["width"] + 1
    assert "resident" in tab.locator("#plan").text_content()


def test_stop_and_regenerate(page: OpenPage) -> None:
    answer = page.open().send("Who is there?")
    page.wait_for_text(answer)
    page.conversation().get_by_role("button", name="Stop").click()
    answer.get_by_text("stopped").wait_for()
    page.wait_until_idle()  # the engine has ended the request too
    assert page.snapshot()["requests"] == []
    assert page.tab.locator("#announcement").text_content() == "The answer in conversation 1 was stopped."
    stopped = answer.locator(".text").text_content()
    page.tab.fill("#max-tokens", "12")
    answer.get_by_role("button", name="Regenerate").click()
    page.wait_for_end()
    assert page.conversation().locator(".message").count() == 2
    assert page.answer().locator(".text").text_content() != stopped
    assert "at its limit" in page.answer().text_content()


def test_a_conversation_has_a_history_of_its_own(page: OpenPage) -> None:
    bodies: list[dict[str, Any]] = []
    page.tab.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    page.open().send("One.", max_tokens=3)
    page.wait_for_end()
    first = page.answer().locator(".text").text_content()
    page.tab.get_by_role("button", name="New conversation").click()
    page.tab.fill("#temperature", "0")
    page.send("Two.", 2, max_tokens=3)
    page.wait_for_end(2)
    page.send("Three.", 1, max_tokens=4)
    page.wait_for_end()
    messages = [[(message["role"], message["content"]) for message in body["messages"]] for body in bodies]
    assert messages[1] == [("user", "Two.")]
    assert messages[2] == [("user", "One."), ("assistant", first), ("user", "Three.")]
    assert [(body["temperature"], body["max_completion_tokens"]) for body in bodies] == [(0.8, 3), (0, 3), (0, 4)]


def test_two_conversations_share_the_sweeps(page: OpenPage) -> None:
    page.open()
    page.tab.get_by_role("button", name="New conversation").click()
    page.tab.fill("#max-tokens", str(LONG))
    page.conversation(2).get_by_role("textbox").fill("Speak.")
    page.conversation(2).get_by_role("button", name="Send to all").click()
    for number in (1, 2):
        page.wait_for_text(page.answer(number))
    assert [page.answer(number).get_attribute("data-state") for number in (1, 2)] == ["running", "running"]
    page.tab.locator("#requests .request").nth(1).wait_for()
    assert sorted(page.tab.locator("#requests .who").all_text_contents()) == ["Conversation 1", "Conversation 2"]
    page.conversation(2).get_by_role("button", name="Close").click()  # ends its answer
    page.tab.wait_for_function("() => document.querySelectorAll('#requests .request').length === 1")
    page.conversation(1).get_by_role("button", name="Stop").click()
    page.wait_until_idle()


def test_all_of_it_by_keyboard(page: OpenPage) -> None:
    page.open()
    page.tab.fill("#max-tokens", str(LONG))
    page.tab.locator("body").evaluate("() => document.activeElement.blur()")
    keyboard = page.tab.keyboard

    def tab_to(selector: str) -> None:
        for _ in range(20):
            keyboard.press("Tab")
            focused = page.tab.evaluate("(s) => document.activeElement.matches(s)", selector)
            outline = page.tab.evaluate("() => getComputedStyle(document.activeElement).outlineStyle")
            assert outline != "none" or page.tab.evaluate("() => document.activeElement === document.body")
            if focused:
                return
        pytest.fail(f"{selector} cannot be reached by Tab")

    tab_to("#strip")
    keyboard.press("ArrowRight")
    keyboard.press("ArrowRight")
    assert page.tab.locator("#stage-detail").text_content().startswith("model.")
    keyboard.press("Escape")
    tab_to("textarea")
    keyboard.type("Good morrow.")
    keyboard.press("Enter")
    page.wait_for_text(page.answer())
    keyboard.press("Escape")
    page.answer().get_by_text("stopped").wait_for()
    page.tab.locator("h1").click()
    tab_to(".message button")
    keyboard.press("Enter")
    page.wait_for_text(page.answer())
    assert page.tab.evaluate("() => document.activeElement.textContent") == "Stop"
    keyboard.press("Space")
    page.answer().get_by_text("stopped").wait_for()
    assert page.tab.evaluate("() => document.activeElement.tagName") == "TEXTAREA"


def chunk(**delta: str) -> str:
    body = {"id": "chatcmpl-1", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    return f"data: {json.dumps(body)}\n\n"


def test_text_stays_text(page: OpenPage) -> None:
    markup = "<img src=x onerror=\"document.title='run'\"><b>bold</b><script>document.title='run'</script>&lt;"
    chunks = (chunk(role="assistant"), chunk(reasoning_content=markup), chunk(content=markup))
    body = f": a comment\n\n{''.join(chunks)}data: [DONE]\n\n"
    page.tab.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream"),
    )
    page.open().send(markup)
    page.answer().get_by_role("button", name="Regenerate").wait_for()
    texts = page.conversation().locator(".text").all_text_contents()
    assert texts == [markup, markup, markup]
    assert page.conversation().locator(".text *").count() == 0
    assert page.tab.title() == "hermes_async"


def test_errors_are_told(page: OpenPage) -> None:
    page.open().send("too long " * 2000)
    error = page.answer().locator(".error")
    error.wait_for()
    assert "1024" in error.text_content()
    page.said = [said for said in page.said if "status of 400" not in said]  # which Chromium tells by itself


@pytest.mark.parametrize("num_stages", [10, 300])
def test_any_number_of_stages_fits(browser: Any, server: str, num_stages: int) -> None:
    """With the events of another model, of as many stages."""
    page = OpenPage(browser, server, color_scheme="dark")
    stages = [[f"model.layers.{idx}.a_module_with_a_long_name", 1 << 28, idx % 9 == 0] for idx in range(num_stages)]
    model = {
        "generates": True,
        "stages": stages,
        "plan": {"reasons": ["a reason " * 12, "x" * 120], "weight_bytes": num_stages << 28},
        "bytes_per_sweep": num_stages << 27,
        "disk_sweep_s": 12.5,
        "disk_measured": True,
    }
    parts = {"weights": 45, "ring": 20, "kv": 10, "workspace": 5, "experts": 6, "other": 4, "free": 10}
    memory = {"budget": 100 << 28, "kv_budget": 18 << 28} | {part: share << 28 for part, share in parts.items()}
    state = {
        "at": 1.0,
        "engine": "open",
        "sweeping": True,
        "sweep": 123_456,
        "stage": 7,
        "stages": ("rrreeelcd" * num_stages)[:num_stages],
        "memory": memory,
        "experts": {"hits": 10**9, "misses": 10**8, "in_memory": 12_345, "total": 123_456},
        "requests": [[f"chatcmpl-{idx:032}", "generating", 1000, 1000, 12_345, 100_000, 0] for idx in range(64)],
        "num_requests": 640,
        "num_forwards": 12,
        "num_sessions": 345,
        "tokens": 10**9,
        "prompt_tokens": 10**9,
        "bytes_read": 10**15,
        "stall_s": 1e6,
    }
    body = f"event: model\ndata: {json.dumps(model)}\n\nevent: state\ndata: {json.dumps(state)}\n\n"
    page.tab.route("**/page/events", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    page.open()
    assert page.tab.locator("#strip .cell").count() == num_stages
    for width in (1280, 800, 360):
        page.tab.set_viewport_size({"width": width, "height": 740})
        assert width_beyond_window(page) <= 0
        page.tab.wait_for_function(
            "() => [...document.querySelectorAll('#strip .cell')].every((cell) => cell.offsetWidth >= 5)"
        )
    label = page.tab.locator("#strip").get_attribute("aria-label")
    assert label.startswith(f"{num_stages} stages: ")
    page.context.close()


def test_a_phone(browser: Any, server: str) -> None:
    page = OpenPage(
        browser, server, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True, reduced_motion="reduce"
    ).open("/")
    page.tab.get_by_role("button", name="New conversation").click()
    assert page.conversation(2).is_visible()
    assert not page.conversation(1).is_visible()
    answer = page.send("A word.", 2)
    page.wait_for_text(answer)
    assert width_beyond_window(page) <= 0
    assert answer.locator(".text").evaluate("(node) => getComputedStyle(node, '::after').animationName") == "none"
    page.tab.get_by_role("button", name="Conversation 1").tap()
    assert page.conversation(1).is_visible()
    page.tab.get_by_role("button", name="Conversation 2").tap()
    page.conversation(2).get_by_role("button", name="Stop").tap()
    page.wait_until_idle()
    assert page.said == []
    page.context.close()


def test_what_the_server_sends(browser: Any, server: str) -> None:
    context = browser.new_context()
    for path in ("/", "/page/app.js", "/page/base.css", "/page/icon.svg", "/page/snapshot"):
        answer = context.request.get(f"{server}{PREFIX}{path}")
        assert answer.status == 200
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert "unsafe" not in str(policy)
        assert answer.headers["x-content-type-options"] == "nosniff"
    for name in ("nothing.js", "..%2fpage.py", "%2e%2e/settings.py", "..%5cpage.py", "index.html%00", "."):
        assert context.request.get(f"{server}{PREFIX}/page/{name}").status in (404, 405)
    html = context.request.get(f"{server}/").text()
    assert not re.search(r"(src|href)=\"(/|https?:)|style=|<script>|\son\w+=", html)
    context.close()
