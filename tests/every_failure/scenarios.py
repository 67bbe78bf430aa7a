"""What users do, each as a plain coroutine whose result is the same whenever nothing goes wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from hermes_async import Engine, EngineConfig
from hermes_async.conversion.quantizing import quantize
from tests.engines import BLOCK_BYTES, greedy_params, tokens
from tests.every_failure.points import FAULTS, HANGS, Faults
from tests.inside import inside
from tests.models import BareModel, TinyMixture, TinyModel

LARGE = "8MiB"
"""Of the small models, everything stays in memory."""


async def _nothing(engine: Engine) -> None:
    pass


@dataclasses.dataclass(frozen=True)
class Scenario:
    """What one user does with an engine that another user has requests in.

    Attributes:
        run: Called with the engine; its result is compared.
        model: Makes the model in a folder; the checkpoint's path.
        restore: Awaited afterwards with the engine, which is then as it was before.
        opens: It opens an engine of its own; any error of ours may come out of that.
        drafts: The model is its own draft model.
    """

    name: str
    run: Callable[[Engine], Awaitable[Any]]
    config: EngineConfig
    model: Callable[[Path], Path] = lambda folder: TinyModel(folder).path
    budget: int | str = LARGE
    restore: Callable[[Engine], Awaitable[Any]] = _nothing
    opens: bool = False
    drafts: bool = False

    @property
    def faults(self) -> Faults:
        """What goes wrong in it."""
        return FAULTS if self.config.read_timeout is None else HANGS


def _config(**changes: Any) -> EngineConfig:
    return dataclasses.replace(TinyModel.config, **changes)


def _quantized(folder: Path) -> Path:
    out = folder.with_name("quantized")
    quantize(TinyModel(folder).path, out, "int8")
    return out


def _mixture(folder: Path) -> Path:
    return TinyMixture(folder).path


def _longer(folder: Path) -> Path:
    return BareModel(folder).path


async def opening(neighbour: Engine) -> Any:
    """Another engine is opened, used and left."""
    path, plan, config = inside(neighbour).checkpoint_path, neighbour.plan, inside(neighbour).config
    async with Engine(path, memory_budget=plan.memory_budget, config=config) as engine:
        return (await engine.complete(tokens(1, 20), greedy_params(3))).token_ids


async def generating(engine: Engine) -> Any:
    """A prompt of two chunks, and some tokens."""
    return (await engine.complete(tokens(1, 20), greedy_params(4))).token_ids


async def forwarding(engine: Engine) -> Any:
    """Logits of two sequences."""
    output = await engine.forward(input_ids=[tokens(1, 6), tokens(2, 6)])
    return output.logits.tolist()


async def embedding(engine: Engine) -> Any:
    """Vectors of texts that need several passes."""
    texts = ["w5", "w5 w6 w7", "w8 w9 w10 w11 w12 w13 w14 w15 w16", "w7 w3 w2"]
    return (await engine.embed(texts)).tolist()


async def resizing(engine: Engine) -> Any:
    """Some of the weights leave, and come back."""
    plan = await engine.resize(engine.plan.minimum_budget + 3 * BLOCK_BYTES)
    answers = [await engine.complete(tokens(1, 20), greedy_params(3))]
    larger = await engine.resize(LARGE)
    answers.append(await engine.complete(tokens(1, 20), greedy_params(2)))
    assert len(plan.resident) < len(larger.resident)
    return [answer.token_ids for answer in answers]


async def parking(engine: Engine) -> Any:
    """A session goes to disk to make room for another one, and comes back."""
    async with engine.session() as one, engine.session() as two:
        answers = [await one.complete(tokens(1, 40), greedy_params(4))]
        answers.append(await two.complete(tokens(2, 90), greedy_params(4)))
        answers.append(await one.complete([5], greedy_params(3)))
    return [answer.token_ids for answer in answers]


async def forking(engine: Engine) -> Any:
    """A conversation goes on in two ways."""
    async with engine.session() as chat:
        answers = [await chat.complete(tokens(1, 20), greedy_params(4))]
        async with chat.fork() as fork:
            answers.append(await fork.complete([7], greedy_params(3)))
            answers.append(await chat.complete([5], greedy_params(3)))
    return [answer.token_ids for answer in answers]


_CHECKED = {"self_check": "require"}
_TURNS = {"batching": "turns", **_CHECKED}
_TIMEOUT_S = 1.0
_KV = {"max_resident_layers": 2, "share_prefixes": False}

SCENARIOS = (
    Scenario("open", opening, _config(**_CHECKED), opens=True),
    Scenario("open, all resident", opening, _config(max_resident_layers=None, **_CHECKED), opens=True),
    Scenario("open, experts", opening, dataclasses.replace(TinyMixture.config, **_CHECKED), _mixture, 0, opens=True),
    Scenario("prompt and decode", generating, TinyModel.config),
    Scenario("forward", forwarding, TinyModel.config),
    Scenario("embed", embedding, TinyModel.config),
    Scenario("resize", resizing, _config(max_resident_layers=None), restore=lambda engine: engine.resize(LARGE)),
    Scenario("park and resume", parking, _config(kv_budget=8 * BLOCK_BYTES, **_KV), _longer),
    Scenario("park in turns", parking, _config(kv_budget=8 * BLOCK_BYTES, **_TURNS, **_KV), _longer),
    Scenario("fork", forking, TinyModel.config),
    Scenario("turns", forking, _config(**_TURNS)),
    Scenario("experts on demand", generating, TinyMixture.config, _mixture, budget=0),
    Scenario("drafts", generating, _config(max_resident_layers=None), drafts=True),
    Scenario("quantized", generating, TinyModel.config, _quantized),
    Scenario("open, a disk that hangs", opening, _config(read_timeout=_TIMEOUT_S), opens=True),
    Scenario(
        "park, a disk that hangs",
        parking,
        _config(kv_budget=8 * BLOCK_BYTES, read_timeout=_TIMEOUT_S, **_KV),
        _longer,
    ),
)
