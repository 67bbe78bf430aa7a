"""The ring: its order, its warmth, and that nothing is lost of it, whatever fails or is cancelled."""

from __future__ import annotations

import errno
import gc
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch

from hermes_async.errors import ReadError, ShortReadError
from hermes_async.pipeload.agents import SweepAbandoned
from hermes_async.pipeload.stage import StageState
from hermes_async.pipeload.trace import Timeline, Trace
from hermes_async.storage.buffers import Buffer
from tests.engines import both_loops, until

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()

CONFIGURATIONS = [
    pytest.param({"agents": 1}, id="1 agent"),
    pytest.param({"agents": 2}, id="2 agents"),
    pytest.param({"agents": 3, "num_buffers": 2}, id="3 agents, 2 buffers"),
    pytest.param({"agents": 2, "num_buffers": 1}, id="2 agents, 1 buffer"),
    pytest.param({"agents": 2, "resident": (0, 3)}, id="2 of 6 resident"),
    pytest.param({"agents": 1, "resident": range(6), "num_buffers": 0}, id="all resident"),
    pytest.param({"agents": 4, "num_stages": 2}, id="more buffers than stages"),
]


@pytest.mark.parametrize("kwargs", CONFIGURATIONS)
async def test_every_sweep_sees_every_stage_s_own_bytes(make_rig: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    rig = make_rig(**kwargs)
    async with rig.pipeline.running():
        for _ in range(5):
            assert all(await rig.pipeline.sweep(rig.compute()))
        assert rig.pipeline.statistics.sweeps == 5
        await rig.settle()
        rig.check_integrity()
    statistics = rig.pipeline.statistics
    assert statistics.compute_seconds >= 0
    assert statistics.stall_seconds >= 0


async def test_the_ring_is_full_while_idle_and_goes_on_into_the_next_sweep(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(agents=2)
    statistics = rig.pipeline.read_statistics
    async with rig.pipeline.running():
        await rig.settle()
        assert rig.states() == ["ready"] * 3 + ["empty"] * 3
        for sweeps in range(1, 4):
            assert all(await rig.pipeline.sweep(rig.compute()))
            await rig.settle()
            assert rig.states() == ["ready"] * 3 + ["empty"] * 3
            assert repr(rig.pipeline) == f"<Pipeline of 6 stages: {{'ready': 3, 'empty': 3}}, {sweeps} sweeps>"
            assert rig.pool.statistics().num_free == 0
            assert statistics.num_reads == 3 + 6 * sweeps  # nothing is read twice
            assert statistics.bytes_read == sum(map(len, rig.expected * sweeps + rig.expected[:3]))


async def test_what_is_needed_first_is_read_first_and_a_full_ring_holds_up_only_what_is_streamed(
    make_rig: Callable[..., Any], disk: Any
) -> None:
    rig = make_rig(agents=1, num_stages=8, resident=(1, 4, 7))
    offsets = [stage.layout.ranges[0].offset // 4096 * 4096 for stage in rig.stages]
    read_at: list[int] = []

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        read_at.append(offset)
        return read()

    disk.on_read = on_read
    async with rig.pipeline.running():
        await rig.settle()
        assert read_at == [offsets[idx] for idx in (0, 1, 2, 4, 7)]
        assert all(await rig.pipeline.sweep(rig.compute()))
        await rig.settle()
        assert read_at[5:] == [offsets[idx] for idx in (3, 5, 6, 0, 2)]


async def test_a_full_ring_is_waited_for_and_what_becomes_resident_is_loaded_all_the_same(
    make_rig: Callable[..., Any],
) -> None:
    trace = Trace()
    rig = make_rig(agents=2, trace=trace)
    async with rig.pipeline.running():
        await rig.settle()
        rig.check_integrity()
        statistics = rig.ring.statistics()
        assert (sorted(statistics.holders), statistics.num_waiting) == (["0", "1", "2"], 1)
        await rig.pipeline.set_resident([rig.stages[5]])
        await rig.pipeline.wait_resident()
        assert rig.stages[5].lease is None
        assert all(await rig.pipeline.sweep(rig.compute()))
        await rig.settle()
        rig.check_integrity()
    waits = Timeline.of(trace.drain()).rows["waits for memory"]
    assert waits[0].name == "3"
    assert all(one.end <= other.start for one, other in pairwise(waits))


async def test_a_look_ends_the_wait_for_a_stage(
    make_rig: Callable[..., Any], gate: Callable[..., Any], sweeping: Callable[..., Any]
) -> None:
    rig = make_rig(agents=1)
    held = gate(rig.stages[0])
    looks: list[None] = []
    enter = rig.pipeline.enter

    def entering(stage: Any) -> Buffer:
        while (buffer := enter(stage)) is None:
            looks.append(None)
        return buffer

    rig.pipeline.enter = entering
    async with rig.pipeline.running(), sweeping(rig) as result:
        for num_looks in range(1, 4):
            rig.pipeline.look()
            await until(lambda num_looks=num_looks: len(looks) == num_looks)
        held.may_pass.set()
    assert result == [[True] * 6]
    assert len(looks) == 3


async def test_loads_held_back_do_not_begin_and_go_on_behind(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(agents=2, resident=(0, 3))
    async with rig.pipeline.running():
        with rig.pipeline.load_order.held_back():
            await rig.settle()
            assert rig.states() == ["empty"] * 6
        await rig.settle()
        assert rig.states() == ["ready"] * 5 + ["empty"]
        with pytest.raises(ZeroDivisionError), rig.pipeline.load_order.held_back():
            raise ZeroDivisionError
        assert all(await rig.pipeline.sweep(rig.compute()))


async def test_a_sweep_begins_before_the_resident_stages_are_there(
    make_rig: Callable[..., Any], gate: Callable[..., Any], sweeping: Callable[..., Any]
) -> None:
    rig = make_rig(agents=2, resident=(1, 4))
    held = gate(rig.stages[4])
    entered: list[int] = []
    async with rig.pipeline.running():
        async with sweeping(rig, None, entered.append) as result:
            await held.wait_entered()
            await until(lambda: len(entered) >= 4)
            await anyio.wait_all_tasks_blocked()
            assert entered == [0, 1, 2, 3]
            assert rig.pipeline.loads_resident
            held.may_pass.set()
        assert result == [[True] * 6]
        assert not rig.pipeline.loads_resident


async def test_waiting_for_the_resident_stages(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(agents=2, resident=(1, 4))
    async with rig.pipeline.running():
        await rig.pipeline.wait_resident()
        assert [rig.stages[idx].state for idx in (1, 4)] == [StageState.READY] * 2


async def test_resident_stages_are_read_once(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(resident=range(6), num_buffers=0)
    async with rig.pipeline.running():
        for _ in range(3):
            assert all(await rig.pipeline.sweep(rig.compute()))
        assert rig.pipeline.read_statistics.num_reads == 6
    assert all(stage.buffer is None for stage in rig.stages)


async def test_no_more_than_the_agents_read_at_once(make_rig: Callable[..., Any], disk: Any) -> None:
    rig = make_rig(agents=2, num_stages=8, num_buffers=8)
    lock, reading, most = threading.Lock(), 0, 0
    both = threading.Barrier(2)

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        nonlocal reading, most
        with lock:
            reading += 1
            most = max(most, reading)
        both.wait(30)
        count = read()
        both.wait(30)
        with lock:
            reading -= 1
        return count

    disk.on_read = on_read
    async with rig.pipeline.running():
        await rig.settle()
    assert most == 2


# Reads that fail


@pytest.mark.parametrize("agents", [1, 2])
@pytest.mark.parametrize("failing", [0, 1, 4, 5])
async def test_a_failed_read_surfaces_where_it_is_needed_and_is_tried_again(
    make_rig: Callable[..., Any], disk: Any, agents: int, failing: int
) -> None:
    rig = make_rig(agents=agents)
    (item,) = rig.stages[failing].layout.ranges
    base = item.offset // 4096 * 4096
    broken = True

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        if broken and offset == base:
            raise OSError(errno.EIO, "Input/output error")
        return read()

    disk.on_read = on_read
    async with rig.pipeline.running():
        for _ in range(3):
            entered: list[int] = []
            with pytest.raises(ReadError) as caught:
                await rig.pipeline.sweep(rig.compute(on_stage=entered.append))
            assert entered == list(range(failing))
            assert (caught.value.path, caught.value.offset, caught.value.errno) == (rig.path, item.offset, errno.EIO)
        await rig.settle()
        rig.check_integrity()
        assert rig.pipeline.statistics.sweeps == 0
        broken = False
        await rig.settle()
        for _ in range(2):
            assert all(await rig.pipeline.sweep(rig.compute()))
    assert rig.pipeline.statistics.sweeps == 2


async def test_a_failure_in_the_idle_ring_is_no_failure_of_the_next_sweep(
    make_rig: Callable[..., Any], disk: Any
) -> None:
    rig = make_rig(agents=2)
    fail = True

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        if fail:
            raise OSError(errno.EIO, "Input/output error")
        return read()

    disk.on_read = on_read
    async with rig.pipeline.running():
        await rig.settle()
        assert [stage.error is not None for stage in rig.stages] == [True] * 3 + [False] * 3
        fail = False
        assert all(await rig.pipeline.sweep(rig.compute()))


async def test_a_truncated_file_is_a_short_read(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(agents=1)
    data = rig.path.read_bytes()
    async with rig.pipeline.running():
        assert all(await rig.pipeline.sweep(rig.compute()))
        with rig.path.open("r+b") as file:
            file.truncate(rig.stages[4].layout.ranges[0].offset + 10)
        with pytest.raises(ShortReadError) as caught:
            await rig.pipeline.sweep(rig.compute())
        assert (caught.value.expected, caught.value.actual) == (len(rig.expected[4]), 10)
        with rig.path.open("r+b") as file:
            file.write(data)
        await rig.settle()
        assert all(await rig.pipeline.sweep(rig.compute()))


@pytest.mark.parametrize("agents", [1, 3])
async def test_a_resident_stage_that_fails_is_tried_again_by_the_next_sweep(
    make_rig: Callable[..., Any], disk: Any, agents: int
) -> None:
    rig = make_rig(agents=agents, resident=(0, 1, 2, 3))
    broken = True

    def on_read(path: Path, offset: int, read: Callable[[], int]) -> int:
        if broken:
            raise OSError(errno.EIO, "Input/output error")
        return read()

    disk.on_read = on_read
    async with rig.pipeline.running():
        with pytest.raises(ReadError):
            await rig.pipeline.wait_resident()
        for _ in range(2):
            with pytest.raises(ReadError):
                await rig.pipeline.sweep(rig.compute())
        await rig.settle()
        broken = False
        reads = rig.pipeline.read_statistics.num_reads
        assert all(await rig.pipeline.sweep(rig.compute()))
        await rig.settle()
        rig.check_integrity()
        assert rig.pipeline.read_statistics.num_reads - reads == 6 + min(agents + 1, 2)
    assert disk.num_open == 0
    assert all(stage.buffer is None for stage in rig.stages)


async def test_another_choice_of_what_stays(make_rig: Callable[..., Any], gate: Callable[..., Any]) -> None:
    rig = make_rig(agents=2, resident=(0, 3))
    held = gate(rig.stages[3])
    async with rig.pipeline.running():
        await held.wait_entered()
        await until(lambda: rig.stages[0].state is StageState.READY)
        async with anyio.create_task_group() as group:
            # One that is being read leaves, one that was not comes; nothing is waited for but the read.
            leaving = [(rig.stages[idx], rig.stages[idx].loaded) for idx in (0, 3)]
            group.start_soon(rig.pipeline.set_resident, [rig.stages[1], rig.stages[5]])
            await anyio.wait_all_tasks_blocked()
            assert [stage.buffer is buffer for stage, buffer in leaving] == [False, True]
            held.may_pass.set()
        assert [set(bytes(buffer.view)) for _, buffer in leaving] == [{0}, {0}]
        assert [stage.idx for stage in rig.stages if stage.resident] == [1, 5]
        for _ in range(2):
            assert all(await rig.pipeline.sweep(rig.compute()))
        await rig.settle()
        rig.check_integrity()
        reads = rig.pipeline.read_statistics.num_reads
        assert all(await rig.pipeline.sweep(rig.compute()))
        await rig.settle()
        assert rig.pipeline.read_statistics.num_reads - reads == 4


async def test_stages_that_stay_share_their_memory_and_one_that_leaves_gives_back_its_own(
    make_rig: Callable[..., Any],
) -> None:
    rig = make_rig(agents=2, resident=(1, 4))
    async with rig.pipeline.running():
        assert all(await rig.pipeline.sweep(rig.compute()))
        leaving, staying = (rig.stages[idx].loaded for idx in (1, 4))
        first, second = (buffer.tensor(0, torch.uint8, (1,)).data_ptr() for buffer in (leaving, staying))
        assert second == first + leaving.nbytes
        await rig.pipeline.set_resident([rig.stages[4]])
        assert set(bytes(leaving.view)) == {0}
        assert rig.stages[4].loaded is staying
        assert all(await rig.pipeline.sweep(rig.compute()))


async def test_a_file_that_is_not_there(make_rig: Callable[..., Any], disk: Any) -> None:
    rig = make_rig()
    rig.path.unlink()
    with pytest.raises(ReadError) as caught:
        async with rig.pipeline.running():
            pytest.fail("entered")
    assert (caught.value.path, caught.value.errno) == (rig.path, errno.ENOENT)


async def test_a_file_that_is_removed_later_is_still_read(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(agents=2)
    async with rig.pipeline.running():
        rig.path.unlink()
        for _ in range(2):
            assert all(await rig.pipeline.sweep(rig.compute()))


async def test_an_error_of_the_computation_is_itself_and_the_ring_starts_over(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(agents=2)

    def fail(idx: int) -> None:
        if idx == 3:
            raise ZeroDivisionError

    async with rig.pipeline.running():
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                await rig.pipeline.sweep(rig.compute(on_stage=fail))
            assert all(await rig.pipeline.sweep(rig.compute()))
        await rig.settle()
        rig.check_integrity()


async def test_an_error_of_the_block_comes_out_as_itself(make_rig: Callable[..., Any]) -> None:
    rig = make_rig()
    with pytest.raises(ZeroDivisionError):
        async with rig.pipeline.running():
            raise ZeroDivisionError


# Models that go another way than was known


@pytest.mark.parametrize("kwargs", [{"agents": 1}, {"agents": 2}, {"agents": 2, "num_buffers": 1}, {"resident": (2,)}])
@pytest.mark.parametrize(
    "order",
    [
        pytest.param([5, 4, 3, 2, 1, 0], id="backwards"),
        pytest.param([0, 2, 1, 4, 3, 5], id="pairs swapped"),
        pytest.param([1, 2, 3, 4, 5, 0], id="shifted"),
        pytest.param([0, 1, 2, 0, 1, 2, 3, 4, 5], id="some twice"),
        pytest.param([0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], id="each twice in turn"),
        pytest.param([0, 1, 2, 3, 4, 5, 0], id="the first again at the end"),
        pytest.param([0, 2, 4], id="some skipped"),
        pytest.param([3], id="only one"),
        pytest.param([0, 1, 2, 3, 4], id="the last skipped"),
        pytest.param([5, 5, 0, 5], id="one more often than the others"),
    ],
)
async def test_another_order_is_learned(make_rig: Callable[..., Any], kwargs: dict[str, Any], order: list[int]) -> None:
    rig = make_rig(**kwargs)
    async with rig.pipeline.running():
        for _ in range(3):
            assert await rig.pipeline.sweep(rig.compute(order)) == [True] * len(order)
        await rig.settle()
        rig.check_integrity()
        reads = rig.pipeline.read_statistics.num_reads
        assert all(await rig.pipeline.sweep(rig.compute(order)))
        await rig.settle()
        num_streamed = sum(not rig.stages[idx].resident for idx in order)
        assert rig.pipeline.read_statistics.num_reads - reads == num_streamed  # known now: no read is in vain


async def test_orders_that_change_from_sweep_to_sweep(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(agents=2)
    async with rig.pipeline.running():
        for order in (
            [0, 1, 2, 3, 4, 5],
            [5, 3, 1],
            [0, 1, 2, 3, 4, 5],
            [2, 2, 2],
            [4, 1, 4, 1, 0],
            [0, 1, 2, 3, 4, 5],
        ):
            assert await rig.pipeline.sweep(rig.compute(order)) == [True] * len(order)


async def test_a_sweep_that_visits_nothing_leaves_the_ring_as_it_is(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(agents=2)
    async with rig.pipeline.running():
        for _ in range(2):
            assert await rig.pipeline.sweep(rig.compute([])) == []
            await rig.settle()
            assert all(await rig.pipeline.sweep(rig.compute()))


async def test_the_model_skips_to_a_stage_that_is_being_loaded(
    make_rig: Callable[..., Any], gate: Callable[..., Any], sweeping: Callable[..., Any]
) -> None:
    rig = make_rig(agents=2)
    held = gate(rig.stages[2])
    async with rig.pipeline.running():
        await held.wait_entered()
        async with sweeping(rig, [0, 2, 1, 3, 4, 5]) as result:
            while rig.stages[0].state is not StageState.EMPTY and not rig.stages[2].stale:
                await anyio.wait_all_tasks_blocked()
            held.may_pass.set()
        assert result == [[True] * 6]


# Sweeps that are abandoned or cancelled


async def test_abandoned_while_it_waits_for_a_stage(
    make_rig: Callable[..., Any], gate: Callable[..., Any], sweeping: Callable[..., Any]
) -> None:
    rig = make_rig(agents=1)
    held = gate(rig.stages[0])
    async with rig.pipeline.running():
        async with sweeping(rig) as result:
            await held.wait_entered()
            await anyio.wait_all_tasks_blocked()
            rig.pipeline.abandon()
        assert result == [SweepAbandoned]
        assert rig.stages[0].state is StageState.LOADING
        # The same stage, whose first load was given up, is what the next sweep waits for.
        async with sweeping(rig) as result:
            await anyio.wait_all_tasks_blocked()
            held.may_pass.set()
        assert result == [[True] * 6]
        await rig.settle()
        rig.check_integrity()


@pytest.mark.parametrize("abandoned_at", range(6))
async def test_abandoned_while_it_computes(make_rig: Callable[..., Any], abandoned_at: int) -> None:
    rig = make_rig(agents=2)
    entered: list[int] = []

    def on_stage(idx: int) -> None:
        entered.append(idx)
        if idx == abandoned_at:
            rig.pipeline.abandon()

    async with rig.pipeline.running():
        for _ in range(3):
            entered.clear()
            if abandoned_at < 5:
                with pytest.raises(SweepAbandoned):
                    await rig.pipeline.sweep(rig.compute(on_stage=on_stage))
            else:  # there is no next stage at which it could be noticed
                assert all(await rig.pipeline.sweep(rig.compute(on_stage=on_stage)))
            assert entered == list(range(abandoned_at + 1))
            assert all(await rig.pipeline.sweep(rig.compute()))
        await rig.settle()
        rig.check_integrity()


async def test_abandon_between_sweeps_means_nothing(make_rig: Callable[..., Any]) -> None:
    rig = make_rig()
    async with rig.pipeline.running():
        rig.pipeline.abandon()
        assert all(await rig.pipeline.sweep(rig.compute()))


async def test_a_cancelled_sweep_ends_within_a_stage(
    make_rig: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(agents=2)
    abandoned = threading.Event()
    abandon = rig.pipeline.abandon
    monkeypatch.setattr(rig.pipeline, "abandon", lambda: (abandon(), abandoned.set()))
    token = anyio.lowlevel.current_token()
    async with rig.pipeline.running():
        for cancelled_at in range(5):
            entered: list[int] = []
            with anyio.CancelScope() as scope:

                def on_stage(
                    idx: int, at: int = cancelled_at, scope: anyio.CancelScope = scope, entered: list[int] = entered
                ) -> None:
                    entered.append(idx)
                    if idx == at:
                        anyio.from_thread.run_sync(scope.cancel, token=token)
                        assert abandoned.wait(30)  # the loop cancels the task a moment later
                        abandoned.clear()

                await rig.pipeline.sweep(rig.compute(on_stage=on_stage))
            assert scope.cancelled_caught
            assert entered == list(range(cancelled_at + 1))
            assert all(await rig.pipeline.sweep(rig.compute()))
        await rig.settle()
        rig.check_integrity()


async def test_a_sweep_cancelled_while_it_waits_for_a_stage(
    make_rig: Callable[..., Any], gate: Callable[..., Any], sweeping: Callable[..., Any]
) -> None:
    rig = make_rig(agents=1)
    held = gate(rig.stages[0])
    async with rig.pipeline.running():
        await held.wait_entered()
        with anyio.CancelScope() as scope:
            async with sweeping(rig):
                await anyio.wait_all_tasks_blocked()
                scope.cancel()
        assert rig.stages[0].state is StageState.LOADING
        held.may_pass.set()
        assert all(await rig.pipeline.sweep(rig.compute()))


@pytest.mark.parametrize("agents", [1, 2])
async def test_cancelled_at_each_event_nothing_is_lost(
    make_rig: Callable[..., Any],
    disk: Any,
    agents: int,
    monkeypatch: pytest.MonkeyPatch,
    anyio_backend: tuple[str, dict[str, Any]],
) -> None:
    """Events are the beginning and the end of each read, and each stage's computation, over two sweeps."""
    closed: set[int] = set()
    close = Buffer.close
    monkeypatch.setattr(Buffer, "close", lambda self: (closed.add(id(self)), close(self))[1])
    num_events = 1
    cancel_at = 0
    while cancel_at < num_events:
        rig = make_rig(num_stages=4, agents=agents, resident=(1,))
        scope = anyio.CancelScope()
        token = anyio.lowlevel.current_token()
        lock, events = threading.Lock(), 0

        def event(scope: anyio.CancelScope = scope, token: Any = token, lock: Any = lock, at: int = cancel_at) -> None:
            nonlocal events
            with lock:
                now, events = events, events + 1
            if now == at:
                anyio.from_thread.run_sync(scope.cancel, token=token)

        def on_read(path: Path, offset: int, read: Callable[[], int], event: Callable[[], None] = event) -> int:
            event()
            count = read()
            event()
            return count

        disk.on_read = on_read
        with scope:
            async with rig.pipeline.running():
                for _ in range(2):
                    assert all(await rig.pipeline.sweep(rig.compute(on_stage=lambda idx, event=event: event())))
        # The last few may come after the block was left by itself, or not at all.
        num_events = max(num_events, events if not scope.cancelled_caught else cancel_at + 2)
        assert rig.states() == ["empty"] * 4
        assert all(stage.buffer is None for stage in rig.stages)
        assert {id(buffer) for buffer in rig.buffers} <= closed
        ring = rig.ring.statistics()
        assert (ring.num_leases, ring.num_waiting, ring.bytes_in_use) == (0, 0, 0)
        rig.ring.release()
        assert rig.governor.statistics().num_leases == 0
        assert disk.num_open == 0
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("hermes")]
        cancel_at += 1
    assert cancel_at > 2 * 3 * 2 + 2 * 4


async def test_everything_is_closed_behind_it(make_rig: Callable[..., Any]) -> None:
    rig = make_rig(agents=2)
    async with rig.pipeline.running():
        assert all(await rig.pipeline.sweep(rig.compute()))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hermes")]
    del rig
    gc.collect()  # an unclosed stream would warn here
