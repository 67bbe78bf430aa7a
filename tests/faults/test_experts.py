"""Experts that cannot be read, or that nobody waits for any more: no place, pin or task of one is left behind."""

from __future__ import annotations

import dataclasses
import errno
import random
import re
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from hermes_async import (
    CheckpointError,
    DeadlineExceededError,
    Engine,
    EngineClosedError,
    EngineConfig,
    MemoryBudgetError,
    MissingTensorError,
    ReadError,
)
from hermes_async.engine.opening import open_model
from hermes_async.pipeload.stage import Stage, StageState
from tests.disks import Disk
from tests.engines import settle, until
from tests.inside import inside
from tests.models import TinyMixture

pytestmark = pytest.mark.anyio


def smallest_budget(path: Path, config: EngineConfig) -> int:
    opened = open_model(path, 1 << 26, config)
    opened.close()
    return opened.plan.minimum_budget


def open_mixture(model: TinyMixture, **config: Any) -> Engine:
    changed = dataclasses.replace(model.config, **config)
    budget = model.smallest_budget if changed.batching == "auto" else smallest_budget(model.path, changed)
    return Engine(model.path, memory_budget=budget, config=changed)


async def check_answers(engine: Engine, model: TinyMixture) -> None:
    assert (await engine.complete(model.prompts[3], model.params)).token_ids == model.references[3]
    await settle(engine)
    inside(engine).check_experts()


def _offsets(stages: Iterable[Stage]) -> set[int]:
    """Where reads of them begin."""
    return {item.offset // 4096 * 4096 for stage in stages for item in stage.layout.ranges}


class ExpertReads:
    """Of the reads of a disk, those of experts.

    Attributes:
        fails: Each of them fails from now on.
        begun: So many have begun.
    """

    def __init__(self, disk: Disk, engine: Engine) -> None:
        self.fails = False
        self.begun = 0
        self._may_go_on = threading.Event()
        self._may_go_on.set()
        self._offsets = _offsets(inside(engine).expert_cache.experts) - _offsets(inside(engine).stages)
        disk.on_read = self._on_read

    def _on_read(self, path: Path, offset: int, read: Callable[[], int]) -> int:
        if offset in self._offsets:
            self.begun += 1
            assert self._may_go_on.wait(30)
            if self.fails:
                raise OSError(errno.EIO, "Input/output error")
        return read()

    async def hold(self) -> None:
        """Returns when a read of an expert has begun, which does not end before `go_on`."""
        self._may_go_on.clear()
        before = self.begun
        await until(lambda: self.begun > before)

    def go_on(self) -> None:
        self._may_go_on.set()


async def test_an_expert_that_cannot_be_read_ends_the_requests_of_its_sweep(
    tiny_mixture: TinyMixture, disk: Disk
) -> None:
    errors: list[ReadError] = []

    async def user(idx: int) -> None:
        try:
            await engine.complete(tiny_mixture.prompts[idx], tiny_mixture.params)
        except ReadError as error:
            errors.append(error)

    async with open_mixture(tiny_mixture) as engine:
        reads = ExpertReads(disk, engine)
        for _ in range(2):
            errors.clear()
            await check_answers(engine, tiny_mixture)
            reads.fails = True
            async with anyio.create_task_group() as group:
                for idx in range(3):
                    group.start_soon(user, idx)
            assert [(error.path, error.errno) for error in errors] == [(tiny_mixture.shard, errno.EIO)] * 3
            reads.fails = False
            await settle(engine)
            inside(engine).check_experts()
        await check_answers(engine, tiny_mixture)


@pytest.mark.parametrize("how", ["cancel", "abort", "deadline"])
async def test_a_request_that_ends_while_its_experts_are_on_their_way(
    tiny_mixture: TinyMixture, disk: Disk, how: str
) -> None:
    """The one beside it goes on, and so does one that comes later."""
    ends: dict[str, Any] = {}

    async def user(name: str, idx: int) -> None:
        try:
            completion = await engine.complete(tiny_mixture.prompts[idx], tiny_mixture.params, request_id=name)
            ends[name] = completion.finish_reason if name == "leaves" else completion.token_ids
        except DeadlineExceededError:
            ends[name] = "deadline"

    async with open_mixture(tiny_mixture) as engine:
        await check_answers(engine, tiny_mixture)
        for together in (True, False):
            ends.clear()
            reads = ExpertReads(disk, engine)
            async with anyio.create_task_group() as group:
                leaving = anyio.CancelScope()

                async def leaves(scope: anyio.CancelScope = leaving) -> None:
                    with scope:
                        await user("leaves", 4)

                group.start_soon(leaves)
                if together:
                    group.start_soon(user, "stays", 2)
                    await until(lambda: len(inside(engine).request_ids) == 2)
                await reads.hold()
                if how == "cancel":
                    leaving.cancel()
                elif how == "abort":
                    group.start_soon(engine.abort, "leaves")
                else:
                    await inside(engine).pass_deadline("leaves")
                await until(lambda: "leaves" not in inside(engine).request_ids or inside(engine).is_aborted("leaves"))
                reads.go_on()
            assert ends.pop("leaves", "cancel") == how
            assert ends == ({"stays": tiny_mixture.references[2]} if together else {})
            await settle(engine)
            inside(engine).check_experts()
        await check_answers(engine, tiny_mixture)


async def test_an_engine_that_closes_while_experts_are_read(tiny_mixture: TinyMixture, disk: Disk) -> None:
    async with anyio.create_task_group() as group, open_mixture(tiny_mixture) as engine:
        reads = ExpertReads(disk, engine)
        group.start_soon(_until_closed, engine, tiny_mixture)
        await reads.hold()
        cache = inside(engine).expert_cache
        assert any(expert.state is StageState.LOADING for expert in cache.experts)
        group.start_soon(_go_on, reads)
    assert {expert.state for expert in cache.experts} == {StageState.EMPTY}
    assert cache.memory.statistics().num_leases == 0
    assert disk.num_open == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hermes")]


async def _until_closed(engine: Engine, model: TinyMixture) -> None:
    with pytest.raises(EngineClosedError):
        await engine.complete(model.prompts[4], model.params)


async def _go_on(reads: ExpertReads) -> None:
    for _ in range(50):  # until the engine waits for its reads
        await anyio.lowlevel.checkpoint()
    reads.go_on()


@pytest.mark.parametrize("seed", range(2))
async def test_random_requests_leave_at_random_moments(tiny_mixture: TinyMixture, disk: Disk, seed: int) -> None:
    """And now and then an expert cannot be read."""
    chosen = random.Random(seed)
    num_ended = 0

    async def user(number: int) -> None:
        nonlocal num_ended
        for turn in range(10):
            idx, name = chosen.randrange(5), f"{number}-{turn}"
            with anyio.CancelScope() as scope:
                try:
                    async for chunk in engine.generate(tiny_mixture.prompts[idx], tiny_mixture.params, request_id=name):
                        if chosen.random() < 0.1:
                            await engine.abort(name)
                        elif chosen.random() < 0.1:
                            scope.cancel()
                        assert chunk.finish_reason in (None, "length", "abort")
                except ReadError:
                    reads.fails = False
            num_ended += 1
            reads.fails = reads.fails or chosen.random() < 0.1

    async with open_mixture(tiny_mixture, num_loading_agents=1 + seed) as engine:
        reads = ExpertReads(disk, engine)
        async with anyio.create_task_group() as group:
            for number in range(4):
                group.start_soon(user, number)
        reads.fails = False
        assert num_ended == 40
        await settle(engine)
        inside(engine).check_experts()
        await check_answers(engine, tiny_mixture)


# --- checkpoints that are wrong ---


def test_a_budget_that_holds_no_two_experts(tiny_mixture: TinyMixture) -> None:
    with pytest.raises(MemoryBudgetError) as caught:
        open_model(tiny_mixture.path, tiny_mixture.smallest_budget - 1, tiny_mixture.config)
    assert caught.value.minimum_bytes == tiny_mixture.smallest_budget
    assert str(tiny_mixture.smallest_budget) in str(caught.value)
    assert "experts" in str(caught.value)
    opened = open_model(tiny_mixture.path, tiny_mixture.smallest_budget, tiny_mixture.config)
    opened.close()
    assert opened.plan.expert_bytes >= 2 * max(expert.slot_bytes for expert in opened.plan.experts)


EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda tensor: None, MissingTensorError, "experts.5.down_proj.weight' is in no file"),
        (
            lambda tensor: tensor[:-1].clone(),
            CheckpointError,
            "experts.5.down_proj.weight' is float32 of shape [31, 64]",
        ),
        (lambda tensor: tensor.half(), CheckpointError, "experts.5.down_proj.weight' is float16 of shape [32, 64]"),
    ],
    ids=["missing", "another shape", "another dtype"],
)
def test_one_expert_is_not_as_the_others(
    tiny_mixture: TinyMixture, tmp_path: Path, change: Callable[[torch.Tensor], Any], error: Any, message: str
) -> None:
    path = Path(shutil.copytree(tiny_mixture.path, tmp_path / "checkpoint"))
    tensors = load_file(path / "model.safetensors")
    changed = change(tensors.pop(EXPERT))
    (path / "model.safetensors").unlink()
    save_file(tensors, path / "first.safetensors")
    save_file({"other": torch.zeros(1)} if changed is None else {EXPERT: changed}, path / "second.safetensors")
    with pytest.raises(error, match=re.escape(message)) as caught:
        open_model(path, 1 << 26, tiny_mixture.config)
    assert caught.value.path == path / ("first.safetensors" if changed is None else "second.safetensors")


