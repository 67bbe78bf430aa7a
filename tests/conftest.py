"""Fixtures for all tests: event loops, a disk that can fail, and small models made on the spot."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from blockbuster import BlockBuster
from hypothesis import settings
from transformers import PreTrainedModel

from hermes_async.memory import claims
from hermes_async.memory.other_processes import ProcessRegistry
from tests import architectures
from tests.cli.forked import ForkedCommands
from tests.disks import Disk
from tests.models import LongModel, TinyModel

# Their asserts must also hold under `python -O`, which leaves out those that pytest has not rewritten.
pytest.register_assert_rewrite("tests.engines", "tests.inside", "tests.server")

# How long an example takes says nothing of its result, and machines differ.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores: now and then a test waits for a disk, a thread or a process."""
    return len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1) + 1


def pytest_collection_finish() -> None:
    """What is imported by now stays, so that no collection of garbage looks through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """asyncio's own loop. `both_loops` is for the modules to which the loop makes a difference."""
    return "asyncio", {"use_uvloop": False}


@pytest.fixture(scope="session", autouse=True)
def quiet_and_single_threaded() -> None:
    """Threads only cost time on models of this size."""
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def log_levels() -> Iterator[None]:
    """Puts log levels and handlers back that a command of this process has set."""
    loggers = [logging.getLogger(name) for name in ("hermes_async", "hermes_async.requests", "uvicorn")]
    before = [(logger.level, list(logger.handlers)) for logger in loggers]
    yield
    for logger, (level, handlers) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.handlers[:] = handlers


@pytest.fixture(scope="session", autouse=True)
def no_profiles_of_others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was measured on this machine before must not change what is planned here.

    Compiled functions are the same for all workers of a run.
    """
    cache, base = tmp_path_factory.mktemp("cache"), tmp_path_factory.getbasetemp()
    kernels = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "kernels"
    kernels.mkdir(exist_ok=True)
    (cache / "hermes-async").mkdir()
    (cache / "hermes-async" / "kernels").symlink_to(kernels)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        yield


@pytest.fixture(scope="session", autouse=True)
def no_neighbours(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Engines of other processes, such as those of tests that run beside these, would change budgets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "PROCESSES", ProcessRegistry(tmp_path_factory.mktemp("neighbours")))
        yield


@pytest.fixture
def no_blocking() -> Iterator[BlockBuster]:
    """Fails whatever blocks the event loop, in the package or below it."""
    blockbuster = BlockBuster()
    # The interpreter's own: an import that is already under way, and a pool's idle threads, told to end.
    blockbuster.functions["os.stat"].can_block_in("<frozen importlib._bootstrap>", {"_find_and_load"})
    blockbuster.activate()
    try:
        yield blockbuster
    finally:
        blockbuster.deactivate()


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return TinyModel(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> LongModel:
    return LongModel(tmp_path_factory.mktemp("long"))


@pytest.fixture(scope="session")
def forked() -> Iterator[ForkedCommands]:
    """Runs commands in processes that have imported everything."""
    commands = ForkedCommands()
    yield commands
    commands.close()


@pytest.fixture(scope="session")
def random_model() -> Callable[..., PreTrainedModel]:
    """Makes a model of a config whose greedy tokens vary."""
    return architectures.random_model


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a model as transformers does, in a directory of its own."""

    def save(model: PreTrainedModel, **kwargs: Any) -> Path:
        path = tmp_path_factory.mktemp(type(model).__name__)
        model.save_pretrained(path, **kwargs)
        return path

    return save
