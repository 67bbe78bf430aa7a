"""A disk that hangs: an engine is left without waiting for it, and `read_timeout` ends those who wait."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from transformers import AttentionInterface

from hermes_async import DeadlineExceededError, Engine, ReadTimeoutError
from hermes_async.engine import opening
from hermes_async.serving.lending import SWEEPS_BEFORE_LENDING
from hermes_async.storage import parking
from tests.engines import BLOCK_BYTES, both_loops, greedy_params, open_engine, tokens, until
from tests.faults.hanging import Hanging
from tests.features.machines import lender, told
from tests.inside import inside, is_parked

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()

HOLDER = "reads that hang"


def engine_of(model: Any, **config: Any) -> Engine:
    return Engine(model.path, memory_budget="8MiB", config=dataclasses.replace(model.config, **config))


async def check_given_back(engine: Engine, hanging: Hanging) -> None:
    """After the engine was left: its memory counts until the threads have returned, and no longer."""
    assert not hanging.let_go.is_set()
    statistics = engine.statistics()
    assert set(statistics.holders) == {HOLDER}
    assert statistics.bytes_in_use == statistics.holders[HOLDER] > 0
    hanging.end()
    await until(lambda: not engine.statistics().holders)
    assert engine.statistics().bytes_in_use == 0


async def until_it_works(call: Callable[[], Awaitable[Any]]) -> Any:
    """The disk is back, but may be slower than a short timeout on a machine that is busy."""
    while True:
        with suppress(ReadTimeoutError):
            return await call()


# --- leaving ---


@pytest.mark.parametrize("what", ["rows", "weights"])
async def test_an_engine_is_left_while_its_reads_hang(tiny_model: Any, hanging: Hanging, what: str) -> None:
    async with engine_of(tiny_model) as engine, anyio.create_task_group() as group:
        getattr(hanging, what)(engine)
        group.start_soon(engine.complete, tiny_model.prompts[2], tiny_model.params)
        await until(lambda: hanging.num_hanging > 0)
        group.cancel_scope.cancel()
    await check_given_back(engine, hanging)


async def test_an_engine_is_left_while_resident_weights_hang(tiny_model: Any, hanging: Hanging) -> None:
    hanging.everything()
    async with engine_of(tiny_model, max_resident_layers=None) as engine:
        assert engine.plan.resident
        await until(lambda: hanging.num_hanging > 0)
    await check_given_back(engine, hanging)


async def test_an_engine_is_left_while_experts_hang(tiny_mixture: Any, hanging: Hanging) -> None:
    config = tiny_mixture.config
    async with Engine(tiny_mixture.path, memory_budget=tiny_mixture.smallest_budget, config=config) as engine:
        await engine.complete(tiny_mixture.prompts[1], tiny_mixture.params)
        places = {item.offset for expert in inside(engine).expert_cache.experts for item in expert.layout.ranges}
        hanging.where = lambda offset: any(offset <= place < offset + 4096 for place in places)
        async with anyio.create_task_group() as group:
            group.start_soon(engine.complete, tiny_mixture.prompts[2], tiny_mixture.params)
            await until(lambda: hanging.num_hanging > 0)
            group.cancel_scope.cancel()
    await check_given_back(engine, hanging)


async def test_files_are_closed_when_the_last_thread_returns(tiny_model: Any, hanging: Hanging, disk: Any) -> None:
    async with engine_of(tiny_model) as engine:
        hanging.everything()
        async with anyio.create_task_group() as group:
            group.start_soon(engine.complete, tiny_model.prompts[2], tiny_model.params)
            await until(lambda: hanging.num_hanging > 0)
            group.cancel_scope.cancel()
    assert disk.num_open > 0  # a thread reads them still
    hanging.end()
    await until(lambda: disk.num_open == 0)


async def test_opening_is_left_while_it_hangs(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the thread opens in the end is closed by it."""
    entered, let_go, ended = threading.Event(), threading.Event(), threading.Event()
    open_model = opening.open_model

    def slow(*args: Any) -> Any:
        entered.set()
        assert let_go.wait(60)
        try:
            return open_model(*args)
        finally:
            ended.set()

    monkeypatch.setattr(opening, "open_model", slow)
    before = set(AttentionInterface._global_mapping)
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def cancel() -> None:
                await until(entered.is_set)
                scope.cancel()

            group.start_soon(cancel)
            async with engine_of(tiny_model):
                pytest.fail("entered")
    assert scope.cancelled_caught
    assert not let_go.is_set()
    let_go.set()
    await until(lambda: ended.is_set() and set(AttentionInterface._global_mapping) == before)


# --- read_timeout ---


