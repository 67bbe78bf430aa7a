"""The axes of `benchmarks.growth`: the models of each axis, and how a point of it is measured."""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from transformers import LlamaConfig

from benchmarks.checkpoints import llama_config, random_checkpoint, shortened, write_tokenizer
from benchmarks.sessions import measure_point
from benchmarks.sweep import disk_seconds
from hermes_async import Engine, EngineConfig, SamplingParams, format_bytes

GIB, MIB = 2**30, 2**20

Visit = Callable[[], Awaitable[Mapping[str, float]]]
"""Measures the figures of a point, in seconds."""
Points = list[tuple[float, Visit]]


@dataclass(frozen=True)
class Settings:
    """How large the axes are, and where their checkpoints are made."""

    folder: Path | None
    quick: bool = False

    def of(self, full: Sequence[float], quick: Sequence[float]) -> Sequence[float]:
        """The points of an axis."""
        return quick if self.quick else full


@dataclass(frozen=True)
class Figure:
    """What is measured at each point of an axis.

    Attributes:
        exponent: Seconds grow with this power of the axis at most.
        why: What makes them grow so.
    """

    name: str
    exponent: float
    why: str


@dataclass(frozen=True)
class Axis:
    """What is varied.

    Attributes:
        points: Makes the checkpoints, ascending, and deletes them at the end.
    """

    title: str
    unit: str
    about: str
    figures: tuple[Figure, ...]
    points: Callable[[Settings], AbstractAsyncContextManager[Points]]

    def shown(self, x: float) -> str:
        return f"{x:.2f}" if x % 1 else f"{x:.0f}"


_GREEDY = {"temperature": 0.0, "ignore_eos": True}
_PROMPT = list(range(1, 17))
_ALONE = EngineConfig(max_sequences=1, prompt_lookup=False, share_prefixes=False)


@asynccontextmanager
async def _timed_engine(
    path: Path, budget: float, config: EngineConfig = _ALONE
) -> AsyncIterator[tuple[Engine, float]]:
    """An open engine, and the seconds that opening took."""
    started = time.perf_counter()
    async with Engine(path, memory_budget=int(budget), config=config) as engine:
        yield engine, time.perf_counter() - started


async def _decode(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> tuple[float, float]:
    """Seconds to the first token, and the median of the later ones. The second is left out, as it warms up."""
    started = time.perf_counter()
    times = [time.perf_counter() async for _ in engine.generate(list(prompt), params)]
    steps = [later - earlier for earlier, later in pairwise(times)]
    return times[0] - started, statistics.median(steps[1:])


def _written(path: Path) -> None:
    """Waits until a checkpoint is on the disk: what is written later would hold up the reads."""
    for file in path.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())


def _narrow_llama(**changes: int) -> LlamaConfig:
    """A Llama with layers of 1.6 MiB in bf16, so that what is done for each layer or token counts beside the sums."""
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 16384,
    }
    return LlamaConfig(**(sizes | changes), tie_word_embeddings=True)


# --- the model's size ---

_SIZES = (0.5, 1.0, 2.0, 4.0, 8.0, 12.0)
_QUICK_SIZES = (0.5, 1.0, 2.0, 3.0)
_BUDGET = 0.4  # of the weights
_KEPT_FREE = 1.2  # times the checkpoint's bytes must be free on the disk


@asynccontextmanager
async def _by_size(settings: Settings) -> AsyncIterator[Points]:
    sizes = fitting_sizes(settings.of(_SIZES, _QUICK_SIZES), settings.folder)
    configs = [llama_config(int(size * GIB), torch.bfloat16) for size in sizes]
    with random_checkpoint(configs[-1], torch.bfloat16, settings.folder) as whole, ExitStack() as exits:
        _written(whole)
        paths = [exits.enter_context(shortened(whole, config.num_hidden_layers)) for config in configs]
        nbytes = [_num_bytes(config) for config in configs]
        yield [(own / GIB, partial(_visit_size, path, own)) for path, own in zip(paths, nbytes, strict=True)]


def fitting_sizes(sizes: Sequence[float], folder: Path | None) -> list[float]:
    """Those sizes, in GiB, that the disk has space for.

    Raises:
        SystemExit: The disk has too little space for two of them. Nothing was written.
    """
    place = folder or Path(tempfile.gettempdir())
    free = shutil.disk_usage(place).free
    fitting = [size for size in sizes if size * GIB * _KEPT_FREE <= free]
    if len(fitting) < 2:
        raise SystemExit(
            f"{place} has {format_bytes(free)} free, and {format_bytes(int(sizes[1] * GIB * _KEPT_FREE))} are needed; "
            "give another --folder"
        )
    if len(fitting) < len(sizes):
        print(f"  {place} has {format_bytes(free)} free: no more than {fitting[-1]} GiB of weights", flush=True)
    return fitting


