"""Idle sessions go to disk when memory is short, and come back as they were; whatever fails there costs time only."""

from __future__ import annotations

import dataclasses
import errno
import os
import random
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, aclosing
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from hermes_async import Engine, EngineClosedError
from tests.engines import BLOCK_BYTES, check_nothing_is_left, greedy_params, open_engine, tokens, until
from tests.inside import inside, is_parked

pytestmark = pytest.mark.anyio


NUM_BLOCKS = 8  # of KV: the least for a context of 128


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where idle KV is parked: no file has a name there, at any time."""
    folder = tmp_path / "parked"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


def parking_engine(model: Any, folder: Path, **config: Any) -> Engine:
    """Little memory for KV, and nothing shared, so that what a session keeps is its own."""
    config = {"share_prefixes": False, "kv_budget": NUM_BLOCKS * BLOCK_BYTES, "parking_dir": folder, **config}
    return open_engine(model, **config)


class Answers:
    """What prompts get without sessions, in an engine with room."""

    def __init__(self, model: Any) -> None:
        self._engine = Engine(model.path, memory_budget="8MiB", config=dataclasses.replace(model.config))
        self._known: dict[Any, tuple[int, ...]] = {}

    async def __aenter__(self) -> Answers:
        await self._engine.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._engine.__aexit__(*error)

    async def to(self, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
        key = (*prompt, -num_tokens)
        if key not in self._known:
            self._known[key] = (await self._engine.complete(prompt, greedy_params(num_tokens))).token_ids
        return self._known[key]


class Talk:
    """A session, and what its history must be."""

    def __init__(self, chat: Any, answers: Answers, history: list[int] | None = None) -> None:
        self.chat, self._answers, self.history = chat, answers, history or []

    async def turn(self, prompt: list[int], num_tokens: int = 6, cached: int | None = None) -> None:
        completion = await self.chat.complete(prompt, greedy_params(num_tokens))
        self.history += prompt
        assert completion.token_ids == await self._answers.to(self.history, num_tokens)
        self.history += completion.token_ids
        assert self.chat.token_ids == tuple(self.history)
        if cached is not None:
            assert completion.usage.cached_tokens == cached

    def is_parked(self) -> bool:
        return is_parked(self.chat)


@pytest.fixture
async def answers(tiny_model: Any) -> Any:
    async with Answers(tiny_model) as answers:
        yield answers


class Gate:
    """A call on the parking file that waits, from `shut` on until `open`, and then does what it does, or fails."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self._may_pass = threading.Event()
        self._may_pass.set()
        self.entered = threading.Event()
        self.error: OSError | None = None
        call = getattr(os, name)

        def guarded(fd: int, *args: Any) -> Any:
            if os.fstat(fd).st_nlink:  # a shard: the parking file has no name
                return call(fd, *args)
            self.entered.set()
            assert self._may_pass.wait(30)
            if self.error is not None:
                raise self.error
            return call(fd, *args)

        monkeypatch.setattr(os, name, guarded)

    def shut(self) -> None:
        self.entered.clear()
        self._may_pass.clear()

    def open(self) -> None:
        self._may_pass.set()

    async def wait_for_a_call(self) -> None:
        await until(self.entered.is_set)


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch, "pwritev")
    yield gate
    gate.open()


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch, "preadv")
    yield gate
    gate.open()


async def fill_memory(engine: Engine) -> None:
    """A request that leaves no room beside it: whoever is idle must go."""
    await engine.complete(tokens(99, 120), greedy_params(1))


# Out and back


async def test_the_longest_idle_session_goes_first_and_comes_back(
    tiny_model: Any, folder: Path, answers: Answers
) -> None:
    async with parking_engine(tiny_model, folder) as engine:
        async with engine.session() as one, engine.session() as two, engine.session() as three:
            talks = [Talk(one, answers), Talk(two, answers), Talk(three, answers)]
            for seed, talk in enumerate(talks):
                await talk.turn(tokens(seed, 40))  # 46 tokens: three blocks of eight
            assert [talk.is_parked() for talk in talks] == [True, False, False]
            assert (engine.statistics().num_parked, engine.statistics().num_parkings) == (1, 1)
            await talks[1].turn([5])  # now it is the third that was idle the longest
            await talks[0].turn([5], cached=45)
            assert [talk.is_parked() for talk in talks] == [False, False, True]
            await talks[2].turn([5, 6], cached=45)
            assert [talk.is_parked() for talk in talks] == [False, True, False]
            assert (engine.statistics().num_parked, engine.statistics().num_parkings) == (1, 3)
            assert engine.statistics().peak_bytes_in_use <= engine.statistics().memory_budget
        await check_nothing_is_left(engine)


