"""A process that may lock little memory: run by `test_locked_memory.py`, with a model and a mixture as arguments.

It opens engines under several limits, and prints what they locked as one JSON object. `VmLck` is the kernel's count.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from hermes_async import ConfigError, Engine, EngineConfig, MemoryBudgetError, SamplingParams
from hermes_async.storage.buffers import Buffer

CAP_IPC_LOCK = 14
PARAMS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
LARGE = 6 << 20
LITTLE = 64 << 10


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint32) for name in ("effective", "permitted", "inheritable"))


def drop_capability() -> None:
    """Root may exceed the limit; from now on this process may not, and the threads that it starts."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(0x20080522, 0), (_Capabilities * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    for which in ("effective", "permitted", "inheritable"):
        setattr(sets[0], which, getattr(sets[0], which) & ~(1 << CAP_IPC_LOCK))
    assert libc.capset(ctypes.byref(header), sets) == 0


def allow(num_bytes: int) -> None:
    _, most = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (num_bytes, most))


def locked_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmLck:"))


def engine_of(path: str, budget: int | str, lock_memory: Any, **options: Any) -> Engine:
    config = EngineConfig(
        num_loading_agents=1, max_tokens_per_sweep=16, max_sequences=4, kv_budget="128KiB", lock_memory=lock_memory
    )
    return Engine(path, memory_budget=budget, config=config, **options)


async def state(engine: Engine) -> dict[str, Any]:
    """What is planned and locked after an answer."""
    completion = await engine.complete([5, 9, 2], PARAMS)
    plan = engine.plan
    return {
        "token_ids": list(completion.token_ids),
        "budget": plan.memory_budget,
        "planned": plan.locked_bytes,
        "needed": plan.lockable_bytes,
        "refusal": plan.lock_refusal,
        "text": str(plan),
        "holders": engine.statistics().holders,
        "locked": locked_bytes(),
    }


async def opened(path: str, lock_memory: Any, budgets: tuple[int | str, ...] = ("8MiB",), **options: Any) -> list[Any]:
    """The states of an engine at these budgets; of a refusal, its text. "least" is the smallest that a resize takes."""
    states: list[Any] = []
    async with engine_of(path, budgets[0], lock_memory, **options) as engine:
        await engine.wait_ready()
        states.append(await state(engine))
        for budget in budgets[1:]:
            try:
                await engine.resize(await least_of(engine) if budget == "least" else budget)
            except MemoryBudgetError as error:
                states.append(str(error))
            states.append(await state(engine))
    states.append(locked_bytes())
    return states


async def least_of(engine: Engine) -> int:
    try:
        await engine.resize(1)
    except MemoryBudgetError as error:
        assert error.minimum_bytes is not None
        return error.minimum_bytes
    raise AssertionError


async def smallest(path: str) -> int:
    async with engine_of(path, "8MiB", False) as engine:
        return engine.plan.minimum_budget


async def with_less_left(path: str, budget: int) -> list[Any]:
    """Another part of the process locks memory before the experts come."""
    async with engine_of(path, budget, "auto") as engine:
        await engine.wait_ready()
        plan, before = engine.plan, locked_bytes()
        allow(before + LITTLE)
        other = Buffer(LITTLE)
        other.lock()
        states: list[Any] = [plan.locked_bytes, before, await state(engine)]
        other.close()
    return states


async def main(model: str, mixture: str) -> None:
    found: dict[str, Any] = {}
    allow(LARGE)
    for lock_memory in ("auto", True):
        found[f"plenty {lock_memory}"] = await opened(model, lock_memory)
    least = await smallest(model)
    budgets = (least + 30_000, "8MiB", least, least + 60_000)
    found["resized"] = await opened(model, True, budgets)
    found["draft"] = await opened(model, True, draft_model=model)
    most = await smallest(mixture)
    found["mixture"] = await opened(mixture, True, (most, "8MiB", most))
    allow(found["mixture"][0]["needed"])
    found["mixture at its limit"] = await opened(mixture, True, (most,))
    found["less left"] = await with_less_left(mixture, most)
    allow(found["resized"][0]["needed"])
    for lock_memory in ("auto", True):
        found[f"resized beyond {lock_memory}"] = await opened(model, lock_memory, (least + 30_000, "8MiB", least))
    # From all weights in memory to a ring, within the limit of before: what leaves makes room for the ring.
    allow(found["plenty True"][0]["needed"])
    found["smaller at its limit"] = await opened(model, True, ("8MiB", "least"))
    allow(LITTLE)
    for lock_memory in ("auto", False):
        found[f"little {lock_memory}"] = await opened(model, lock_memory)
    try:
        await opened(model, True)
    except ConfigError as error:
        found["little True"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    drop_capability()
    torch.set_num_threads(1)
    assert mmap.PAGESIZE <= LITTLE
    asyncio.run(main(*sys.argv[1:]))
