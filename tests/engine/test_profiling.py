"""The Layer Profiler: every stage, the disk and the kernels are measured; profiles are kept, age and are checked."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import ViTConfig, ViTModel
from typer.testing import CliRunner

from hermes_async import EngineConfig, MemoryBudgetError
from hermes_async.cli import app
from hermes_async.cli import profile as profile_module
from hermes_async.engine import profiling
from hermes_async.engine.profile_store import MAX_AGE_S, load_profile, profile_file, save_profile
from hermes_async.engine.profiling import DiskProfile, KernelProfile, Profile, StageProfile, measure
from hermes_async.storage.checkpoint import Checkpoint
from tests.engines import one_loop

pytestmark = pytest.mark.anyio
anyio_backend = one_loop(use_uvloop=True)

PROFILE = Profile(
    memory_budget=8 << 20,
    dtype="float32",
    created_at=time.time() - 60,
    stages=(StageProfile("layers.0", 4096, False, 0.5, {1: 0.1, 16: 0.2}),),
    disk=(DiskProfile(2, 1 << 20, 1e9),),
    kernels=(KernelProfile("float32", "oneDNN", {1: 1e9}),),
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures as little as can be."""
    monkeypatch.setattr(profiling, "_DISK_SECONDS", 0.0)
    monkeypatch.setattr(profiling, "_KERNEL_SECONDS", 0.0)
    monkeypatch.setattr(profiling, "READ_BYTES", (4096, 16384))


# Measuring


async def test_every_stage_is_measured(tiny_model: Any, no_blocking: Any) -> None:
    config = replace(tiny_model.config, max_tokens_per_sweep=None)
    profile = await measure(tiny_model.path, "8MiB", config)
    assert (profile.memory_budget, profile.dtype) == (8 << 20, "float32")
    assert abs(profile.created_at - time.time()) < 600
    assert [stage.name for stage in profile.stages if not stage.resident][:2] == ["model.layers.0", "model.layers.1"]
    for stage in profile.stages:
        assert stage.nbytes > 0
        assert stage.load_s > 0
        assert stage.compute_s.keys() == {1, 16}  # the context is 64, of which one is left to generate
        assert all(seconds > 0 for seconds in stage.compute_s.values())
    assert {(disk.num_agents, disk.read_bytes) for disk in profile.disk} == {
        (agents, size) for agents in (1, 2, 4) for size in (4096, 16384)
    }
    assert all(disk.bytes_per_s >= 0 for disk in profile.disk)
    assert [(kernel.dtype, kernel.kernel) for kernel in profile.kernels] == [
        (dtype, kernel) for dtype in ("float32", "bfloat16", "float16") for kernel in ("oneDNN", "native")
    ]
    assert all(flops > 0 for kernel in profile.kernels for flops in kernel.flops.values())


async def test_resident_stages_were_loaded_once_and_are_measured_too(tiny_model: Any) -> None:
    profile = await measure(tiny_model.path, "64MiB", EngineConfig())
    assert all(stage.resident and stage.load_s > 0 and stage.compute_s for stage in profile.stages)


async def test_a_model_of_images(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    ViTModel(config).save_pretrained(tmp_path)
    profile = await measure(tmp_path, "8MiB", EngineConfig(max_resident_layers=2, num_loading_agents=1))
    assert all(stage.compute_s.keys() == {17} for stage in profile.stages)


async def test_a_budget_that_is_too_small(tiny_model: Any) -> None:
    with pytest.raises(MemoryBudgetError):
        await measure(tiny_model.path, "1KiB", EngineConfig())


# Keeping


def test_a_profile_comes_back_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "profile.json"
    assert load_profile(file) is None
    save_profile(file, PROFILE)
    assert load_profile(file) == PROFILE
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize("age", [-3600, MAX_AGE_S + 3600])
def test_an_old_profile_is_not_believed(tmp_path: Path, age: float, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "profile.json"
    save_profile(file, replace(PROFILE, created_at=time.time() - age))
    assert load_profile(file) is None
    assert "old and is measured again" in caplog.text


@pytest.mark.parametrize("content", ["", "no json", "[]", "{}", '{"created_at": 1e999}', b"\xff\xfe"])
def test_a_damaged_profile_is_not_believed(
    tmp_path: Path, content: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "profile.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert load_profile(file) is None
    assert "measured again" in caplog.text


@pytest.mark.parametrize("name", ["stages", "disk", "kernels", "memory_budget"])
def test_a_profile_with_a_part_that_is_wrong_is_not_believed(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "profile.json"
    save_profile(file, PROFILE)
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: ["wrong"]}))
    assert load_profile(file) is None
    assert "is damaged and is measured again" in caplog.text


def test_a_folder_that_cannot_be_written_costs_only_the_next_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    save_profile(tmp_path / "file" / "profile.json", PROFILE)
    assert "cannot be kept" in caplog.text


def test_what_a_profile_is_for(tiny_model: Any, long_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, long = Checkpoint.open(tiny_model.path), Checkpoint.open(long_model.path)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    file = profile_file(tiny, "8MiB")
    assert file.parent == Path("/cache/hermes-async/profiles")
    assert file == profile_file(tiny, "8MiB")
    assert len({file, profile_file(tiny, "9MiB"), profile_file(long, "8MiB")}) == 3
    monkeypatch.setattr("hermes_async.engine.profile_store.torch.__version__", "0")
    assert profile_file(tiny, "8MiB") != file


# The command


def test_the_command_measures_once(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured: list[Any] = []

    async def counted(*args: Any) -> Profile:
        measured.append(args)
        return await measure(*args)

    monkeypatch.setattr(profile_module, "measure", counted)

    def run(*args: str) -> Any:
        arguments = ["profile", str(tiny_model.path), "--memory", "8MiB", "--max-resident-layers", "3", *args]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0
        return result.stdout

    with caplog.at_level(logging.WARNING):
        tables = run()
        for title in ("stages, float32, in 8.00 MiB", "disk, bytes a second", "kernels, GFLOP/s by tokens"):
            assert title in tables
        first = json.loads(run("--json"))
        assert len(measured) == 1
        assert json.loads(run("--json", "--refresh")) != first
        assert len(measured) == 2
        (file,) = (tmp_path / "hermes-async" / "profiles").iterdir()
        file.write_text("damaged")
        run()
    assert len(measured) == 3
    assert "is damaged and is measured again" in caplog.text