@pytest.mark.parametrize("what", ["rows", "weights"])
async def test_those_who_wait_get_an_error_until_the_disk_is_back(tiny_model: Any, hanging: Hanging, what: str) -> None:
    async with engine_of(tiny_model, read_timeout=0.1) as engine:
        getattr(hanging, what)(engine)
        for _ in range(2):
            with pytest.raises(ReadTimeoutError, match=r"has not come back for .* read_timeout is 0.1 s") as caught:
                await engine.complete(tiny_model.prompts[2], tiny_model.params)
            assert caught.value.path == tiny_model.shard
            assert caught.value.seconds >= 0.1
            assert hanging.where(caught.value.offset)
        with pytest.raises(ReadTimeoutError):
            await engine.forward(input_ids=[tiny_model.prompts[2]])
        assert engine.statistics().num_running == 0
        hanging.end()
        completion = await until_it_works(lambda: engine.complete(tiny_model.prompts[2], tiny_model.params))
        assert completion.token_ids == tiny_model.references[2]
        assert engine.statistics().num_leases == 4


async def test_waiting_for_resident_weights_and_resizing_end_too(tiny_model: Any, hanging: Hanging) -> None:
    hanging.everything()
    async with engine_of(tiny_model, max_resident_layers=None, read_timeout=0.1) as engine:
        budget = engine.plan.memory_budget
        for _ in range(2):
            with pytest.raises(ReadTimeoutError):
                await engine.wait_ready()
        with pytest.raises(ReadTimeoutError):
            await engine.resize("9MiB")
        assert engine.statistics().memory_budget == budget
        hanging.end()
        await until_it_works(engine.wait_ready)
        await until_it_works(lambda: engine.resize("9MiB"))
        assert engine.statistics().memory_budget > budget
        completion = await until_it_works(lambda: engine.complete(tiny_model.prompts[2], tiny_model.params))
        assert completion.token_ids == tiny_model.references[2]


async def test_a_read_that_comes_in_time_is_no_error(tiny_model: Any) -> None:
    async with engine_of(tiny_model, read_timeout=60.0) as engine:
        completion = await engine.complete(tiny_model.prompts[2], tiny_model.params)
        assert completion.token_ids == tiny_model.references[2]


# --- the warning ---


