"""Decodes with the engine, and prints how fast: the engine's side of `benchmarks.gguf` and `benchmarks.peers`."""

from __future__ import annotations

import importlib
from typing import Any

import anyio

from benchmarks.decode_protocol import Benchmark, Moment, Record, decoded, opened
from hermes_async import Engine, EngineConfig, SamplingParams

# What the engine imports when it opens a model, so that it is part of the memory that is there before.
_MODULES = ("hermes_async.profiler.profiler", "hermes_async.engine.opening", "transformers.models.llama.modeling_llama")
_GGUF_MODULES = ("gguf", "llvmlite.binding", "hermes_async.quantization.gguf_kernels")


async def run(benchmark: Benchmark) -> None:
    asked = benchmark.asked
    config = EngineConfig(
        max_sequences=max(len(point["prompts"]) for point in asked["points"]),
        prompt_lookup=False,  # random weights repeat themselves, and their repetitions would be drafted
        share_prefixes=False,
    )
    start = benchmark.wait_for_start()
    async with Engine(asked["path"], config=config) as engine:
        benchmark.tell(opened(start, plan=engine.plan.as_dict()))
        for point in asked["points"]:
            benchmark.tell(await decode(engine, point))
        benchmark.finish()


async def decode(engine: Engine, point: Record) -> Record:
    """Runs sequences that start together. In the decode phase, each of them has its first token, and none has ended."""
    params = SamplingParams(max_tokens=point["tokens"], temperature=0, ignore_eos=True)
    prompts = point["prompts"]
    tokens: list[list[int]] = [[] for _ in prompts]
    moments: list[list[Moment]] = [[] for _ in prompts]
    start = Moment()

    async def session(idx: int) -> None:
        async for chunk in engine.generate(prompts[idx], params):
            tokens[idx] += chunk.token_ids
            moments[idx] += [Moment()] * len(chunk.token_ids)

    async with anyio.create_task_group() as group:
        for idx in range(len(prompts)):
            group.start_soon(session, idx)
    return decoded(point, start, *_decode_phase(moments), tokens)


def _decode_phase(moments: list[list[Moment]]) -> tuple[Moment, Moment, list[float]]:
    """Its begin and end, and the times of its steps."""
    first = max((times[0] for times in moments), key=lambda moment: moment.seconds)
    last = min((times[-1] for times in moments), key=lambda moment: moment.seconds)
    if len(moments[0]) == 1:
        return first, first, [first.seconds]
    steps = [moment.seconds for moment in moments[0] if first.seconds <= moment.seconds <= last.seconds]
    if len(steps) < 2:
        raise SystemExit("the prompts took all the time: give more --tokens")
    return first, last, steps


def main() -> None:
    benchmark = Benchmark()
    for name in (*_MODULES, *(_GGUF_MODULES if benchmark.asked["path"].endswith(".gguf") else ())):
        importlib.import_module(name)
    options: dict[str, Any] = {"use_uvloop": True}
    anyio.run(run, benchmark, backend_options=options)


if __name__ == "__main__":
    main()