@pytest.mark.parametrize("batching", ["packed", "turns"])
async def test_a_route_to_an_expert_that_does_not_exist(
    tiny_mixture: TinyMixture, monkeypatch: pytest.MonkeyPatch, batching: str
) -> None:
    """As of a router that looks experts up in a table of the checkpoint."""
    forward = Qwen3MoeTopKRouter.forward

    def lost(self: Any, hidden_states: torch.Tensor) -> Any:
        logits, weights, experts = forward(self, hidden_states)
        return logits, weights, torch.where(experts == 3, 11, experts) if len(hidden_states) == 12 else experts

    ends: dict[int, Any] = {}

    async def user(idx: int) -> None:
        try:
            ends[idx] = (await engine.complete(tiny_mixture.prompts[idx], tiny_mixture.params)).token_ids
        except CheckpointError as error:
            ends[idx] = error

    async with open_mixture(tiny_mixture, batching=batching, self_check="require", max_tokens_per_sweep=64) as engine:
        monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", lost)
        for _ in range(2):
            await user(2)
            assert "is routed to expert 11, and the layer has 8 experts" in str(ends[2])
            await settle(engine)
            inside(engine).check_experts()
            async with anyio.create_task_group() as group:
                for idx in range(1, 4):
                    group.start_soon(user, idx)
            if batching == "turns":  # packed, tokens of others are in one call with them
                assert "expert 11" in str(ends[2])
                assert [ends[idx] for idx in (1, 3)] == [tiny_mixture.references[idx] for idx in (1, 3)]
            await check_answers(engine, tiny_mixture)
