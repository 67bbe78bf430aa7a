"""The engine is entered and left in whichever task of its loop, and refuses another loop."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio.to_thread
import pytest

from hermes_async import Engine, EngineClosedError, EngineError

pytestmark = pytest.mark.anyio


async def test_left_in_another_task(tiny_model: Any) -> None:
    engine = Engine(tiny_model.path, memory_budget="8MiB")
    await asyncio.create_task(engine.__aenter__())
    assert (await engine.complete(tiny_model.prompts[0], tiny_model.params)).token_ids
    await asyncio.create_task(engine.__aexit__(None, None, None))
    with pytest.raises(EngineClosedError):
        await engine.complete(tiny_model.prompts[0], tiny_model.params)


async def test_another_loop_is_refused(tiny_model: Any) -> None:
    async with Engine(tiny_model.path, memory_budget="8MiB") as engine:

        def elsewhere() -> None:
            with pytest.raises(EngineError, match="another event loop"):
                asyncio.run(engine.complete(tiny_model.prompts[0], tiny_model.params))

        await anyio.to_thread.run_sync(elsewhere)
