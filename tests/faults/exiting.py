"""A program that ends while an engine is open: run by `test_exit.py`, with the model, loop, state and way as arguments.

It prints "here" when it has come to its state, and ends in the way that was asked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from typing import Any

import torch
import uvloop

from hermes_async import Engine, EngineConfig, SamplingParams
from hermes_async.engine import opening
from tests.inside import inside

PARAMS = SamplingParams(max_tokens=100, temperature=0, ignore_eos=True)


class Reads:
    """Reads of weights, which hang from a moment on."""

    def __init__(self) -> None:
        self.hang = False
        self.hanging = threading.Event()
        self._preadv = os.preadv
        os.preadv = self.preadv  # type: ignore[assignment]

    def preadv(self, *args: Any) -> int:
        if self.hang:
            self.hanging.set()
            threading.Event().wait()
        return self._preadv(*args)


async def keep_generating(engine: Engine, began: asyncio.Event) -> None:
    while True:
        async for _ in engine.generate([5], PARAMS):
            began.set()


def compute_for_long(engine: Engine, began: threading.Event) -> None:
    """The compute thread is in native code, most of the time without the interpreter's lock."""

    def compute() -> None:
        began.set()
        for _ in range(200):
            torch.randn(400, 400) @ torch.randn(400, 400)

    inside(engine).on_stage(compute)


def hang_in_opening(reads: Reads) -> None:
    """The thread that opens the model hangs where the interpreter's exit waits for native code."""

    def hang() -> None:
        reads.hanging.set()
        threading.Event().wait()

    opening.bound_heap = hang


async def leave(way: str, path: str) -> None:
    """The program ends within the engine's block, while a read hangs."""
    async with contextlib.AsyncExitStack() as exits:
        engine, kept = await come_to("hanging", path)
        exits.push_async_exit(engine)
        exits.callback(kept.cancel)
        end(way, asyncio.get_running_loop())
        await asyncio.sleep(3600)


async def come_to(state: str, path: str) -> tuple[Engine, Any]:
    reads = Reads()
    config = EngineConfig(num_loading_agents=2, max_resident_layers=3, max_tokens_per_sweep=16)
    engine = Engine(path, memory_budget="8MiB", config=config)
    if state == "opening hangs":
        reads.hang = True
        entering = asyncio.ensure_future(engine.__aenter__())
        await until_set(reads.hanging)
        return engine, entering
    if state == "opening was left":
        hang_in_opening(reads)
        entering = asyncio.ensure_future(engine.__aenter__())
        await until_set(reads.hanging)
        entering.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await entering
        return engine, None
    await engine.__aenter__()
    kept: Any = None
    if state == "generating":
        began = asyncio.Event()
        kept = asyncio.ensure_future(keep_generating(engine, began))
        await began.wait()
    elif state == "iterating":
        kept = engine.generate([5], PARAMS)
        await anext(kept)
    elif state == "computing":
        computing = threading.Event()
        compute_for_long(engine, computing)
        kept = asyncio.ensure_future(engine.complete([5], PARAMS))
        await until_set(computing)
    elif state == "hanging":
        await engine.complete([5], PARAMS)
        reads.hang = True
        kept = asyncio.ensure_future(engine.complete([5], PARAMS))
        await until_set(reads.hanging)
    return engine, kept


async def until_set(event: threading.Event) -> None:
    while not event.is_set():  # noqa: ASYNC110 - a thread sets it
        await asyncio.sleep(0.001)


def end(way: str, loop: asyncio.AbstractEventLoop) -> None:
    print("here", flush=True)
    if way == "error":
        raise ZeroDivisionError("of the program")
    if way == "exit":
        sys.exit(3)
    if way == "SIGINT":
        os.kill(os.getpid(), signal.SIGINT)
    if way == "SIGTERM":
        os.kill(os.getpid(), signal.SIGTERM)
    if way == "stop":
        loop.stop()


async def main(state: str, way: str, path: str) -> Any:
    if state == "leaving":
        await leave(way, path)
    kept = await come_to(state, path)
    end(way, asyncio.get_running_loop())
    if way in ("SIGINT", "stop"):
        await asyncio.sleep(3600)
    return kept


def run(loop_name: str, runner: str, state: str, way: str, path: str) -> None:
    factory = uvloop.new_event_loop if loop_name == "uvloop" else asyncio.new_event_loop
    if runner == "run":
        with asyncio.Runner(loop_factory=factory) as asyncio_runner:
            asyncio_runner.run(main(state, way, path))
        return
    loop = factory()
    if way == "stop":
        kept.append(loop.create_task(main(state, way, path)))
        loop.run_forever()
    else:
        kept.append(loop.run_until_complete(main(state, way, path)))


def next_case() -> list[str] | None:
    """In a process of its own, what it is to do; None in this one, when there is nothing more."""
    imported = False
    for line in sys.stdin:
        case = line.rstrip("\n").split("\t")
        if not imported:
            opening.open_model(case[-3], "8MiB", EngineConfig()).close()  # imports what each of them would import again
            imported = True
        process = os.fork()
        if not process:
            signal.alarm(60)  # so that a program that does not exit is an error
            for stream, file in ((1, case.pop()), (2, case.pop())):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream)
            return case
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    return None


kept: list[Any] = []
torch.set_num_threads(1)
case = next_case()
if case is not None:
    run(*case)