async def test_keys_and_values_come_back_bit_for_bit(tiny_model: Any, folder: Path) -> None:
    async with parking_engine(tiny_model, folder, max_tokens_per_sweep=8) as engine, engine.session() as chat:
        await chat.complete(tokens(1, 45), greedy_params(5))
        before = inside(engine).kv_of(chat)
        await fill_memory(engine)
        assert engine.statistics().num_parked == 1
        sweeps = engine.statistics().sweeps
        completion = await chat.complete([5], greedy_params(1))
        assert completion.usage.cached_tokens == 49
        assert engine.statistics().sweeps == sweeps + 1
        after = inside(engine).kv_of(chat)
    for (keys, values), (keys_after, values_after) in zip(before, after, strict=True):
        assert keys.shape[2] == 49
        assert (keys == keys_after[:, :, :49]).all()
        assert (values == values_after[:, :, :49]).all()


@pytest.mark.parametrize("share_prefixes", [True, False])
async def test_sessions_come_back_time_and_again(
    tiny_model: Any, folder: Path, answers: Answers, share_prefixes: bool
) -> None:
    async with parking_engine(tiny_model, folder, share_prefixes=share_prefixes) as engine:
        async with AsyncExitStack() as exits:
            talks = [Talk(await exits.enter_async_context(engine.session()), answers) for _ in range(5)]
            for turn in range(4):
                for seed, talk in enumerate(talks):
                    cached = None if share_prefixes else max(0, 21 * turn - 1)
                    await talk.turn(tokens(10 * seed + turn, 15), cached=cached)
            assert engine.statistics().num_parkings >= 12
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("share_prefixes", [True, False])
@pytest.mark.parametrize("direct_io", [True, False])
async def test_all_at_once(
    tiny_model: Any, folder: Path, answers: Answers, share_prefixes: bool, direct_io: bool
) -> None:
    async def talk(seed: int) -> None:
        chosen = random.Random(seed)
        async with engine.session() as chat:
            talk = Talk(chat, answers)
            for turn in range(5):
                await talk.turn(tokens(100 * seed + turn, chosen.randrange(1, 18)), chosen.randrange(1, 7))

    async with parking_engine(tiny_model, folder, share_prefixes=share_prefixes, direct_io=direct_io) as engine:
        async with anyio.create_task_group() as group:
            for seed in range(10):
                group.start_soon(talk, seed)
        assert engine.statistics().num_parkings > 0
        assert engine.statistics().peak_bytes_in_use <= engine.statistics().memory_budget
        await check_nothing_is_left(engine)


async def test_what_is_still_shared_is_not_read_back(tiny_model: Any, folder: Path, answers: Answers) -> None:
    """Blocks that others use stay in memory; only the rest comes from disk."""
    async with parking_engine(tiny_model, folder, share_prefixes=True) as engine:
        async with engine.session() as chat:
            talk = Talk(chat, answers)
            await talk.turn(tokens(1, 40))
            async with aclosing(engine.generate([*tokens(1, 40), 7], greedy_params(80))) as chunks:  # six more blocks
                await anext(chunks)
                assert talk.is_parked()
                assert engine.statistics().kv_bytes <= NUM_BLOCKS * BLOCK_BYTES
            await talk.turn([5], cached=45)
        await check_nothing_is_left(engine)


async def test_a_session_without_turns_or_an_empty_one_does_no_harm(
    tiny_model: Any, folder: Path, answers: Answers
) -> None:
    async with parking_engine(tiny_model, folder, share_prefixes=True) as engine:
        async with engine.session() as chat, chat.fork() as fork:
            await fill_memory(engine)
            async with fork.fork() as another:
                for session in (chat, fork, another):
                    await fill_memory(engine)
                    await Talk(session, answers).turn(tokens(1, 10))
        await check_nothing_is_left(engine)


