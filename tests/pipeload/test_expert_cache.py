"""The cache of experts: whatever is asked for, left, forgotten and fails, in any order, and what it keeps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from hermes_async.errors import ReadError
from hermes_async.pipeload.expert_cache import ExpertCache
from hermes_async.pipeload.expert_policy import slot_sizes
from hermes_async.pipeload.governor import MemoryGovernor
from hermes_async.pipeload.stage import Stage, StageLayout, StageState
from hermes_async.storage.tensor_spec import TensorSpec

PAGE = 4096


class Rig:
    """A cache of layers of experts, with what the pipeline's agents do to it, one step at a time.

    Args:
        pages: Of each expert, by layer.
        slots: Pages of the cache.
    """

    def __init__(self, pages: Sequence[Sequence[int]], slots: int) -> None:
        self.outer = MemoryGovernor(1000 * PAGE)
        self.memory = self.outer.part("experts", slots * PAGE)
        self.layers = [
            [_expert(f"{layer}.{idx}", count * PAGE) for idx, count in enumerate(counts)]
            for layer, counts in enumerate(pages)
        ]
        self.cache = ExpertCache(self.layers, self.memory)
        self.loading: list[Stage] = []
        self.loads: list[str] = []

    def start_load(self) -> bool:
        """What a loading agent does; False if there is nothing to read, or no place for it."""
        found = self.cache.next_asked() or self.cache.next_expected()
        if found is None:
            return False
        expert, victims = found
        for victim in victims:
            assert victim.state is StageState.READY
            self.free(victim)
        expert.start_loading(*self.cache.take(expert))
        self.loading.append(expert)
        self.loads.append(expert.name)
        return True

    def end_load(self, expert: Stage, error: ReadError | None = None) -> None:
        """What the agent does when the read has ended."""
        self.loading.remove(expert)
        if error is not None and not self.cache.failed(expert):
            self.free(expert)
            return
        expert.set_ready(error)
        if error is None:
            self.cache.loaded(expert)

    def free(self, expert: Stage) -> None:
        """What the daemon agent does."""
        buffer, lease = expert.clear()
        assert lease is not None
        lease.release()
        self.cache.give_back(expert, buffer)

    def enter(self, experts: Sequence[Stage]) -> Stage | None:
        """What the inference agent can enter now."""
        return next((one for one in experts if self.cache.holds(one) and one.state is StageState.READY), None)

    def end_sweep(self) -> None:
        for expert in self.cache.end_sweep():
            assert expert.error is not None
            self.free(expert)

    def visit(self, layer: int, chosen: Sequence[int]) -> None:
        """One call computes these experts of a layer, while one agent reads."""
        missing = [self.layers[layer][idx] for idx in chosen]
        self.cache.ask(missing)
        while missing:
            expert = self.enter(missing)
            if expert is None:
                assert self.start_load(), f"nothing is READY of {missing}, and nothing is read"
                self.end_load(self.loading[0])
                continue
            self.cache.leave(expert)
            missing.remove(expert)

    def sweep(self, routes: Sequence[Sequence[int]]) -> None:
        """Visits each layer once."""
        for layer, chosen in enumerate(routes):
            self.visit(layer, chosen)
        self.end_sweep()

    @property
    def loaded(self) -> set[str]:
        """Names of the experts in memory, or on their way there."""
        return {expert.name for expert in self.cache.experts if expert.state is not StageState.EMPTY}

    def check_integrity(self) -> None:
        """The governor knows of every expert in memory, and of nothing else; they fit in the budget."""
        statistics = self.memory.statistics()
        assert statistics.bytes_in_use <= statistics.budget_bytes
        assert statistics.peak_bytes_in_use <= 1000 * PAGE
        assert set(statistics.holders) == self.loaded
        assert statistics.num_leases == len(self.loaded)
        buffers = [id(expert.buffer) for expert in self.cache.experts if expert.buffer is not None]
        assert len(set(buffers)) == len(buffers) == len(self.loaded)

    def close(self) -> None:
        for expert in self.cache.experts:
            if expert.state is not StageState.EMPTY:
                self.free(expert)
        self.cache.close_free()
        self.check_integrity()
        assert not self.loaded


def _expert(name: str, nbytes: int) -> Stage:
    spec = TensorSpec(name, Path("weights"), 0, nbytes, torch.uint8, (nbytes,))
    return Stage(0, StageLayout.of(name, [("weight", spec)]), resident=False, is_expert=True)


def _eio() -> ReadError:
    return ReadError("Input/output error", path=Path("weights"), offset=0)


@pytest.mark.parametrize("seed", range(8))
def test_any_calls_in_any_order(seed: int) -> None:
    """Two calls at a time, several agents, reads that fail, sweeps that are given up, other budgets."""
    chosen = random.Random(seed)
    sizes = chosen.choice([[[2] * 6, [2] * 6], [[2] * 5, [3] * 4, [1] * 8]])
    largest = max(slot_sizes([[pages * PAGE for pages in layer] for layer in sizes])) // PAGE
    rig = Rig(sizes, chosen.randint(largest, 4 * largest))
    num_computed = num_failed = 0
    for _ in range(60):
        calls: list[list[Stage]] = []
        gives_up = chosen.random() < 0.1
        error: ReadError | None = None
        for layer in rig.layers:
            if error is not None:
                break
            calls = [chosen.sample(layer, chosen.randint(1, len(layer))) for _ in range(chosen.randint(1, 2))]
            for call in calls:
                rig.cache.ask(call)
            idle = 0
            while any(calls) and error is None:
                assert idle < 200, "nobody can go on"
                idle += 1
                step = chosen.random()
                if step < 0.4 and len(rig.loading) < 3:
                    rig.start_load()
                elif step < 0.6 and rig.loading:
                    fails = chosen.random() < 0.03
                    num_failed += fails
                    rig.end_load(chosen.choice(rig.loading), _eio() if fails else None)
                elif step < 0.63 and gives_up:
                    call = chosen.choice(calls)
                    rig.cache.forget(call)
                    call.clear()
                else:
                    wanted = list(dict.fromkeys(one for call in calls for one in call))
                    expert = rig.enter(wanted)
                    if expert is not None and expert.error is not None:
                        error = expert.error
                    elif expert is not None:
                        rig.cache.leave(expert)
                        calls = [[one for one in call if one is not expert] for call in calls]
                        num_computed, idle = num_computed + 1, 0
                asked = {one.name for call in calls for one in call}
                assert all(rig.enter([one]) for call in calls for one in call if one.state is StageState.READY), asked
                rig.check_integrity()
        for call in calls:
            rig.cache.forget(call)
        while rig.loading and chosen.random() < 0.7:  # others are read on into the next sweep
            rig.end_load(rig.loading[0], _eio() if chosen.random() < 0.1 else None)
        rig.end_sweep()
        rig.check_integrity()
        assert rig.cache.num_asked == 0
        if chosen.random() < 0.2:
            while rig.loading:
                rig.end_load(rig.loading[0])
            nbytes = chosen.randint(largest, 5 * largest) * PAGE
            for leaving in rig.cache.surplus(nbytes):
                rig.free(leaving)
            rig.memory.resize(nbytes)
            rig.check_integrity()
    assert num_computed > 300
    assert num_failed
    while rig.loading:
        rig.end_load(rig.loading[0])
    rig.close()


def test_one_place_is_enough() -> None:
    rig = Rig([[2] * 8, [2] * 8], slots=2)
    for _ in range(3):
        rig.sweep([range(8), [3, 1]])
        rig.check_integrity()
    assert len(rig.loaded) == 1


@pytest.mark.parametrize(("slots", "num_layers"), [(6, 1), (3, 1), (20, 4), (24, 3)])
def test_where_all_are_used_in_every_sweep_a_part_stays(slots: int, num_layers: int) -> None:
    """Least recently used first would find none of them. One place holds one expert after another."""
    rig = Rig([[1] * 12] * num_layers, slots)
    for _ in range(3):
        rig.sweep([range(12)] * num_layers)
    num_loads, num_sweeps = len(rig.loads), 10
    for _ in range(num_sweeps):
        rig.sweep([range(12)] * num_layers)
    num_hits = num_sweeps * 12 * num_layers - (len(rig.loads) - num_loads)
    assert num_hits >= num_sweeps * (slots - 1)


def test_what_is_used_most_often_stays_and_is_forgotten_when_it_is_not_used_any_more() -> None:
    rig = Rig([[1] * 8], slots=3)
    for idx in range(20):
        rig.sweep([[0, 1, 2 + idx % 6]])
    assert {"0.0", "0.1"} < rig.loaded
    for idx in range(40):
        rig.sweep([[6, 7, 2 + idx % 4]])
    assert {"0.6", "0.7"} < rig.loaded


def test_a_layer_visited_seldom_keeps_what_is_likely_to_be_used_there() -> None:
    """Uses are counted by visits of the layer, so the other layers' sweeps do not make it cold."""
    rig = Rig([[1] * 4, [1] * 4], slots=4)
    for idx in range(30):
        rig.visit(0, [idx % 4])
        if idx % 6 == 0:
            rig.visit(1, [2])
        rig.end_sweep()
    assert "1.2" in rig.loaded


