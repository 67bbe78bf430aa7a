"""Shards that change, end or fail while the engine runs: one request's error, and the engine goes on."""

from __future__ import annotations

import errno
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface

from hermes_async import Engine, ReadError, RequestEvent, ShortReadError
from tests.engines import both_loops, settle, until
from tests.inside import inside

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()


async def check_answers(engine: Engine, model: Any) -> None:
    for idx in (1, 3):
        completion = await engine.complete(model.prompts[idx], model.params)
        assert completion.token_ids == model.references[idx]
    statistics = engine.statistics()
    assert (statistics.num_running, statistics.num_waiting, statistics.num_leases) == (0, 0, 4)


async def test_a_shard_truncated_while_running(tiny_model: Any) -> None:
    data = tiny_model.shard.read_bytes()
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        chunks = engine.generate(tiny_model.prompts[1], tiny_model.params)
        await anext(chunks)
        with tiny_model.shard.open("r+b") as file:
            file.truncate(len(data) // 2)
        with pytest.raises(ShortReadError) as caught:
            async for _ in chunks:
                pass
        assert caught.value.path == tiny_model.shard
        assert caught.value.actual < caught.value.expected
        assert caught.value.offset + caught.value.expected > len(data) // 2
        with pytest.raises(ReadError):
            await engine.complete(tiny_model.prompts[1], tiny_model.params)
        with tiny_model.shard.open("r+b") as file:
            file.write(data)
        with pytest.raises(ReadError, match="was changed after its header was read"):  # what it holds now, none knows
            await engine.complete(tiny_model.prompts[1], tiny_model.params)
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        await check_answers(engine, tiny_model)


async def test_a_shard_overwritten_in_place_while_running(tiny_model: Any) -> None:
    data = tiny_model.shard.read_bytes()
    header_end = 8 + int.from_bytes(data[:8], "little")
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        await check_answers(engine, tiny_model)
        with tiny_model.shard.open("r+b") as file:
            file.seek(header_end)
            file.write(bytes(len(data) - header_end))
        with pytest.raises(ReadError, match="was changed after its header was read: it was written to") as caught:
            await engine.complete(tiny_model.prompts[1], tiny_model.params)
        assert caught.value.path == tiny_model.shard


@pytest.mark.parametrize("how", ["replaced", "overwritten", "longer"])
async def test_a_shard_changed_between_its_header_and_its_opening(
    tiny_model: Any, disk: Any, how: str, tmp_path: Path
) -> None:
    data = tiny_model.shard.read_bytes()

    def on_open(path: Path) -> None:
        if how == "replaced":
            other = tmp_path / "other"
            other.write_bytes(data[:-4] + b"1234")
            other.replace(path)
        else:
            path.write_bytes(data[:-4] + b"1234" + b"5" * (how == "longer"))

    disk.on_open = on_open
    with pytest.raises(ReadError, match="was changed after its header was read") as caught:
        async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config):
            pytest.fail("entered")
    assert caught.value.path == tiny_model.shard
    assert disk.num_open == 0


async def test_a_shard_replaced_while_running_goes_on_as_it_was(tiny_model: Any, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(tiny_model.shard.read_bytes()[:-4] + b"1234")
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        other.replace(tiny_model.shard)
        await check_answers(engine, tiny_model)


async def test_a_shard_removed_while_running(tiny_model: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        tiny_model.shard.unlink()
        await check_answers(engine, tiny_model)


async def test_an_io_error_ends_the_requests_of_its_sweep_and_no_others(tiny_model: Any, disk: Any) -> None:
    fail = False

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        if fail:
            raise OSError(errno.EIO, "Input/output error")
        return read()

    disk.on_read = on_read
    errors = []

    async def user(idx: int) -> None:
        try:
            await engine.complete(tiny_model.prompts[idx], tiny_model.params)
        except ReadError as error:
            errors.append(error)

    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        for _ in range(3):
            errors.clear()
            await check_answers(engine, tiny_model)
            fail = True
            async with anyio.create_task_group() as group:
                for idx in range(3):
                    group.start_soon(user, idx)
            assert len(errors) == 3
            for error in errors:
                assert (error.path, error.errno) == (tiny_model.shard, errno.EIO)
                assert str(error.offset) in str(error)
                assert str(tiny_model.shard) in str(error)
            fail = False
            await settle(engine)


async def test_after_an_io_error_its_prefix_goes_on_where_the_last_sweep_left_it(tiny_model: Any, disk: Any) -> None:
    """Two come with one prompt, of three sweeps; the one that computes it ends with the second."""
    told = False

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        if inside(engine).num_sweeps == 1 and not told:
            raise OSError(errno.EIO, "Input/output error")
        return read()

    def on_event(event: RequestEvent) -> None:
        nonlocal told
        told = told or event.kind == "finished"

    ends: dict[str, Any] = {}

    async def user(name: str) -> None:
        try:
            ends[name] = await engine.complete(tiny_model.prompts[4], tiny_model.params, request_id=name)
        except ReadError as error:
            ends[name] = error

    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config, on_event=on_event) as engine:
        disk.on_read = on_read
        async with anyio.create_task_group() as group:
            group.start_soon(user, "leader")
            await until(lambda: "leader" in inside(engine).request_ids)
            group.start_soon(user, "follower")
        assert isinstance(ends["leader"], ReadError)
        assert ends["follower"].token_ids == tiny_model.references[4]
        await settle(engine)
        await check_answers(engine, tiny_model)


@pytest.mark.parametrize("resident", [True, False])
async def test_an_io_error_of_what_stays(tiny_model: Any, disk: Any, resident: bool) -> None:
    """All of it, or only the vectors that always stay: the engine goes on, and reads them again."""
    before = set(AttentionInterface._global_mapping)
    broken = True

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        if broken:
            raise OSError(errno.EIO, "Input/output error")
        return read()

    disk.on_read = on_read
    config = None if resident else tiny_model.config
    async with Engine(tiny_model.path, memory_budget="8MiB", config=config) as engine:
        for _ in range(2):
            with pytest.raises(ReadError) as caught:
                await engine.complete(tiny_model.prompts[1], tiny_model.params)
            assert (caught.value.path, caught.value.errno) == (tiny_model.shard, errno.EIO)
        broken = False
        await settle(engine)
        await check_answers(engine, tiny_model)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hermes")]
    assert set(AttentionInterface._global_mapping) == before


async def test_the_embedding_s_own_shard_cannot_be_opened(tiny_model: Any, disk: Any, tmp_path: Path) -> None:
    """It is opened after the agents have started; even so no group comes out."""
    path = tmp_path / "sharded"
    shutil.copytree(tiny_model.path, path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    embedding = "model.embed_tokens.weight"
    save_file({embedding: tensors.pop(embedding)}, path / "embedding.safetensors")
    save_file(tensors, path / "rest.safetensors")

    def on_open(file: Path) -> None:
        if file.name == "embedding.safetensors":
            raise OSError(errno.EIO, "Input/output error")

    disk.on_open = on_open
    with pytest.raises(ReadError) as caught:
        async with Engine(path, memory_budget="8MiB", config=tiny_model.config):
            pytest.fail("entered")
    assert caught.value.path.name == "embedding.safetensors"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hermes")]