# What is done to a parked session


async def test_a_parked_session_is_closed(tiny_model: Any, folder: Path) -> None:
    async with parking_engine(tiny_model, folder) as engine:
        async with engine.session() as chat:
            await chat.complete(tokens(1, 40), greedy_params(6))
            await fill_memory(engine)
            assert inside(engine).num_parking_slots == 3
        assert inside(engine).num_parking_slots == 0
        await check_nothing_is_left(engine)


async def test_a_parked_session_is_forked(tiny_model: Any, folder: Path, answers: Answers) -> None:
    for share_prefixes in (True, False):
        async with parking_engine(tiny_model, folder, share_prefixes=share_prefixes) as engine:
            async with engine.session() as chat:
                talk = Talk(chat, answers)
                await talk.turn(tokens(1, 40))
                await fill_memory(engine)
                assert talk.is_parked()
                async with chat.fork() as fork:
                    await Talk(fork, answers, list(talk.history)).turn([7])
                    await talk.turn([5])
            await check_nothing_is_left(engine)


async def test_a_parked_fork_and_its_parked_parent(tiny_model: Any, folder: Path, answers: Answers) -> None:
    async with parking_engine(tiny_model, folder, share_prefixes=True) as engine:
        async with engine.session() as chat:
            talk = Talk(chat, answers)
            await talk.turn(tokens(1, 40))
            async with chat.fork() as fork:
                other = Talk(fork, answers, list(talk.history))
                for _ in range(2):
                    await fill_memory(engine)
                    assert engine.statistics().num_parked == 2
                    await talk.turn([5])
                    await other.turn([7])
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("num_kept", [0, 1, 16, 20, 32, 44, 45, 46])
async def test_a_parked_session_is_edited(tiny_model: Any, folder: Path, answers: Answers, num_kept: int) -> None:
    """Only what the edit keeps is read back; the last token of the history was never computed."""
    async with parking_engine(tiny_model, folder) as engine:
        async with engine.session() as chat:
            talk = Talk(chat, answers)
            await talk.turn(tokens(1, 40))
            await fill_memory(engine)
            talk.history = [*talk.history[:num_kept], 95, 94]
            chat.edit(token_ids=talk.history)
            assert talk.is_parked()
            await talk.turn([5], cached=min(num_kept, 45))
            assert inside(engine).num_parking_slots == 0
            await talk.turn([6])
        await check_nothing_is_left(engine)


# While it moves


@pytest.mark.parametrize("error", [None, OSError(errno.ENOSPC, "full")])
async def test_a_turn_begins_while_its_session_is_written(
    tiny_model: Any, folder: Path, answers: Answers, writing: Gate, error: OSError | None
) -> None:
    async with parking_engine(tiny_model, folder) as engine:
        async with engine.session() as chat:
            talk = Talk(chat, answers)
            await talk.turn(tokens(1, 40))
            writing.shut()
            async with anyio.create_task_group() as group:
                group.start_soon(fill_memory, engine)
                await writing.wait_for_a_call()
                group.start_soon(talk.turn, [5], 6, 45 if error is None else 0)
                await until(lambda: engine.statistics().num_waiting == 2)
                writing.error = error
                writing.open()
            assert engine.statistics().num_parkings == (error is None)
        await check_nothing_is_left(engine)


async def test_a_turn_that_waits_for_its_session_is_aborted(
    tiny_model: Any, folder: Path, answers: Answers, writing: Gate
) -> None:
    async with parking_engine(tiny_model, folder) as engine:
        async with engine.session() as chat:
            talk = Talk(chat, answers)
            await talk.turn(tokens(1, 40))
            writing.shut()
            async with anyio.create_task_group() as group:
                group.start_soon(fill_memory, engine)
                await writing.wait_for_a_call()
                with anyio.CancelScope() as scope:
                    async with anyio.create_task_group() as turn:
                        turn.start_soon(chat.complete, [5], greedy_params(6))
                        await until(lambda: engine.statistics().num_waiting == 2)
                        scope.cancel()
                writing.open()
            assert chat.token_ids == tuple(talk.history)
            await talk.turn([5], cached=45)
        await check_nothing_is_left(engine)


