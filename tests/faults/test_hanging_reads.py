"""Reads that hang: deadlines, `abort` and cancellation end calls at once, and other requests' too."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import anyio
import pytest

from hermes_async import DeadlineExceededError, Engine, SamplingParams
from tests.engines import both_loops, until
from tests.faults.hanging import Hanging
from tests.inside import inside

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()


class Calls:
    """Calls under way, each with what it ended with."""

    def __init__(self, engine: Engine, model: Any, group: Any) -> None:
        self.ends: dict[str, Any] = {}
        self.scopes: dict[str, anyio.CancelScope] = {}
        self._engine, self._model, self._group = engine, model, group

    async def start(self, name: str, prompt: int = 2, num_tokens: int = 12) -> None:
        """Returns when the call has a request."""
        self._group.start_soon(self._run, name, prompt, dataclasses.replace(self._model.params, max_tokens=num_tokens))
        await until(lambda: name in inside(self._engine).request_ids)

    async def _run(self, name: str, prompt: int, params: SamplingParams) -> None:
        self.scopes[name] = anyio.CancelScope()
        with self.scopes[name]:
            try:
                self.ends[name] = await self._engine.complete(self._model.prompts[prompt], params, request_id=name)
            except DeadlineExceededError as error:
                self.ends[name] = error
        if self.scopes[name].cancelled_caught:
            self.ends[name] = "cancelled"

    async def end(self, name: str, how: str) -> None:
        """Ends a call; the engine's own clock is moved past the deadline, so that nothing waits for it."""
        if how == "abort":
            assert await self._engine.abort(name)
        elif how == "cancel":
            self.scopes[name].cancel()
        else:
            await inside(self._engine).pass_deadline(name)
        await until(lambda: name in self.ends)

    def check(self, name: str, how: str) -> None:
        end = self.ends[name]
        if how == "abort":
            assert end.finish_reason == "abort"
        elif how == "cancel":
            assert end == "cancelled"
        else:
            assert isinstance(end, DeadlineExceededError)


@pytest.mark.parametrize("how", ["deadline", "abort", "cancel"])
@pytest.mark.parametrize("what", ["rows", "weights"])
async def test_calls_end_while_a_read_hangs_and_others_go_on(
    tiny_model: Any, hanging: Hanging, what: str, how: str
) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        async with anyio.create_task_group() as group:
            calls = Calls(engine, tiny_model, group)
            getattr(hanging, what)(engine)
            await calls.start("first")
            await until(lambda: hanging.num_hanging > 0)
            await calls.start("second")  # waits for a sweep
            for name in ("second", "first"):
                await calls.end(name, how)
                calls.check(name, how)
            await until(lambda: inside(engine).request_ids == set())
            statistics = engine.statistics()
            assert (statistics.num_running, statistics.num_waiting) == (0, 0)
            await calls.start("third")
            hanging.end()
        assert calls.ends["third"].token_ids == tiny_model.references[2]
        assert engine.statistics().num_leases == 4


@pytest.mark.parametrize("how", ["deadline", "abort", "cancel"])
@pytest.mark.parametrize("what", ["rows", "weights"])
async def test_one_call_of_a_sweep_ends_while_its_read_hangs(
    tiny_model: Any, hanging: Hanging, what: str, how: str
) -> None:
    """The others of the sweep get their tokens when the read has come back."""
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        async with anyio.create_task_group() as group:
            calls = Calls(engine, tiny_model, group)

            def hang_with_two(sweep: Sequence[Any]) -> None:
                if len(sweep) == 2:
                    getattr(hanging, what)(engine)

            inside(engine).on_scheduled(hang_with_two)
            await calls.start("first", prompt=1, num_tokens=100)
            await calls.start("second", prompt=5)
            await until(lambda: hanging.num_hanging > 0 and len(inside(engine).sweep) == 2)
            await calls.end("first", how)
            calls.check("first", how)
            assert "second" not in calls.ends
            hanging.end()
        assert calls.ends["second"].token_ids == tiny_model.references[5]


async def test_a_request_s_own_deadline_ends_it_while_rows_hang(tiny_model: Any, hanging: Hanging) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        hanging.rows(engine)
        with pytest.raises(DeadlineExceededError):
            await engine.complete(tiny_model.prompts[1], deadline=anyio.current_time() + 0.2)
        assert hanging.num_hanging
        hanging.let_go.set()


async def test_a_cancelled_forward_pass_ends_while_rows_hang(tiny_model: Any, hanging: Hanging) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB", config=tiny_model.config) as engine:
        hanging.rows(engine, 7)
        async with anyio.create_task_group() as group:
            group.start_soon(lambda: engine.forward(input_ids=[[7, 8]]))
            await until(lambda: hanging.num_hanging > 0)
            group.cancel_scope.cancel()
        assert engine.statistics().num_forwards == 0 or not inside(engine).num_waiting_forwards
        hanging.let_go.set()
        completion = await engine.complete(tiny_model.prompts[1], tiny_model.params)
        assert completion.token_ids == tiny_model.references[1]
