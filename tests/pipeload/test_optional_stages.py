"""Stages that only some sweeps need: they are read in the sweeps that ask for them, and cost the others nothing."""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest

from hermes_async.errors import ReadError
from hermes_async.pipeload.agents import SweepAbandoned
from tests.engines import until

pytestmark = pytest.mark.anyio

GROUPS = [None, "vision", "vision", "vision", None, "audio", None, None, None]
TEXT = [idx for idx, group in enumerate(GROUPS) if group is None]
SWEEPS: list[set[str]] = [set(), {"vision"}, set(), {"vision"}, {"vision", "audio"}, {"audio"}, set()]


def visited(*groups: str) -> list[int]:
    return [idx for idx, group in enumerate(GROUPS) if group is None or group in groups]


def make(make_rig: Callable[..., Any], **kwargs: Any) -> Any:
    return make_rig(len(GROUPS), groups=GROUPS, **kwargs)


async def sweep(rig: Any, groups: Collection[str], order: list[int] | None = None, **kwargs: Any) -> None:
    order = visited(*groups) if order is None else order
    with anyio.fail_after(30):
        assert await rig.pipeline.sweep(rig.compute(order, **kwargs), groups) == [True] * len(order)


@pytest.mark.parametrize("resident", [(), (1, 4), (0, 4, 6, 7, 8)], ids=["streamed", "some", "all of the text"])
@pytest.mark.parametrize(("agents", "num_buffers"), [(1, 1), (1, 2), (2, 1), (2, 3), (3, 12)])
async def test_any_sweeps_in_any_ring(
    make_rig: Callable[..., Any], resident: Collection[int], agents: int, num_buffers: int
) -> None:
    rig = make(make_rig, resident=resident, agents=agents, num_buffers=num_buffers)
    async with rig.pipeline.running():
        for groups in SWEEPS:
            await sweep(rig, groups)
        for groups in SWEEPS:
            await rig.settle()
            rig.check_integrity()
            ring = [stage for stage in rig.stages if not stage.resident and stage.state.value == "ready"]
            assert all(stage.group is None for stage in ring)
            assert len(ring) == min(num_buffers, len([idx for idx in TEXT if idx not in resident]))
            await sweep(rig, groups)
        assert rig.pipeline.streams is (resident != (0, 4, 6, 7, 8))


async def test_only_sweeps_that_ask_for_a_group_read_it(make_rig: Callable[..., Any]) -> None:
    rig = make(make_rig, agents=1)
    async with rig.pipeline.running():
        await rig.settle()
        reads = [rig.pipeline.read_statistics.num_reads]
        for groups in SWEEPS:
            await sweep(rig, groups)
            await rig.settle()
            reads.append(rig.pipeline.read_statistics.num_reads)
    # Two text stages were loaded ahead. The second one gives way to the vision tower, and is read again.
    again = [0, 1, 0, 1, 1, 0, 0]
    expected = [len(visited(*groups)) + more for groups, more in zip(SWEEPS, again, strict=True)]
    assert [after - before for before, after in pairwise(reads)] == expected


async def test_a_stage_that_is_being_read_gives_way_when_its_read_has_ended(
    make_rig: Callable[..., Any], gate: Callable[..., Any]
) -> None:
    rig = make(make_rig, agents=2, num_buffers=2)
    held = gate(rig.stages[4])
    async with rig.pipeline.running():
        await held.wait_entered()
        async with anyio.create_task_group() as group:
            group.start_soon(sweep, rig, {"vision"})
            await until(lambda: rig.pipeline.load_order.entered_idx == 3)
            assert rig.stages[4].stale
            held.may_pass.set()
        await rig.settle()
        rig.check_integrity()


async def test_a_group_that_was_not_asked_for_is_read_all_the_same(make_rig: Callable[..., Any]) -> None:
    rig = make(make_rig, agents=2)
    async with rig.pipeline.running():
        for _ in range(2):
            await sweep(rig, (), visited("vision"))
            await sweep(rig, ())
            await rig.settle()
            assert rig.states()[1:4] == ["empty"] * 3
        assert [stage.idx for stage in rig.pipeline.load_order.cycle] == list(range(len(GROUPS)))