async def test_a_session_is_closed_while_it_is_written(tiny_model: Any, folder: Path, writing: Gate) -> None:
    async with parking_engine(tiny_model, folder) as engine:
        async with anyio.create_task_group() as group:
            async with engine.session() as chat:
                await chat.complete(tokens(1, 40), greedy_params(6))
                writing.shut()
                group.start_soon(fill_memory, engine)
                await writing.wait_for_a_call()
            assert engine.statistics().kv_bytes == 3 * BLOCK_BYTES  # its thread still reads them
            writing.open()
        await check_nothing_is_left(engine)


async def test_a_session_is_forked_while_it_is_written(
    tiny_model: Any, folder: Path, answers: Answers, writing: Gate
) -> None:
    async with parking_engine(tiny_model, folder, share_prefixes=True) as engine:
        async with engine.session() as chat, anyio.create_task_group() as group:
            talk = Talk(chat, answers)
            await talk.turn(tokens(1, 40))
            writing.shut()
            group.start_soon(fill_memory, engine)
            await writing.wait_for_a_call()
            async with chat.fork() as fork:
                writing.open()
                await Talk(fork, answers, list(talk.history)).turn([7])
                await talk.turn([5])
        await check_nothing_is_left(engine)


async def test_others_run_while_a_session_is_read_back(
    tiny_model: Any, folder: Path, answers: Answers, reading: Gate
) -> None:
    async with parking_engine(tiny_model, folder) as engine:
        async with engine.session() as chat, anyio.create_task_group() as group:
            talk = Talk(chat, answers)
            await talk.turn(tokens(1, 40))
            await fill_memory(engine)
            reading.shut()
            group.start_soon(talk.turn, [5], 6, 45)
            await reading.wait_for_a_call()
            assert engine.statistics().num_running == 1
            prompt = tokens(2, 20)
            assert (await engine.complete(prompt, greedy_params(6))).token_ids == await answers.to(prompt, 6)
            reading.open()
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("way", ["abort", "cancel", "close", "deadline"])
async def test_a_turn_ends_while_its_session_is_read_back(
    tiny_model: Any, folder: Path, answers: Answers, reading: Gate, way: str
) -> None:
    """At once. Its memory is given back only when nothing is read into it any more; nothing of it is lost."""
    ends: list[Any] = []

    async def turn() -> None:
        deadline = anyio.current_time() + 0.3 if way == "deadline" else None
        with scope:
            try:
                completion = await chat.complete([5], greedy_params(6), request_id="turn", deadline=deadline)
                ends.append(completion.finish_reason)
            except Exception as error:
                ends.append(type(error).__name__)

    scope = anyio.CancelScope()
    async with parking_engine(tiny_model, folder) as engine:
        async with engine.session() as chat, anyio.create_task_group() as group:
            talk = Talk(chat, answers)
            await talk.turn(tokens(1, 40))
            await fill_memory(engine)
            reading.shut()
            group.start_soon(turn)
            await reading.wait_for_a_call()
            if way == "abort":
                group.start_soon(engine.abort, "turn")
            elif way == "cancel":
                scope.cancel()
            elif way == "close":
                group.start_soon(chat.aclose)
            await until(lambda: "turn" not in inside(engine).request_ids)
            await until(lambda: bool(ends) or scope.cancelled_caught)
            told = {"abort": ["abort"], "cancel": [], "close": ["abort"], "deadline": ["DeadlineExceededError"]}
            assert ends == told[way]
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            assert engine.statistics().kv_bytes >= 3 * BLOCK_BYTES
            reading.open()
            if way != "close":
                assert chat.token_ids == tuple(talk.history)
                await talk.turn([5], cached=45)
        await check_nothing_is_left(engine)