def _num_bytes(config: LlamaConfig) -> int:
    """Bytes of the weights of a Llama in bf16 with tied embeddings."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    key_size = hidden // heads * config.num_key_value_heads
    layer = 2 * hidden * hidden + 2 * hidden * key_size + 3 * hidden * config.intermediate_size + 2 * hidden
    return 2 * (config.num_hidden_layers * layer + config.vocab_size * hidden + hidden)


async def _visit_size(path: Path, nbytes: int) -> Mapping[str, float]:
    async with _timed_engine(path, _BUDGET * nbytes) as (engine, opening_s):
        plan = engine.plan
        groups = [stage.ranges for idx, stage in enumerate(plan.stages) if idx not in plan.resident]
        _, sweep_s = await _decode(engine, _PROMPT, SamplingParams(max_tokens=4, **_GREEDY))
        reads_s = await disk_seconds(groups, plan.num_loading_agents)
    return {"opening": opening_s, "sweep": sweep_s, "plain reads": reads_s, "sweep / reads": sweep_s / reads_s}


# --- the number of layers ---

_LAYERS = (8, 16, 32, 48, 64, 80)
_QUICK_LAYERS = (8, 24, 48, 80)


@asynccontextmanager
async def _by_layers(settings: Settings) -> AsyncIterator[Points]:
    with ExitStack() as exits:
        points: Points = []
        for number in settings.of(_LAYERS, _QUICK_LAYERS):
            config = _narrow_llama(num_hidden_layers=int(number))
            path = exits.enter_context(random_checkpoint(config, torch.bfloat16, settings.folder))
            _written(path)
            points.append((number, partial(_visit_layers, path, config)))
        yield points


async def _visit_layers(path: Path, config: LlamaConfig) -> Mapping[str, float]:
    params = SamplingParams(max_tokens=24, **_GREEDY)
    budget = 4 * _num_bytes(config) + 64 * MIB
    half = replace(_ALONE, max_resident_layers=config.num_hidden_layers // 2)
    async with _timed_engine(path, budget, half) as (engine, opening_s):
        assert engine.plan.reads_weights
        _, streamed_s = await _decode(engine, _PROMPT, params)
    async with _timed_engine(path, budget) as (engine, _):
        assert not engine.plan.reads_weights
        _, resident_s = await _decode(engine, _PROMPT, params)
    return {"opening": opening_s, "streamed": streamed_s, "in memory": resident_s}


# --- the tokens before a step ---

_CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
_QUICK_CONTEXTS = (128, 512, 1024, 2048, 4096)


@asynccontextmanager
async def _by_context(settings: Settings) -> AsyncIterator[Points]:
    config = _narrow_llama(hidden_size=512, intermediate_size=1536, num_attention_heads=8, num_key_value_heads=8)
    with random_checkpoint(config, torch.bfloat16, settings.folder) as path:
        async with _timed_engine(path, GIB) as (engine, _):
            assert not engine.plan.reads_weights
            yield [
                (number, partial(_visit_context, engine, int(number)))
                for number in settings.of(_CONTEXTS, _QUICK_CONTEXTS)
            ]


async def _visit_context(engine: Engine, num_tokens: int) -> Mapping[str, float]:
    steps = 16
    prompt = [1 + (7 * idx) % 1000 for idx in range(num_tokens - steps)]
    prompt_s, step_s = await _decode(engine, prompt, SamplingParams(max_tokens=steps + 2, **_GREEDY))
    return {"prompt": prompt_s, "step": step_s}


# --- the number of sessions ---

_SESSIONS = (1, 2, 4, 8, 16, 32, 64)
_QUICK_SESSIONS = (1, 4, 8, 16, 32, 64)


@asynccontextmanager
async def _by_sessions(settings: Settings) -> AsyncIterator[Points]:
    config = _narrow_llama(num_hidden_layers=16)
    many = EngineConfig(max_sequences=_SESSIONS[-1], prompt_lookup=False, kv_budget=64 * MIB)
    half = replace(many, max_resident_layers=config.num_hidden_layers // 2)
    budget = 4 * _num_bytes(config) + 256 * MIB
    with random_checkpoint(config, torch.bfloat16, settings.folder) as path:
        _written(path)
        async with (
            _timed_engine(path, budget, half) as (streamed, _),
            _timed_engine(path, budget, many) as (resident, _),
        ):
            assert streamed.plan.reads_weights and not resident.plan.reads_weights
            yield [
                (number, partial(_visit_sessions, streamed, resident, int(number)))
                for number in settings.of(_SESSIONS, _QUICK_SESSIONS)
            ]


async def _visit_sessions(streamed: Engine, resident: Engine, number: int) -> Mapping[str, float]:
    prompts = [[1 + (idx + offset) % 1000 for offset in range(16)] for idx in range(number)]
    seconds = {}
    for name, engine in (("streamed", streamed), ("in memory", resident)):
        engine.drop_prefixes()
        point = await measure_point(engine, prompts, 32)
        seconds[name] = point["sweep_seconds"]
    return seconds


# --- the vocabulary ---

_VOCABULARIES = (32768, 65536, 98304, 131072, 196608, 262144)
_QUICK_VOCABULARIES = (32768, 65536, 131072, 262144)


@asynccontextmanager
async def _by_vocabulary(settings: Settings) -> AsyncIterator[Points]:
    sizes = [int(size) for size in settings.of(_VOCABULARIES, _QUICK_VOCABULARIES)]
    with ExitStack() as exits:
        points: Points = []
        for size in sizes:
            config = _narrow_llama(vocab_size=size, num_hidden_layers=1)
            path = exits.enter_context(random_checkpoint(config, torch.bfloat16, settings.folder))
            write_tokenizer(path, size)
            points.append((size, partial(_visit_vocabulary, path, _num_bytes(config))))
        yield points


async def _visit_vocabulary(path: Path, nbytes: int) -> Mapping[str, float]:
    drawn = SamplingParams(
        max_tokens=24, temperature=0.8, top_k=50, top_p=0.9, min_p=0.01, repetition_penalty=1.1, seed=1, ignore_eos=True
    )
    async with _timed_engine(path, 4 * nbytes + 256 * MIB) as (engine, opening_s):
        assert not engine.plan.reads_weights
        _, greedy_s = await _decode(engine, _PROMPT, SamplingParams(max_tokens=24, **_GREEDY))
        _, drawn_s = await _decode(engine, _PROMPT, drawn)
        _, logprobs_s = await _decode(engine, _PROMPT, SamplingParams(max_tokens=24, logprobs=5, **_GREEDY))
    return {"opening": opening_s, "greedy": greedy_s, "drawn": drawn_s, "log-probabilities": logprobs_s}


AXES = {
    "size": Axis(
        "The size of the model",
        "GiB",
        "layers of 192 MiB, a budget of 0.4 of the weights, one session",
        (
            Figure("opening", 1, "layers"),
            Figure("sweep", 1, "bytes that are read"),
            Figure("plain reads", 1, "bytes"),
            Figure("sweep / reads", 0, "nothing"),
        ),
        _by_size,
    ),
    "layers": Axis(
        "The number of layers",
        "layers",
        "layers of 1.6 MiB, one session; with half of the layers in memory, and with all",
        (
            Figure("opening", 1, "layers"),
            Figure("streamed", 1, "layers"),
            Figure("in memory", 1, "layers"),
        ),
        _by_layers,
    ),
    "context": Axis(
        "The context",
        "tokens",
        "8 layers of 6.6 MiB in memory; a prompt, and decode steps behind it",
        (
            Figure("prompt", 2, "attention of all tokens to all before them"),
            Figure("step", 1, "attention of one token to all before it"),
        ),
        _by_context,
    ),
    "sessions": Axis(
        "The number of sessions",
        "sessions",
        "16 layers of 1.6 MiB; a decode sweep of all sessions, with half of the layers in memory, and with all",
        (
            Figure("streamed", 1, "tokens of a sweep"),
            Figure("in memory", 1, "tokens of a sweep"),
        ),
        _by_sessions,
    ),
    "vocabulary": Axis(
        "The vocabulary",
        "tokens",
        "one layer of 1.6 MiB and the head in memory, and a tokenizer of as many tokens; one session",
        (
            Figure("opening", 1, "the tokenizer's file"),
            Figure("greedy", 1, "the head, and the largest logit"),
            Figure("drawn", 1, "the head, and probabilities (top_k, top_p, min_p, repetition_penalty)"),
            Figure("log-probabilities", 1, "the head, and probabilities"),
        ),
        _by_vocabulary,
    ),
}
