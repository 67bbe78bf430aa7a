"""The benchmark of growth: its fits, its table, and the checkpoints that share files."""

from __future__ import annotations

from pathlib import Path

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import growth, growth_axes
from benchmarks.checkpoints import random_checkpoint, shortened
from hermes_async import Engine, SamplingParams

XS = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]


@pytest.mark.parametrize("exponent", [0.0, 1.0, 2.0])
def test_the_exponent_of_a_power_law_is_found(exponent: float) -> None:
    assert growth.fit(XS, [0.3 * x**exponent for x in XS])["exponent"] == pytest.approx(exponent)


def test_the_exponent_is_that_of_the_upper_half() -> None:
    ys = [5.0, 7.0, 4.0, *(x**2 for x in XS[3:])]
    assert growth.fit(XS, ys)["exponent"] == pytest.approx(2)


def test_what_is_linear_beside_a_constant_grows_by_less_than_its_size() -> None:
    found = growth.fit(XS, [0.5 + 0.01 * x for x in XS])
    assert (found["intercept"], found["slope"]) == (pytest.approx(0.5), pytest.approx(0.01))
    assert found["exponent"] < 1


def test_what_is_quadratic_beside_a_line_misses_the_check_of_a_line() -> None:
    assert growth.fit(XS, [1 + 0.1 * x + 0.01 * x**2 for x in XS])["exponent"] > 1.1


def test_a_table_has_each_point_and_what_was_expected() -> None:
    axis = growth_axes.AXES["context"]
    columns = {"prompt": [x**2 for x in XS], "step": list(XS)}
    fits = {name: growth.fit(XS, ys) for name, ys in columns.items()}
    lines = growth.table(axis, XS, columns, fits)
    assert [line.split()[0] for line in lines if line][1 : 1 + len(XS)] == ["1", "2", "4", "8", "16", "32", "64"]
    assert [line.split()[-2:] for line in lines if "exponent" in line or "at most" in line] == [
        ["2.00", "1.00"],
        ["2", "1"],
    ]


def test_too_little_disk_gives_smaller_models_or_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": int(3.0 * growth_axes.GIB)})
    monkeypatch.setattr("benchmarks.growth_axes.shutil.disk_usage", lambda path: usage)
    assert growth_axes.fitting_sizes([0.5, 1, 2, 4], tmp_path) == [0.5, 1, 2]
    with pytest.raises(SystemExit, match="give another --folder"):
        growth_axes.fitting_sizes([0.5, 4], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_shortened_checkpoint_is_the_first_layers(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    prompt = list(range(1, 9))

    async def generated(path: Path) -> list[int]:
        async with Engine(path, memory_budget="64MiB") as engine:
            completion = await engine.complete(prompt, SamplingParams(max_tokens=6, temperature=0, ignore_eos=True))
            return list(completion.token_ids)

    with random_checkpoint(config, torch.float32, tmp_path) as whole, shortened(whole, 2) as path:
        ours = anyio.run(generated, path)
        model = AutoModelForCausalLM.from_pretrained(whole).eval()
        del model.model.layers[2:]
        with torch.inference_mode():
            expected = model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert ours == expected[0, len(prompt) :].tolist()
    assert not list(tmp_path.iterdir())
