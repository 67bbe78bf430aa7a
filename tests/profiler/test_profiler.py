"""The Layer Profiler: every stage, the disk and the kernels are measured; profiles are kept, age and are checked."""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import CanineConfig, CanineModel, Qwen3MoeConfig, ViTConfig, ViTModel
from typer.testing import CliRunner

from hermes_async import EngineConfig, MemoryBudgetError
from hermes_async.cli import app
from hermes_async.cli.timeline import read
from hermes_async.planning.machine_speeds import DiskRate
from hermes_async.planning.profile import KernelProfile, Profile, StageProfile
from hermes_async.planning.profile_store import MAX_AGE_S, load_profile, profile_file, save_profile
from hermes_async.profiler import machine, profiler
from hermes_async.profiler.profiler import measure
from hermes_async.storage.checkpoint import Checkpoint

pytestmark = pytest.mark.anyio

PROFILE = Profile(
    memory_budget=8 << 20,
    asked_for="8MiB",
    dtype="float32",
    created_at=time.time() - 60,
    stages=(
        StageProfile("layers.0", 4096, False, False, 0.5, {1: 0.1, 16: 0.2}),
        StageProfile("head", 1024, True, True, 0.1, {1: 0.1}),
    ),
    layer_s={1: 2e-5, 16: 4e-5},
    head_s={1: 1e-4},
    sweep_s={1: 0.01},
    handover_s=0.001,
    disk=(DiskRate(2, 1 << 20, 1e9),),
    read_share=0.9,
    kernels=(KernelProfile("float32", "oneDNN", {1: 1e9}),),
)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures as little as can be."""
    monkeypatch.setattr(machine, "_DISK_SECONDS", 0.0)
    monkeypatch.setattr(machine, "_DISK_REST_SECONDS", 0.0)
    monkeypatch.setattr(machine, "_KERNEL_SECONDS", 0.0)
    monkeypatch.setattr(machine, "READ_BYTES", (4096, 16384))


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
        # The context is 64, of which one is left to generate; 8 tokens are a prompt's, whose head computes one output.
        assert stage.compute_s.keys() == ({1, 4} if stage.head else {1, 4, 8, 16})
        assert all(seconds > 0 for seconds in stage.compute_s.values())
    assert [stage.name for stage in profile.stages if stage.head] == ["lm_head"]
    assert profile.sweep_s.keys() >= {1, 4}
    assert profile.handover_s is not None
    assert profile.handover_s >= 0
    assert {(disk.num_agents, disk.read_bytes) for disk in profile.disk} == {
        (agents, size) for agents in (1, 2, 3, 4) for size in (4096, 16384)
    }
    assert all(disk.bytes_per_s > 0 for disk in profile.disk)
    assert [(kernel.dtype, kernel.kernel) for kernel in profile.kernels] == [
        (dtype, kernel) for dtype in ("float32", "bfloat16", "float16") for kernel in ("oneDNN", "native")
    ]
    assert all(flops > 0 for kernel in profile.kernels for flops in kernel.flops.values())


async def test_a_file_that_is_shorter_than_all_reads_is_read_whole(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "READ_BYTES", (1 << 40,))
    (rate,) = await machine.measure_disk(Checkpoint.open(tiny_model.path))
    size = (tiny_model.path / "model.safetensors").stat().st_size
    assert (rate.num_agents, rate.read_bytes) == (1, size // 4096 * 4096)
    assert rate.bytes_per_s > 0


async def test_resident_stages_were_loaded_once_and_are_measured_too(tiny_model: Any) -> None:
    profile = await measure(tiny_model.path, "64MiB", EngineConfig())
    assert all(stage.resident and stage.load_s > 0 and stage.compute_s for stage in profile.stages)
    assert profile.handover_s is not None  # was measured beside it
    assert profile.layer_s.keys() >= {1, 4, 16}
    assert profile.head_s.keys() >= {1, 4}


async def test_where_not_all_fits_what_is_streamed_is_measured_alone(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "automatic_budget", lambda: 0)
    profile = await measure(tiny_model.path, "8MiB", replace(tiny_model.config, max_tokens_per_sweep=None))
    assert not all(stage.resident for stage in profile.stages)
    assert profile.layer_s.keys() == {1, 4, 8, 16}
    assert profile.handover_s is not None
    assert profile.handover_s >= 0


async def test_the_experts_that_a_text_uses_are_measured(random_model: Any, save_model: Any) -> None:
    config = Qwen3MoeConfig(
        vocab_size=300, bos_token_id=1, eos_token_id=2, hidden_size=64, intermediate_size=64, moe_intermediate_size=64,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=16,
        num_experts_per_tok=4, max_position_embeddings=128,
    )  # fmt: skip
    path = save_model(random_model(config))
    profile = await measure(path, "2MiB", EngineConfig(max_sequences=4))
    assert len(profile.expert_uses) == 16
    assert sum(profile.expert_uses) == pytest.approx(4)
    assert all(0 <= uses <= 1 for uses in profile.expert_uses)
    assert sum(profile.expert_uses[:4]) > 1.5  # the likeliest ones are used more often than by chance
    assert profile.layer_s[1] > 0
    assert profile.machine_speeds().expert_uses == profile.expert_uses


async def test_a_model_of_images(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    ViTModel(config).save_pretrained(tmp_path)
    profile = await measure(tmp_path, "8MiB", EngineConfig(max_resident_layers=2, num_loading_agents=1))
    assert all(stage.compute_s.keys() == {17} for stage in profile.stages)
    assert not any(stage.head for stage in profile.stages)
    assert profile.sweep_s.keys() == {1}


async def test_a_model_that_does_not_run_on_few_tokens(tmp_path: Path) -> None:
    config = CanineConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_hash_buckets=512
    )
    CanineModel(config).save_pretrained(tmp_path)
    profile = await measure(tmp_path, "64MiB", EngineConfig())
    assert all(stage.compute_s.keys() == {16, 64, 256} for stage in profile.stages)


def test_what_the_planner_makes_of_a_profile() -> None:
    speeds = PROFILE.machine_speeds()
    assert speeds.measured
    assert speeds.source == "measured here today, in a budget of 8.00 MiB"
    assert (speeds.layer_seconds, speeds.head_seconds) == (PROFILE.layer_s, PROFILE.head_s)
    assert (speeds.sweep_seconds, speeds.handover_seconds) == ({1: 0.01}, 0.001)
    assert speeds.disk == (DiskRate(2, 1 << 20, 0.9e9),)
    assert (
        replace(PROFILE, created_at=time.time() - 3 * 86400)
        .machine_speeds()
        .source.startswith("measured here 3 days ago")
    )


@pytest.mark.parametrize(
    ("native", "bfloat16", "notes"),
    [
        (1e9, 1e9, ["kernels: torch's default, as transformers"]),
        (
            2e9,
            1e9,
            [
                "kernels: torch's default, as transformers; torch's own would be 2.0 times at 1, and round otherwise: "
                "kernels='fastest'"
            ],
        ),
        (
            1e9,
            3e9,
            [
                "kernels: torch's default, as transformers",
                "dtype: float32, as the checkpoint says; bfloat16 multiplies 3.0 times as fast at 1 token",
            ],
        ),
    ],
)
def test_kernels_are_told_of(native: float, bfloat16: float, notes: list[str]) -> None:
    kernels = (
        KernelProfile("float32", "oneDNN", {1: 1e9}),
        KernelProfile("float32", "native", {1: native}),
        KernelProfile("bfloat16", "oneDNN", {1: bfloat16}),
    )
    assert list(replace(PROFILE, kernels=kernels).machine_speeds().explanation) == notes


async def test_a_budget_that_is_too_small(tiny_model: Any) -> None:
    with pytest.raises(MemoryBudgetError):
        await measure(tiny_model.path, "1KiB", EngineConfig())


# Keeping


def test_a_profile_comes_back_as_it_was(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "profile.json"
    assert load_profile(file) is None
    save_profile(file, PROFILE)
    assert load_profile(file) == PROFILE
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_profile_follows_no_link_and_waits_for_no_pipe(tmp_path: Path) -> None:
    kept, file = tmp_path / "kept", tmp_path / "profile.json"
    kept.write_text("kept")
    file.symlink_to(kept)
    save_profile(file, PROFILE)
    assert load_profile(file) == PROFILE
    assert kept.read_text() == "kept"
    file.unlink()
    os.mkfifo(file)
    assert load_profile(file) is None


@pytest.mark.parametrize("age", [-3600, MAX_AGE_S + 3600])
def test_an_old_profile_is_not_believed(tmp_path: Path, age: float, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "profile.json"
    save_profile(file, replace(PROFILE, created_at=time.time() - age))
    assert load_profile(file) is None
    assert "old and is to be measured again" in caplog.text


@pytest.mark.parametrize("content", ["", "no json", "[]", "{}", '{"created_at": 1e999}', b"\xff\xfe"])
def test_a_damaged_profile_is_not_believed(
    tmp_path: Path, content: str | bytes, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "profile.json"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert load_profile(file) is None
    assert "to be measured again" in caplog.text


@pytest.mark.parametrize("name", ["stages", "disk", "kernels", "memory_budget", "layer_s", "sweep_s"])
def test_a_profile_with_a_part_that_is_wrong_is_not_believed(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "profile.json"
    save_profile(file, PROFILE)
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: ["wrong"]}))
    assert load_profile(file) is None
    assert "is damaged and is to be measured again" in caplog.text


def test_a_folder_that_cannot_be_written_costs_only_the_next_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    save_profile(tmp_path / "file" / "profile.json", PROFILE)
    assert "cannot be kept" in caplog.text


def test_what_a_profile_is_for(tiny_model: Any, long_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, long = Checkpoint.open(tiny_model.path), Checkpoint.open(long_model.path)
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    file = profile_file(tiny)
    assert file.parent == Path("/cache/hermes-async/profiles")
    assert file == profile_file(tiny)
    assert file != profile_file(long)
    monkeypatch.setattr("hermes_async.planning.profile_store.torch.__version__", "0")
    assert profile_file(tiny) != file


# The command


def test_the_command_measures_once(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured: list[Any] = []

    async def counted(*args: Any) -> Profile:
        measured.append(args)
        return await measure(*args)

    monkeypatch.setattr("hermes_async.profiler.profiler.measure", counted)

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
        assert json.loads(run("--json", "--loading-agents", "1")) != first  # asked for otherwise
        assert len(measured) == 3
        (file,) = (tmp_path / "hermes-async" / "profiles").iterdir()
        file.write_text("damaged")
        run()
    assert len(measured) == 4
    assert "is damaged and is to be measured again" in caplog.text


def test_the_command_writes_a_trace(tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    arguments = ["profile", str(tiny_model.path), "--memory", "8MiB", "--max-resident-layers", "3", "--json"]
    for _ in range(2):  # also where there is a profile already
        trace = tmp_path / "trace.json"
        assert CliRunner().invoke(app, [*arguments, "--trace", str(trace)]).exit_code == 0
        rows = read(trace).rows
        assert {"sweeps", "inference agent", "daemon agent", "loading agent 0"} <= rows.keys()
        trace.unlink()
    result = CliRunner().invoke(app, [*arguments, "--trace", str(tmp_path / "no" / "trace.json")])
    assert result.exit_code == 1
    assert "cannot be written" in result.output
