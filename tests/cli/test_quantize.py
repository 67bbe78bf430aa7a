"""`hermes-async quantize`: what it prints, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from hermes_async.cli import app
from hermes_async.conversion import quantizing
from hermes_async.storage.shard_writer import ShardWriter
from tests.models import TinyModel


def hermes(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def test_it_states_the_loss(tiny_model: TinyModel, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{idx}" for idx in range(2, 60)))
    options = ("--format", "int8", "--text", text, "--memory", "8MiB")
    result = hermes("quantize", tiny_model.path, tmp_path / "a", *options)
    assert result.exit_code == 0
    assert "int8, one scale a row" in result.stdout and "perplexity" in result.stdout and str(text) in result.stdout
    record = json.loads(hermes("quantize", tiny_model.path, tmp_path / "b", *options, "--json").stdout.splitlines()[-1])
    assert (record["num_quantized"], record["loss"]["num_tokens"]) == (21, 57)
    assert 0 < record["loss"]["mean_error"] < 0.1 < record["loss"]["perplexity_after"]
    assert f"{record['loss']['perplexity_after']:.3f} after" in result.stdout


def test_without_a_check(tiny_model: TinyModel, tmp_path: Path) -> None:
    result = hermes("quantize", tiny_model.path, tmp_path / "a", "--format", "fp8", "--no-check")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "perplexity" not in result.stdout


def test_it_refuses_in_one_line(tiny_model: TinyModel, tmp_path: Path) -> None:
    result = hermes("quantize", tiny_model.path, tmp_path / "a", "--format", "int4", "--group", "64")
    assert (result.exit_code, result.stdout, len(result.stderr.splitlines())) == (1, "", 1)
    result = hermes("quantize", tiny_model.path, tmp_path / "a", "--format", "fp8", "--text", tmp_path / "no.txt")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    result = hermes("quantize", tmp_path / "m.gguf", tmp_path / "a", "--format", "fp8")
    assert (result.exit_code, "quantized already (GGUF)" in result.stderr) == (1, True)
    result = hermes("quantize", "org/name:Q8_0", tmp_path / "a", "--format", "fp8")  # nothing is downloaded
    assert (result.exit_code, "quantized already (GGUF)" in result.stderr) == (1, True)
    assert hermes("quantize", tiny_model.path, tmp_path / "a").exit_code == 2
    assert hermes("quantize", tiny_model.path, tmp_path / "a", "--format", "int3").exit_code == 2
    assert not (tmp_path / "a").exists()


def test_ctrl_c_leaves_what_the_same_command_continues(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Interrupting(ShardWriter):
        def append(self, name: str, piece: Any) -> None:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(quantizing, "ShardWriter", Interrupting)
        result = hermes("quantize", tiny_model.path, tmp_path / "a", "--format", "fp8", "--no-check")
    assert (result.exit_code, "the same command goes on" in result.stderr) == (130, True)
    assert not list((tmp_path / "a").glob("*.safetensors"))
    assert hermes("quantize", tiny_model.path, tmp_path / "a", "--format", "fp8", "--no-check").exit_code == 0