async def test_one_warning_names_the_file_and_the_offset(
    tiny_model: Any, hanging: Hanging, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hermes_async.storage.read_watch.SECONDS_UNTIL_WARNING", 0.3)
    caplog.set_level(logging.WARNING, "hermes_async")
    async with engine_of(tiny_model, num_loading_agents=1) as engine:
        hanging.weights(engine)
        async with anyio.create_task_group() as group:
            group.start_soon(engine.complete, tiny_model.prompts[2], tiny_model.params)
            await until(lambda: hanging.num_hanging > 0)
            place = f"a read at offset {hanging.offsets[0]} of {tiny_model.shard} has not come back"
            await until(lambda: place in caplog.text)
            await anyio.sleep(0.9)  # three times as long as until the first warning
            assert caplog.text.count(place) == 1
            hanging.end()


# --- parked KV ---


class ParkingDisk:
    """Reads and writes of files without a name hang until the test lets them go, and so does making one.

    Attributes:
        hangs: "read", "write" or "make"; None if nothing hangs.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.let_go, self.entered = threading.Event(), threading.Event()
        self.hangs: str | None = None
        preadv, pwritev, make = os.preadv, os.pwritev, parking.open_unnamed

        def read(fd: int, *args: Any) -> int:
            if not os.fstat(fd).st_nlink:
                self._wait("read")
            return preadv(fd, *args)

        def write(fd: int, *args: Any) -> int:
            self._wait("write")
            return pwritev(fd, *args)

        def make_file(folder: Path) -> int:
            self._wait("make")
            return make(folder)

        monkeypatch.setattr(os, "preadv", read)
        monkeypatch.setattr(os, "pwritev", write)
        monkeypatch.setattr(parking, "open_unnamed", make_file)

    def _wait(self, doing: str) -> None:
        if self.hangs == doing:
            self.entered.set()
            if not self.let_go.wait(60):  # no assert: it must also wait under `python -O`
                raise TimeoutError("the test did not let the disk go")


@pytest.mark.parametrize("how", ["leave", "abort", "timeout"])
async def test_a_session_is_brought_back_from_a_disk_that_hangs(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    disk = ParkingDisk(monkeypatch)
    config: dict[str, Any] = {"share_prefixes": False, "kv_budget": 8 * BLOCK_BYTES, "parking_dir": tmp_path}
    if how == "timeout":
        config["read_timeout"] = 0.1
    async with AsyncExitStack() as exits:
        exits.callback(disk.let_go.set)
        engine = await exits.enter_async_context(open_engine(tiny_model, **config))
        chat = await exits.enter_async_context(engine.session())
        await chat.complete(tokens(1, 40), greedy_params(6))
        await engine.complete(tokens(99, 120), greedy_params(1))  # leaves no room beside it
        assert is_parked(chat)
        disk.hangs = "read"
        ends: list[Any] = []

        async def turn() -> None:
            try:
                ends.append(await chat.complete([5], greedy_params(4), request_id="turn"))
            except ReadTimeoutError as error:
                ends.append(error)

        async with anyio.create_task_group() as group:
            group.start_soon(turn)
            await until(disk.entered.is_set)
            if how == "leave":
                group.cancel_scope.cancel()
            elif how == "abort":
                assert await engine.abort("turn")
        if how == "leave":
            return
        assert not disk.let_go.is_set()
        (end,) = ends
        assert isinstance(end, ReadTimeoutError) if how == "timeout" else end.finish_reason == "abort"
        assert any(holder.startswith("KV of") for holder in engine.statistics().holders)  # the thread has it
        disk.let_go.set()
        completion = await until_it_works(lambda: chat.complete([5], greedy_params(4)))
        assert completion.usage.cached_tokens > 0


async def test_a_request_that_waits_for_memory_on_loan_gets_the_error(
    tiny_model: Any, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a stage is read, no other can leave."""
    async with (
        lender(tiny_model, told(monkeypatch), more=0, share_prefixes=False, read_timeout=0.05) as engine,
        engine.session() as chat,
    ):
        # Its memory comes back from a stage, and too few sweeps follow for lending more.
        await chat.complete(tokens(1, 20), greedy_params(SWEEPS_BEFORE_LENDING))
        assert inside(engine).streamed_stages
        hanging.weights(engine)
        with pytest.raises(ReadTimeoutError):
            await engine.complete(tiny_model.prompts[2], tiny_model.params)
        with anyio.fail_after(30), pytest.raises(ReadTimeoutError):
            await engine.complete(tiny_model.prompts[4], greedy_params(31))
        hanging.end()
        completion = await until_it_works(lambda: engine.complete(tiny_model.prompts[2], tiny_model.params))
        assert completion.token_ids == tiny_model.references[2]


@pytest.mark.parametrize("doing", ["write", "make"])
@pytest.mark.parametrize("how", ["leave", "abort", "deadline", "timeout"])
async def test_a_session_is_parked_on_a_disk_that_hangs(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, doing: str, how: str
) -> None:
    """Who needs the session's memory waits for it, and so does the session's own turn."""
    disk = ParkingDisk(monkeypatch)
    config: dict[str, Any] = {"share_prefixes": False, "kv_budget": 8 * BLOCK_BYTES, "parking_dir": tmp_path}
    if how == "timeout":
        config["read_timeout"] = 0.1
    async with AsyncExitStack() as exits:
        exits.callback(disk.let_go.set)
        engine = await exits.enter_async_context(open_engine(tiny_model, **config))
        chat = await exits.enter_async_context(engine.session())
        first = await chat.complete(tokens(1, 40), greedy_params(6))
        disk.hangs = doing
        deadline = anyio.current_time() + 0.3 if how == "deadline" else None
        ends: dict[str, Any] = {}

        async def ask(name: str, call: Callable[..., Awaitable[Any]], prompt: list[int], num_tokens: int) -> None:
            try:
                ends[name] = await call(prompt, greedy_params(num_tokens), request_id=name, deadline=deadline)
            except (ReadTimeoutError, DeadlineExceededError) as error:
                ends[name] = error

        async with anyio.create_task_group() as group:
            group.start_soon(ask, "large", engine.complete, tokens(99, 120), 1)  # leaves no room beside it
            await until(disk.entered.is_set)
            group.start_soon(ask, "turn", chat.complete, [5], 4)
            await until(lambda: {"large", "turn"} <= inside(engine).request_ids or how in ("timeout", "deadline"))
            if how == "leave":
                group.cancel_scope.cancel()
            elif how == "abort":
                assert await engine.abort("large")
                assert await engine.abort("turn")
        if how == "leave":
            return
        assert not disk.let_go.is_set()
        for name in ("large", "turn"):
            if how == "abort":
                assert ends[name].finish_reason == "abort"
            else:
                assert isinstance(ends[name], ReadTimeoutError if how == "timeout" else DeadlineExceededError)
        if how == "timeout":
            assert ("a write at" if doing == "write" else "making a file at") in str(ends["large"])
        disk.let_go.set()
        completion = await until_it_works(lambda: chat.complete([5], greedy_params(4)))
        assert completion.usage.prompt_tokens > len(first.token_ids)
        large = await until_it_works(lambda: engine.complete(tokens(99, 120), greedy_params(1)))
        assert large.token_ids