async def test_the_next_turn_begins_while_a_cancelled_one_s_session_is_read_back(
    tiny_model: Any, folder: Path, answers: Answers, reading: Gate
) -> None:
    async with parking_engine(tiny_model, folder) as engine:
        async with engine.session() as chat, anyio.create_task_group() as group:
            talk = Talk(chat, answers)
            await talk.turn(tokens(1, 40))
            await fill_memory(engine)
            reading.shut()
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as turn:
                    turn.start_soon(chat.complete, [5], greedy_params(6))
                    await reading.wait_for_a_call()
                    scope.cancel()
            group.start_soon(talk.turn, [6, 7], 6, 45)
            await until(lambda: engine.statistics().num_waiting == 1)
            reading.open()
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("closed", [True, False])
async def test_the_engine_is_left_while_a_session_is_written(
    tiny_model: Any, folder: Path, writing: Gate, closed: bool
) -> None:
    errors = []

    async def ask() -> None:
        with pytest.raises(EngineClosedError):
            await fill_memory(engine)
        errors.append(EngineClosedError)

    async with anyio.create_task_group() as group:
        async with parking_engine(tiny_model, folder) as engine:
            chat = engine.session()
            await chat.complete(tokens(1, 40), greedy_params(6))
            writing.shut()
            group.start_soon(ask)
            await writing.wait_for_a_call()
            if closed:
                await chat.aclose()
            group.start_soon(open_soon, writing)
        statistics = engine.statistics()
    assert errors == [EngineClosedError]
    assert (statistics.num_leases, statistics.bytes_in_use, statistics.num_sessions) == (0, 0, 0)


async def open_soon(gate: Gate) -> None:
    for _ in range(50):
        await anyio.lowlevel.checkpoint()
    gate.open()


@pytest.mark.parametrize("closed", [True, False])
async def test_the_engine_is_left_while_a_session_is_read_back(
    tiny_model: Any, folder: Path, reading: Gate, closed: bool
) -> None:
    ends = []

    async def turn() -> None:
        try:
            ends.append((await chat.complete([5], greedy_params(6), request_id="turn")).finish_reason)
        except EngineClosedError:
            ends.append("left")

    async with anyio.create_task_group() as group:
        async with parking_engine(tiny_model, folder) as engine:
            chat = engine.session()
            await chat.complete(tokens(1, 40), greedy_params(6))
            await fill_memory(engine)
            reading.shut()
            group.start_soon(turn)
            await reading.wait_for_a_call()
            if closed:
                group.start_soon(chat.aclose)
                await until(lambda: "turn" not in inside(engine).request_ids)
            group.start_soon(open_soon, reading)
        statistics = engine.statistics()
    assert len(ends) == 1
    assert (statistics.num_leases, statistics.bytes_in_use, statistics.num_sessions) == (0, 0, 0)


async def test_the_engine_is_left_with_parked_sessions(tiny_model: Any, folder: Path) -> None:
    async with parking_engine(tiny_model, folder) as engine:
        chat = engine.session()
        await chat.complete(tokens(1, 40), greedy_params(6))
        await fill_memory(engine)
        assert engine.statistics().num_parked == 1
    assert engine.statistics().num_leases == 0
    await chat.aclose()


