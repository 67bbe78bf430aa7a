"""The events of the page: what watchers of an engine get, and what they cost."""

from __future__ import annotations

import contextlib
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import pytest

import hermes_async.server
from hermes_async import Engine, EngineSnapshot
from hermes_async.server import page
from hermes_async.server.page import SnapshotFeed
from tests.engines import greedy_params, open_engine, settle, tokens, until
from tests.models import TinyModel

pytestmark = pytest.mark.anyio

STYLES = Path(hermes_async.server.__file__).parent / "static" / "base.css"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "INTERVAL_S", 0.001)


class Watcher:
    """Who gets the events of a feed, as the server's stream of events does. A context manager."""

    def __init__(self, max_untaken: int = 1000) -> None:
        self._sent, self._taken = anyio.create_memory_object_stream[bytes](max_untaken)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self._taken.close()

    async def watch(self, feed: SnapshotFeed) -> None:
        async with self._sent:
            await feed.watch(self._sent)

    def take(self) -> list[bytes]:
        """What came since the last call."""
        return [self._taken.receive_nowait() for _ in range(self._taken.statistics().current_buffer_used)]

    async def take_one(self) -> bytes:
        return await self._taken.receive()

    def leave(self) -> None:
        self._taken.close()


def decoded(data: bytes) -> list[tuple[str, Any]]:
    """The events in what a watcher got: names and data."""
    return [(name, json.loads(text)) for name, text in re.findall(r"event: (\w+)\ndata: (.*)\n\n", data.decode())]


async def looks(engine: Engine, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Returns when the engine was looked at `count` times from now on."""
    num_looks = 0
    snapshot = engine.snapshot

    def counted() -> EngineSnapshot:
        nonlocal num_looks
        num_looks += 1
        return snapshot()

    with monkeypatch.context() as patch:
        patch.setattr(engine, "snapshot", counted)
        await until(lambda: num_looks >= count)


async def test_a_watcher_gets_what_changes(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_engine(tiny_model) as engine, anyio.create_task_group() as tasks:
        await settle(engine)
        with Watcher() as watcher:
            tasks.start_soon(watcher.watch, SnapshotFeed(engine, lambda: False))
            await looks(engine, monkeypatch, 5)
            (first,) = watcher.take()  # nothing changed after it
            (name, model), (other_name, state) = decoded(first)
            assert (name, other_name) == ("model", "state")
            assert [label for label, _, _ in model["stages"]] == [stage.label for stage in engine.snapshot().stages]
            assert model["plan"] == engine.plan.as_dict()
            assert len(state["stages"]) == len(model["stages"])
            assert set(state["stages"]) == {"r", "e"}
            assert str(tiny_model.path) not in first.decode()
            await engine.complete(tokens(1, 20), greedy_params(20))
            await looks(engine, monkeypatch, 3)
            states = decoded(b"".join(watcher.take()))
            tasks.cancel_scope.cancel()
    assert {name for name, _ in states} == {"state"}
    assert states[-1][1]["tokens"] == 20
    assert all(before["at"] < after["at"] for (_, before), (_, after) in pairwise(states))


async def test_a_model_event_follows_a_resize(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_engine(tiny_model) as engine, anyio.create_task_group() as tasks:
        with Watcher() as watcher:
            tasks.start_soon(watcher.watch, SnapshotFeed(engine, lambda: False))
            await looks(engine, monkeypatch, 2)
            await engine.resize("7MiB")
            await looks(engine, monkeypatch, 2)
            events = decoded(b"".join(watcher.take()))
            tasks.cancel_scope.cancel()
    budgets = [data["plan"]["memory_budget"] for name, data in events if name == "model"]
    assert (budgets[0], budgets[-1]) == (8 << 20, 7 << 20)


async def test_nothing_queues_for_a_slow_watcher(tiny_model: TinyModel) -> None:
    async with open_engine(tiny_model) as engine, anyio.create_task_group() as tasks:
        feed = SnapshotFeed(engine, lambda: False)
        with Watcher(max_untaken=0) as watcher:
            tasks.start_soon(watcher.watch, feed)
            await engine.complete(tokens(1, 4), greedy_params(30))
            assert decoded(await watcher.take_one())[-1][1]["tokens"] == 0
            await settle(engine)
            assert decoded(await watcher.take_one())[-1][1]["tokens"] == 30
            assert feed.num_watchers == 1
            tasks.cancel_scope.cancel()
    assert feed.num_watchers == 0


async def test_watchers_share_the_looks_and_leave(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    async with open_engine(tiny_model) as engine:
        await settle(engine)
        feed = SnapshotFeed(engine, lambda: False)
        async with anyio.create_task_group() as tasks, contextlib.AsyncExitStack() as exits:
            watchers = [exits.enter_context(Watcher()) for _ in range(20)]
            for watcher in watchers:
                tasks.start_soon(watcher.watch, feed)
            await looks(engine, monkeypatch, 2)
            assert feed.num_watchers == 20
            firsts = [watcher.take()[0] for watcher in watchers]
            assert len(set(firsts)) == 1  # with one time in it, so the engine was looked at once for all
            for watcher in watchers:  # that they take no more is noticed with the next event
                watcher.leave()
            await engine.complete([5], greedy_params(1))
            await until(lambda: feed.num_watchers == 0)


async def test_events_end_with_the_engine_and_with_the_server(tiny_model: TinyModel) -> None:
    is_stopping = False
    with Watcher() as watcher, Watcher() as other:
        async with anyio.create_task_group() as tasks, open_engine(tiny_model) as engine:
            tasks.start_soon(watcher.watch, SnapshotFeed(engine, lambda: False))
            feed = SnapshotFeed(engine, lambda: is_stopping)
            tasks.start_soon(other.watch, feed)
            async with contextlib.aclosing(engine.generate([5], greedy_params(30))) as chunks:
                await anext(chunks)
                is_stopping = True
                await until(lambda: decoded(b"".join(other.take())) != [])
                assert feed.num_watchers == 1  # a request is under way
            await until(lambda: feed.num_watchers == 0)
        # The task group has ended, so the watcher of the engine has left too.
        assert decoded(b"".join(watcher.take()))[-1][1]["engine"] == "closed"


# --- colours ---


def luminance(colour: str) -> float:
    """Relative luminance. Source: WCAG 2.2."""
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(scheme: str) -> None:
    light, dark = re.findall(r":root \{(.*?)\}", STYLES.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--([\w-]+): (#\w{6});", light if scheme == "light" else dark))
    for background in ("bg", "surface", "sunken"):
        for text in ("ink", "ink-soft", "accent", "danger"):
            assert contrast(colours[text], colours[background]) >= 4.5, (text, background)
        assert contrast(colours["line-strong"], colours[background]) >= 3, background
    assert contrast(colours["on-accent"], colours["accent"]) >= 4.5
    assert contrast(colours["stay"], colours["surface"]) >= 3