def test_all_of_the_next_layer_are_read_ahead_when_nearly_all_were_asked_for() -> None:
    rig = Rig([[1] * 8, [1] * 8], slots=16)
    rig.visit(0, range(8))
    while rig.start_load():
        rig.end_load(rig.loading[0])
    assert rig.loads == [f"{layer}.{idx}" for layer in range(2) for idx in range(8)]
    assert rig.cache.statistics.num_read_ahead == 8
    rig.visit(1, [5, 2])
    assert rig.cache.statistics.num_hits == 2
    rig.end_sweep()
    assert not rig.start_load()


def test_an_expert_read_ahead_that_fails_gives_its_place_back() -> None:
    """The sweep may not ask for it, and needs the place for others."""
    rig = Rig([[1] * 8, [1] * 8], slots=9)
    rig.visit(0, range(8))
    assert rig.start_load()
    rig.end_load(rig.loading[0], _eio())
    assert "1.0" not in rig.loaded
    rig.visit(1, [3, 0])  # read again, and well
    rig.end_sweep()
    rig.check_integrity()


def test_an_expert_asked_for_between_the_choice_and_its_freeing_is_read_again() -> None:
    """The compute thread may ask at any moment."""
    rig = Rig([[1] * 4], slots=1)
    rig.visit(0, [0])
    first, second = rig.layers[0][:2]
    rig.cache.ask([second])
    found = rig.cache.next_asked()
    assert found == (second, [first])
    rig.cache.ask([first])
    assert first.state is StageState.READY
    assert rig.enter([first]) is None  # its buffer is about to be another's
    rig.free(first)
    second.start_loading(*rig.cache.take(second))
    second.set_ready(None)
    rig.cache.loaded(second)
    assert rig.enter([first, second]) is second
    rig.cache.leave(second)
    assert rig.cache.next_asked() == (first, [second])