# What fails


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
async def test_a_disk_that_takes_nothing(
    tiny_model: Any, folder: Path, answers: Answers, writing: Gate, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Sessions lose what they kept and compute it again; nobody sees an error."""
    writing.error = OSError(code, os.strerror(code))
    async with parking_engine(tiny_model, folder) as engine:
        async with engine.session() as one, engine.session() as two:
            talks = [Talk(one, answers), Talk(two, answers)]
            for talk in talks:
                await talk.turn(tokens(1, 40))
            await fill_memory(engine)
            assert (engine.statistics().num_parked, engine.statistics().num_parkings) == (0, 0)
            assert "computed again" in caplog.text
            for talk in talks:
                await talk.turn([5], cached=0)
            writing.error = None  # there is room again
            await fill_memory(engine)
            assert engine.statistics().num_parked == 2
            for talk in talks:
                await talk.turn([5], cached=52)
        await check_nothing_is_left(engine)


@pytest.mark.parametrize("share_prefixes", [True, False])
async def test_a_disk_that_gives_nothing_back(
    tiny_model: Any, folder: Path, answers: Answers, reading: Gate, share_prefixes: bool
) -> None:
    async with parking_engine(tiny_model, folder, share_prefixes=share_prefixes) as engine:
        async with engine.session() as chat:
            talk = Talk(chat, answers)
            await talk.turn(tokens(1, 40))
            await fill_memory(engine)
            reading.error = OSError(errno.EIO, "gone")
            await talk.turn([5], cached=0)
            assert inside(engine).num_parking_slots == 0
            reading.error = None
            await fill_memory(engine)
            await talk.turn([5], cached=52)
        await check_nothing_is_left(engine)


async def test_a_parking_folder_that_is_not_there(tiny_model: Any, tmp_path: Path, answers: Answers) -> None:
    async with parking_engine(tiny_model, tmp_path / "nowhere") as engine:
        async with engine.session() as chat:
            talk = Talk(chat, answers)
            await talk.turn(tokens(1, 40))
            await fill_memory(engine)
            await talk.turn([5], cached=0)
        await check_nothing_is_left(engine)


async def test_a_read_that_fails_after_its_turn_was_cancelled(
    tiny_model: Any, folder: Path, answers: Answers, reading: Gate
) -> None:
    async with parking_engine(tiny_model, folder) as engine:
        async with engine.session() as chat:
            talk = Talk(chat, answers)
            await talk.turn(tokens(1, 40))
            await fill_memory(engine)
            reading.shut()
            with anyio.CancelScope() as scope:
                async with anyio.create_task_group() as turn:
                    turn.start_soon(chat.complete, [5], greedy_params(6))
                    await reading.wait_for_a_call()
                    scope.cancel()
            reading.error = OSError(errno.EIO, "gone")
            reading.open()
            await until(lambda: not inside(engine).request_ids)
            await talk.turn([5], cached=0)
        await check_nothing_is_left(engine)


# Everything at random


@pytest.mark.parametrize("seed", range(8))
async def test_sessions_at_random_on_a_disk_that_sometimes_fails(
    tiny_model: Any, folder: Path, answers: Answers, writing: Gate, reading: Gate, seed: int
) -> None:
    """Turns, half turns, edits, forks and closings of many sessions, in memory for two of them."""
    chosen = random.Random(seed)
    wrong: list[Any] = []

    async def turn(talk: Talk, num_tokens: int) -> None:
        try:
            await talk.turn(tokens(chosen.randrange(1000), chosen.randrange(1, 12)), num_tokens)
        except AssertionError as error:
            wrong.append(error)

    async def half_a_turn(talk: Talk) -> None:
        prompt = tokens(chosen.randrange(1000), chosen.randrange(1, 12))
        num_checkpoints = chosen.randrange(80)
        taken: list[int] = []

        async def take() -> None:
            async with aclosing(talk.chat.generate(prompt, greedy_params(8))) as chunks:
                async for chunk in chunks:
                    taken.extend(chunk.token_ids)

        async with anyio.create_task_group() as group:
            group.start_soon(take)
            for _ in range(num_checkpoints):
                await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
        if taken:
            talk.history += prompt
            if tuple(taken) != (await answers.to(talk.history, 8))[: len(taken)]:
                wrong.append((talk.history, taken))
            talk.history += taken
        if talk.chat.token_ids != tuple(talk.history):
            wrong.append((talk.chat.token_ids, talk.history))

    async def live(talk: Talk, depth: int = 0) -> None:
        async with talk.chat:
            for _ in range(chosen.randrange(3, 7)):
                if len(talk.history) > 80:
                    talk.history = talk.history[: chosen.randrange(80)]
                    talk.chat.edit(token_ids=talk.history)
                step = chosen.random()
                if step < 0.45:
                    await turn(talk, chosen.randrange(1, 9))
                elif step < 0.75:
                    await half_a_turn(talk)
                elif step < 0.87 and depth < 2:
                    group.start_soon(live, Talk(talk.chat.fork(), answers, list(talk.history)), depth + 1)
                elif step < 0.92:
                    broken = chosen.choice([writing, reading])
                    broken.error = OSError(errno.EIO, "now and then")
                    await turn(talk, 4)
                    broken.error = None
                else:
                    await engine.complete(tokens(seed, chosen.randrange(1, 100)), greedy_params(8))

    config = {
        "share_prefixes": bool(seed % 2),
        "max_tokens_per_sweep": chosen.choice([4, 16]),
        "max_sequences": chosen.choice([1, 3, 4]),
        "max_waiting": None,
    }
    async with parking_engine(tiny_model, folder, **config) as engine:
        async with anyio.create_task_group() as group:
            for _ in range(6):
                group.start_soon(live, Talk(engine.session(), answers))
        assert wrong == []
        assert engine.statistics().peak_bytes_in_use <= engine.statistics().memory_budget
        await check_nothing_is_left(engine)
