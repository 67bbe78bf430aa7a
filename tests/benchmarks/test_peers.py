"""The benchmark of other libraries: what it reports, and what it does with too little disk and programs that fail."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import peer_sides, peers_report
from benchmarks.environments import Environment, InstallError
from benchmarks.gguf_files import convert_to_gguf
from benchmarks.side_runs import prompt, run_program

CASE = {"limit": 500, "share": 0.5, "sessions": 1}
MIB = 2**20


def run(rate: float, first_token_s: float, tokens: list[int], error: str | None = None) -> dict[str, Any]:
    first = {
        "prompt_tokens": 8,
        "first_token_s": first_token_s,
        "decode_tokens_per_s": rate,
        "read_bytes_per_token": 100.0 * MIB,
        "tokens": [tokens],
    }
    long = {"prompt_tokens": 2048, "first_token_s": 10 * first_token_s, "tokens": [[1]]}
    return {"points": [first, long], "error": error, "opening_s": 1.0, "peak_bytes": 300 * MIB, "limit_error": None}


def test_rows_have_medians_ratios_and_equal_tokens() -> None:
    runs = {
        "engine": [run(rate, 1.0, [5, 6, 7, 8]) for rate in (4.0, 9.0, 5.0)],
        "llama.cpp": [run(2.0, 2.0, [5, 6, 1, 8])],
    }
    engine, other = peers_report.rows(CASE, runs, 1000 * MIB)
    assert (engine["tokens_per_s"], other["tokens_per_s"], other["ratio"]) == (5.0, 2.0, 2.5)
    assert (engine["same_tokens"], other["same_tokens"]) == (1.0, 0.5)
    assert engine["of_disk"] == 5.0, "500 MiB are read for a token, at 500 MiB/s"
    assert other["first_token_s"] == {8: 2.0, 2048: 20.0}


def test_checks_compare_with_the_targets() -> None:
    runs = {"engine": [run(5.0, 1.0, [5])], "llama.cpp": [run(2.0, 2.0, [5])], "airllm": [run(1.0, 2.0, [5])]}
    found = peers_report.checks(peers_report.rows(CASE, runs, 1000 * MIB))
    assert set(found.values()) == {
        (2.5, 2.2, "at least"),
        (5.0, 9.0, "at least"),
        (2 / 3, 1.25, "at most"),
        (2.0, 0.9, "at least"),
    }


def test_a_side_that_fails_has_its_error_in_the_table_and_no_figure() -> None:
    runs = {"engine": [run(5.0, 1.0, [5])], "llama.cpp": [{"points": [], "error": "not installed: no compiler"}]}
    rows = peers_report.rows(CASE, runs, 1000 * MIB)
    assert "FAILS: not installed: no compiler" in "\n".join(peers_report.lines(CASE, rows, 1000 * MIB))
    assert all(isinstance(check, str) and "no compiler" in check for check in peers_report.checks(rows).values())


def test_a_disk_that_was_not_held_gives_no_ratio() -> None:
    runs = {
        "engine": [run(5.0, 1.0, [5]) | {"limit_error": "no io controller"}],
        "llama.cpp": [run(2.0, 2.0, [5])],
    }
    found = peers_report.checks(peers_report.rows(CASE, runs, 1000 * MIB))
    ratio = next(check for name, check in found.items() if "tokens_per_s" in name)
    assert isinstance(ratio, str) and "no io controller" in ratio


@pytest.mark.parametrize("free_gib", [0.5, 4.0])
def test_too_little_disk_gives_fewer_weights_or_stops(
    free_gib: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("usage", (), {"free": int(free_gib * 2**30)})
    monkeypatch.setattr("benchmarks.peer_sides.shutil.disk_usage", lambda path: usage)
    if free_gib < 1:
        with pytest.raises(SystemExit, match="are needed; give another --folder"):
            peer_sides.fitting_config(6, list(peer_sides.SIDES), tmp_path)
    else:
        asked = peer_sides.fitting_config(1, ["engine"], tmp_path)
        assert peer_sides.fitting_config(6, list(peer_sides.SIDES), tmp_path).num_hidden_layers < 40
        assert asked.num_hidden_layers < peer_sides.fitting_config(6, ["engine"], tmp_path).num_hidden_layers
    assert not list(tmp_path.iterdir())


def test_a_library_that_cannot_be_installed_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(one: Environment, cache: Path) -> Path:
        raise InstallError(f"pip cannot install {one.name}")

    monkeypatch.setattr(peer_sides, "environment", fail)
    found, errors = peer_sides.pythons([peer_sides.SIDES[name] for name in ("engine", "airllm")], tmp_path)
    assert found == {"engine": Path(sys.executable)}
    assert errors == {"airllm": "not installed: pip cannot install peer-airllm"}


def test_a_program_that_fails_is_reported_with_its_last_words(tmp_path: Path) -> None:
    asked = {"path": str(tmp_path / "nothing"), "threads": 1, "points": [{"prompts": [prompt(2)], "tokens": 3}]}
    record = run_program("benchmarks.no_such_program", asked, memory_bytes=None, disk_limit=0, grouped=False)
    assert record["points"] == []
    assert "no_such_program" in record["error"]


def test_a_gguf_file_has_the_tensors_of_the_checkpoint(tmp_path: Path) -> None:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    convert_to_gguf(tmp_path, config, tmp_path / "model.gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == 2 + 2 * 9
    down = model.model.layers[1].mlp.down_proj.weight
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight"].data, down.detach().view(torch.uint8).numpy())
    keys = model.model.layers[0].self_attn.k_proj.weight.detach().view(torch.uint8).numpy()
    stored = tensors["blk.0.attn_k.weight"].data
    np.testing.assert_array_equal(stored[[0, 1, 2]], keys[[0, 8, 1]])  # a head's halves are neighbours
