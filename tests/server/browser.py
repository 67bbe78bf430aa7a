"""A real server with the page, on loopback, and Chromium without a window to open it."""

from __future__ import annotations

import shutil
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from hermes_async import Engine
from hermes_async.server import ServerSettings, create_app

CHROMIUM = shutil.which("chromium")
"""The distribution's; None where it is not installed."""

FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
PREFIX = "/llm"


@contextmanager
def serving(engine: Engine, name: str) -> Iterator[str]:
    """Serves an engine on a thread, at the root and below a prefix; gives the URL."""
    hermes = create_app(engine, ServerSettings(served_model_name=name))
    app = FastAPI(lifespan=lambda app: hermes.router.lifespan_context(hermes))
    app.mount(PREFIX, hermes)
    app.mount("/", hermes)
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            url = f"http://127.0.0.1:{listening.getsockname()[1]}"
            urllib.request.urlopen(f"{url}/health", timeout=120).close()  # answered when the engine is open
            yield url
        finally:
            running.should_exit = True
            thread.join()


@contextmanager
def chromium() -> Iterator[Any]:
    """A running browser, of Playwright's synchronous API."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


class OpenPage:
    """The page in a tab, and what was said in its console.

    Attributes:
        said: Errors, warnings and violations of the content security policy.
    """

    def __init__(self, browser: Any, url: str, **context: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | context)
        self.context.set_default_timeout(20_000)
        self.tab = self.context.new_page()
        self.said: list[str] = []
        self.tab.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.url = url

    def open(self, path: str = f"{PREFIX}/") -> OpenPage:
        self.tab.goto(self.url + path)
        self.tab.locator("#strip .cell").first.wait_for()  # from the stream of events
        self.tab.locator("#model:not(:empty)").wait_for()  # from a request of its own
        return self

    def conversation(self, number: int = 1) -> Any:
        return self.tab.get_by_role("article", name=f"Conversation {number}")

    def send(self, text: str, number: int = 1, *, max_tokens: int = 400) -> Any:
        """Sends a message; returns the answer."""
        self.tab.fill("#max-tokens", str(max_tokens))
        self.conversation(number).get_by_role("textbox").fill(text)
        self.conversation(number).get_by_role("button", name="Send", exact=True).click()
        return self.answer(number)

    def answer(self, number: int = 1) -> Any:
        return self.conversation(number).locator(".message[data-role=assistant]").last

    def wait_for_text(self, answer: Any, more_than: int = 0) -> None:
        """Waits until an answer that is under way has more characters than that."""
        text = answer.locator(".text").last.element_handle()
        self.tab.wait_for_function("([node, most]) => node.textContent.length > most", arg=[text, more_than])

    def wait_for_end(self, number: int = 1) -> None:
        """Waits until the answer is complete."""
        self.answer(number).get_by_role("button", name="Regenerate").wait_for()

    def wait_until_idle(self) -> None:
        self.tab.get_by_text("No request is under way.").wait_for()

    def snapshot(self) -> Any:
        return self.tab.evaluate("async () => (await fetch('page/snapshot')).json()")
