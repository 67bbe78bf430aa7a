"""A disk that hangs while an engine opens: whatever reads, opening can be left, and `read_timeout` ends it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from transformers import AttentionInterface, AutoTokenizer

from hermes_async import ReadTimeoutError
from hermes_async.storage import headers, opening_watch
from hermes_async.storage.threads import run_in_thread
from tests.engines import open_engine, until
from tests.models import TinyModel

pytestmark = pytest.mark.anyio


class Hang:
    """Where a thread hangs until the test lets it go."""

    def __init__(self) -> None:
        self.entered, self.let_go = threading.Event(), threading.Event()
        self.path: Path | None = None

    def wait(self, path: Path | None = None) -> None:
        self.path = path
        self.entered.set()
        if not self.let_go.wait(60):  # no assert: it must also wait under `python -O`
            raise TimeoutError("the test did not let the read go")


Place = Callable[[pytest.MonkeyPatch, Any, Hang], None]


def in_file(name: str) -> Place:
    """Where one of our own modules opens the file."""

    def hang_there(patch: pytest.MonkeyPatch, disk: Any, hang: Hang) -> None:
        def opened(path: Path, *args: Any, **options: Any) -> Any:
            if path.name == name:
                hang.wait(path)
            return open(path, *args, **options)  # noqa: PTH123 - in its place

        patch.setattr(headers, "open", opened, raising=False)

    return hang_there


def in_library(patch: pytest.MonkeyPatch, disk: Any, hang: Hang) -> None:
    """Where transformers reads the tokenizer's files."""
    works = AutoTokenizer.from_pretrained

    def load(*args: Any, **options: Any) -> Any:
        hang.wait()
        return works(*args, **options)

    patch.setattr(AutoTokenizer, "from_pretrained", load)


def when_weights_are_opened(patch: pytest.MonkeyPatch, disk: Any, hang: Hang) -> None:
    disk.on_open = hang.wait


PLACES: dict[str, Place] = {
    "configuration": in_file("config.json"),
    "header": in_file("model.safetensors"),
    "tokenizer": in_library,
    "weights": when_weights_are_opened,
}


@pytest.fixture(name="tiny_model", scope="module")
def model_with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def hang() -> Iterator[Hang]:
    hang = Hang()
    yield hang
    hang.let_go.set()


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, disk: Any, hang: Hang) -> str:
    PLACES[request.param](monkeypatch, disk, hang)
    return str(request.param)


def num_named(name: str) -> int:
    return sum(thread.name.startswith(name) for thread in threading.enumerate())


async def test_opening_ends_with_an_error(tiny_model: Any, place: str, hang: Hang) -> None:
    before = set(AttentionInterface._global_mapping)
    with pytest.raises(
        ReadTimeoutError, match=r"has (waited for a read|not come back).* read_timeout is 0.2 s"
    ) as caught:
        async with open_engine(tiny_model, read_timeout=0.2):
            pytest.fail("entered")
    assert not hang.let_go.is_set()
    assert caught.value.path == (hang.path or tiny_model.path)
    assert caught.value.seconds >= 0.2
    hang.let_go.set()
    await until(lambda: set(AttentionInterface._global_mapping) == before and not num_named("hermes"))


async def test_opening_is_left(tiny_model: Any, place: str, hang: Hang, disk: Any) -> None:
    before = set(AttentionInterface._global_mapping)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def cancel() -> None:
                await until(hang.entered.is_set)
                scope.cancel()

            group.start_soon(cancel)
            async with open_engine(tiny_model):
                pytest.fail("entered")
    assert scope.cancelled_caught
    assert not hang.let_go.is_set()
    hang.let_go.set()
    await until(lambda: set(AttentionInterface._global_mapping) == before and not num_named("hermes"))
    await until(lambda: not disk.num_open)


async def test_the_warning_names_the_file(
    tiny_model: Any, place: str, hang: Hang, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in ("opening_watch", "read_watch"):
        monkeypatch.setattr(f"hermes_async.storage.{module}.SECONDS_UNTIL_WARNING", 0.3)
    caplog.set_level(logging.WARNING, "hermes_async")
    async with anyio.create_task_group() as group:

        async def let_go() -> None:
            await until(lambda: "the disk does not answer" in caplog.text)
            hang.let_go.set()

        group.start_soon(let_go)
        async with open_engine(tiny_model) as engine:
            completion = await engine.complete(tiny_model.prompts[1], tiny_model.params)
    assert completion.token_ids == tiny_model.references[1]
    assert str(hang.path or tiny_model.path) in caplog.text
    assert caplog.text.count("the disk does not answer") == 1


async def test_a_thread_that_computes_or_waits_for_others_does_not_hang(tmp_path: Path) -> None:
    def work() -> str:
        ends_at = time.thread_time() + 0.5
        while time.thread_time() < ends_at:
            pass
        with opening_watch.waits_for_others():
            threading.Event().wait(0.5)
        return "done"

    watch = opening_watch.OpeningWatch(tmp_path, 0.1)
    assert await watch.in_time(run_in_thread(watch.run, work)) == "done"


async def test_an_error_of_opening_comes_out_as_itself(tmp_path: Path) -> None:
    def fail() -> None:
        raise ZeroDivisionError("of opening")

    watch = opening_watch.OpeningWatch(tmp_path, 10)
    with pytest.raises(ZeroDivisionError, match="of opening"):
        await watch.in_time(run_in_thread(watch.run, fail))