@pytest.mark.parametrize("order", [TEXT, [0, 1, *TEXT[1:]], [0, 1, 2, *TEXT[1:]]], ids=["none", "one", "two"])
async def test_stages_that_were_asked_for_may_be_passed_over(make_rig: Callable[..., Any], order: list[int]) -> None:
    """As when a call with an image ends early, and those beside it go on."""
    rig = make(make_rig, agents=1, num_buffers=2)
    async with rig.pipeline.running():
        for _ in range(2):
            await sweep(rig, {"vision", "audio"}, order)
            await rig.settle()
            rig.check_integrity()
            assert [stage.idx for stage in rig.pipeline.load_order.cycle] == list(range(len(GROUPS)))
        await sweep(rig, {"vision", "audio"})
        await sweep(rig, ())


async def test_a_sweep_that_computes_nothing_of_what_it_asked_for_leaves_nothing_in_the_ring(
    make_rig: Callable[..., Any],
) -> None:
    rig = make(make_rig, agents=1, resident=TEXT, num_buffers=1)
    token = anyio.lowlevel.current_token()
    async with rig.pipeline.running():
        for groups in ({"audio"}, {"vision"}, {"audio"}):
            await rig.pipeline.wait_resident()
            read = rig.pipeline.read_statistics.num_reads

            def waits(read: int = read) -> list[bool]:
                anyio.from_thread.run(until, lambda: rig.pipeline.read_statistics.num_reads > read, token=token)
                return rig.compute(TEXT)()

            assert all(await rig.pipeline.sweep(waits, groups))
            await rig.settle()
            assert [rig.stages[idx].state.value for idx in (1, 2, 3, 5)] == ["empty"] * 4
            rig.check_integrity()
        await sweep(rig, {"vision", "audio"})


async def test_an_abandoned_sweep_and_another_resident_set(make_rig: Callable[..., Any]) -> None:
    rig = make(make_rig, agents=2)

    def abandon(idx: int) -> None:
        if idx == 2:
            rig.pipeline.abandon()

    async with rig.pipeline.running():
        for resident in ([], [rig.stages[1], rig.stages[4]], [rig.stages[0]]):
            await rig.pipeline.set_resident(resident)
            with pytest.raises(SweepAbandoned):
                await sweep(rig, {"vision"}, on_stage=abandon)
            await rig.settle()
            rig.check_integrity()
            for groups in SWEEPS:
                await sweep(rig, groups)


async def test_a_read_that_fails_ends_only_the_sweeps_that_need_the_stage(
    make_rig: Callable[..., Any], disk: Any
) -> None:
    rig = make(make_rig, agents=2)
    (item,) = rig.stages[2].layout.ranges

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        if offset == item.offset // 4096 * 4096:
            raise OSError(errno.EIO, "Input/output error")
        return read()

    disk.on_read = on_read
    async with rig.pipeline.running():
        for _ in range(2):
            with pytest.raises(ReadError):
                await sweep(rig, {"vision"})
            await sweep(rig, {"audio"})
            await sweep(rig, ())
        await rig.settle()
        rig.check_integrity()


async def test_optional_stages_that_are_resident_are_read_last_and_once(
    make_rig: Callable[..., Any], disk: Any
) -> None:
    rig = make(make_rig, agents=1, resident=range(len(GROUPS)), num_buffers=0)
    offsets = {stage.layout.ranges[0].offset // 4096 * 4096: stage.idx for stage in rig.stages}
    read_idx: list[int] = []

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        read_idx.append(offsets[offset])
        return read()

    disk.on_read = on_read
    async with rig.pipeline.running():
        await rig.pipeline.wait_resident()
        for groups in SWEEPS:
            await sweep(rig, groups)
    assert read_idx == [*TEXT, 1, 2, 3, 5]
