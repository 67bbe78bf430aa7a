"""Kernels: torch's default, unless an engine asks for what was measured to be faster."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hermes_async import Engine, EngineConfig, SamplingParams
from hermes_async.modeling import streamed
from hermes_async.planning.machine_speeds import DiskRate
from hermes_async.planning.profile import KernelProfile, Profile
from hermes_async.planning.profile_store import profile_file, save_profile
from hermes_async.storage.checkpoint import Checkpoint

pytestmark = pytest.mark.anyio

PROMPT = [5, 6, 7, 8, 9]
PARAMS = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)


def profile(native: dict[int, float]) -> Profile:
    """In which torch's own kernels are so many times as fast as oneDNN's."""
    return Profile(
        memory_budget=8 << 20,
        asked_for="8MiB",
        dtype="float32",
        created_at=time.time(),
        stages=(),
        layer_s={1: 1e-9, 4: 2e-9},
        head_s={1: 1e-9, 4: 2e-9},
        sweep_s={1: 1e-3},
        handover_s=None,
        disk=(DiskRate(1, 1 << 20, 1e9), DiskRate(2, 1 << 20, 1e9)),
        read_share=1.0,
        kernels=(
            KernelProfile("float32", "oneDNN", dict.fromkeys(native, 1e9)),
            KernelProfile("float32", "native", {count: 1e9 * gain for count, gain in native.items()}),
        ),
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Of each sweep, its tokens and whether oneDNN was on."""
    sweeps: list[tuple[int, bool]] = []
    forward = streamed.forward_packed

    def observed(model: Any, attention: Any, batch: Any) -> torch.Tensor:
        sweeps.append((batch.input_ids.numel(), bool(torch._C._get_mkldnn_enabled())))
        return forward(model, attention, batch)

    monkeypatch.setattr(streamed, "forward_packed", observed)
    return sweeps


@pytest.mark.parametrize(
    ("kernels", "native", "without"),
    [
        ("transformers", {1: 2.0, 4: 2.0}, set()),
        ("auto", {1: 2.0, 4: 2.0}, set()),
        ("fastest", {1: 2.0, 4: 0.5}, {1}),
        ("fastest", {1: 2.0, 16: 1.5, 64: 0.5}, {1, 5}),
        ("fastest", {1: 1.05, 4: 3.0}, set()),  # by few tokens they gain nothing, and then no more are asked
        ("fastest", {}, set()),
    ],
)
@pytest.mark.parametrize("resident", [False, True])
async def test_sweeps_of_few_tokens(
    tiny_model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    seen: list[tuple[int, bool]],
    kernels: str,
    native: dict[int, float],
    without: set[int],
    resident: bool,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    save_profile(profile_file(Checkpoint.open(tiny_model.path)), profile(native))
    config = replace(
        tiny_model.config, prompt_lookup=False, kernels=kernels, max_resident_layers=None if resident else 3
    )
    expected = tiny_model.greedy(PROMPT, 6)
    async with Engine(tiny_model.path, memory_budget="8MiB", config=config) as engine:
        (line,) = [reason for reason in engine.plan.explanation if reason.startswith("kernels: ")]
        assert ("in sweeps of up to" in line) is bool(without)
        completion = await engine.complete(PROMPT, PARAMS)
    assert completion.token_ids == expected
    assert {count for count, _ in seen} == {1, 5}
    assert {count for count, on in seen if not on} == without
    assert torch._C._get_mkldnn_enabled()


async def test_without_a_profile_nothing_is_known_to_be_faster(
    tiny_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[tuple[int, bool]]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    async with Engine(tiny_model.path, memory_budget="8MiB", config=EngineConfig(kernels="fastest")) as engine:
        assert "kernels: torch's default, as nothing was measured here" in engine.plan.explanation
        await engine.complete(PROMPT, PARAMS)
    assert all(on for _, on in seen)
