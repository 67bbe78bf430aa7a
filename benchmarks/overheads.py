"""Takes a decode step apart, with all weights in memory: what it costs beside reading the weights once.

    python -m benchmarks.overheads [--layers 1 4 28] [--tokens 32] [--rounds 5] [--dtype bfloat16]

One session, and Llamas of a small width, so that what is done once for a layer or once for a step counts. The limit of
a step is the weights' bytes over the rate at which this machine sums such bytes. The parts are measured on the way, by
clocks around functions of the engine, and add up to the step:

- weights: the limit, of the model's own computation
- model: the rest of it; the model of transformers computes it, too
- hooks: entering and leaving stages, with the greenlets' changes and the binding
- call: around the model on the compute thread: settings and packing
- sampling: the choice of the token
- threads: from the event loop to the compute thread and back
- loop: scheduling, delivering, and the user's chunk

Rounds of the engine and of transformers' `forward` alternate; a figure is the median of all steps of all rounds.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import anyio
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.checkpoints import random_checkpoint
from benchmarks.sweep import transformers_step
from hermes_async import Engine, EngineConfig, SamplingParams, format_bytes
from hermes_async.modeling import streamed
from hermes_async.modeling.calls import Turn
from hermes_async.modeling.sampling import Sampler
from hermes_async.modeling.streamed import StreamedModel
from hermes_async.pipeload.pipeline import Pipeline
from hermes_async.storage.threads import run_in_thread  # keeps no kernel threads, which slow the engine

PARTS = ("weights", "model", "hooks", "call", "sampling", "threads", "loop")
_PROMPT = list(range(1, 17))


class Clocks:
    """Seconds within functions, by name; those of the running step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    def take(self) -> dict[str, float]:
        """The seconds since the last call."""
        taken, self._seconds = self._seconds, defaultdict(float)
        return taken

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self._seconds[name] += time.perf_counter() - started

        return timed

    def around_coroutine(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        async def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return await function(*args, **kwargs)
            finally:
                self._seconds[name] += time.perf_counter() - started

        return timed

    @contextmanager
    def running(self) -> Iterator[None]:
        """Within the block, the engine's functions are timed."""
        with ExitStack() as patches:
            for owner, attribute, name in (
                (StreamedModel, "run", "run"),
                (streamed, "forward_packed", "forward"),
                (Turn, "rest", "hooks"),
                (Sampler, "sample", "sampling"),
            ):
                timed = self.around(name, getattr(owner, attribute))
                patches.enter_context(mock.patch.object(owner, attribute, timed))
            sweep = self.around_coroutine("sweep", Pipeline.sweep)
            patches.enter_context(mock.patch.object(Pipeline, "sweep", sweep))
            yield


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overheads", description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4, 28], help="of each model (default 1 4 28)")
    parser.add_argument("--tokens", type=int, default=32, help="of a round (default 32)")
    parser.add_argument("--rounds", type=int, default=5, help="of each side (default 5)")
    parser.add_argument("--width", type=int, default=512, help="of the hidden states (default 512)")
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16 or float32 (default bfloat16)")
    parser.add_argument("--kernels", default="auto", help="auto, transformers or fastest (default auto)")
    parser.add_argument("--folder", type=Path, default=None, help="where to make the checkpoints")
    args = parser.parse_args()
    found = []
    for num_layers in args.layers:
        config = LlamaConfig(
            vocab_size=2 * args.width,
            hidden_size=args.width,
            intermediate_size=3 * args.width,
            num_hidden_layers=num_layers,
            num_attention_heads=args.width // 64,
            num_key_value_heads=args.width // 64,
            max_position_embeddings=4096,
        )
        with random_checkpoint(config, getattr(torch, args.dtype), args.folder) as path:
            found.append({"num_layers": num_layers, **anyio.run(measure, path, args)})
        _print_table(found[-1:])  # a later model may take long, or be interrupted
    if len(found) > 1:
        _print_table(found)
    print(json.dumps({"dtype": args.dtype, "width": args.width, "threads": torch.get_num_threads(), "models": found}))


async def measure(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The step of one model, its parts, and transformers' own, in seconds."""
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    multiplied = [parameter for name, parameter in theirs.named_parameters() if "embed_tokens" not in name]
    num_bytes = sum(parameter.numel() * parameter.itemsize for parameter in multiplied)
    config = EngineConfig(max_sequences=1, prompt_lookup=False, share_prefixes=False, kernels=args.kernels)
    clocks, parts, steps = Clocks(), [], []
    forwards, limits = [], []
    async with Engine(path, memory_budget=4 * num_bytes + 2**26, config=config) as engine:
        assert not engine.plan.reads_weights
        lines = [line for line in engine.plan.explanation if line.startswith(("kernels: ", "one token"))]
        print(f"\n{format_bytes(num_bytes)} of weights a step; " + "; ".join(lines), flush=True)
        for _ in range(args.rounds):
            limits.append(await run_in_thread(_seconds_to_sum, multiplied))
            forwards.append(await run_in_thread(transformers_step, theirs, args.tokens))
            with clocks.running():
                async for seconds, taken in _steps(engine, clocks, args.tokens):
                    steps.append(seconds)
                    parts.append(taken)
    limit = statistics.median(limits)
    of_steps = [_parts_of(seconds, taken, limit) for seconds, taken in zip(steps, parts, strict=True)]
    return {
        "weight_bytes": num_bytes,
        "bytes_per_second": num_bytes / limit,
        "step_seconds": statistics.median(steps),
        "transformers_seconds": statistics.median(forwards),
        "num_steps": len(steps),
        "parts": {name: statistics.median(own[name] for own in of_steps) for name in PARTS},
    }


async def _steps(engine: Engine, clocks: Clocks, num_tokens: int) -> Any:
    """The seconds of each decode step, with what the clocks have counted in it."""
    params = SamplingParams(max_tokens=num_tokens + 2, temperature=0, ignore_eos=True)
    before: float | None = None
    num_seen = 0
    async for _ in engine.generate(_PROMPT, params):
        now, taken = time.perf_counter(), clocks.take()
        num_seen += 1
        if before is not None and num_seen > 2:  # the first is the prompt's, and the second warms up
            yield now - before, taken
        before = now


def _parts_of(step: float, taken: dict[str, float], limit: float) -> dict[str, float]:
    return {
        "weights": limit,
        "model": taken["forward"] - taken["hooks"] - limit,
        "hooks": taken["hooks"],
        "call": taken["run"] - taken["forward"] - taken["sampling"],
        "sampling": taken["sampling"],
        "threads": taken["sweep"] - taken["run"],
        "loop": step - taken["sweep"],
    }


def _seconds_to_sum(tensors: list[torch.Tensor]) -> float:
    """Seconds to read all of these tensors once, by summing their bytes as whole numbers."""
    with torch.inference_mode():
        words = [tensor.detach().view(-1).view(torch.int64) for tensor in tensors]
        seconds = []
        for _ in range(5):
            started = time.perf_counter()
            for own in words:
                own.sum()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


def _print_table(found: list[dict[str, Any]]) -> None:
    print(
        f"\nmilliseconds of a step\n  {'layers':>6} {'step':>8} {'forward':>8}  "
        + " ".join(f"{part:>8}" for part in PARTS)
    )
    for row in found:
        own = " ".join(f"{row['parts'][part] * 1e3:8.3f}" for part in PARTS)
        print(
            f"  {row['num_layers']:6} {row['step_seconds'] * 1e3:8.3f} {row['transformers_seconds'] * 1e3:8.3f}  {own}",
            flush=True,
        )


if __name__ == "__main__":
    main()
