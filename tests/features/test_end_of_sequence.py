"""Which tokens end a sequence: what checkpoints say of it, in the ways that there are."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from hermes_async import CheckpointError, Engine, HermesError, SamplingParams

pytestmark = pytest.mark.anyio

CONFIG, GENERATION = "config.json", "generation_config.json"
END = "END"
"""Stands for a token that comes."""


@pytest.fixture
def checkpoint(tiny_model: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model.path, tmp_path / "checkpoint"))


def says(checkpoint: Path, file: str, eos: Any) -> None:
    """Without `eos_token_id` in the other file."""
    for name in (CONFIG, GENERATION):
        entries = json.loads((checkpoint / name).read_text())
        entries.pop("eos_token_id", None)
        if name == CONFIG:
            entries["eos_token_id"] = None
        if name == file:
            entries["eos_token_id"] = eos
        (checkpoint / name).write_text(json.dumps(entries))


@pytest.mark.parametrize("file", [CONFIG, GENERATION])
@pytest.mark.parametrize(
    ("eos", "ends"),
    [
        (END, True),
        ([END], True),
        ([END, END], True),
        ([-1, END, 10**6], True),
        (None, False),
        ([], False),
        (-1, False),
        (96, False),
        (2**70, False),
    ],
)
async def test_the_tokens_that_end_a_sequence(
    tiny_model: Any, checkpoint: Path, file: str, eos: Any, ends: bool
) -> None:
    reference = tiny_model.references[1]
    end = reference[2]
    says(checkpoint, file, json.loads(json.dumps(eos).replace(json.dumps(END), str(end))))
    expected = reference[: reference.index(end) + 1] if ends else reference
    async with Engine(checkpoint, memory_budget="8MiB", config=tiny_model.config) as engine:
        completion = await engine.complete(tiny_model.prompts[1], SamplingParams(max_tokens=12, temperature=0))
        assert completion.token_ids == expected
        # Tokens that are none of the vocabulary are no hindrance.
        late = SamplingParams(max_tokens=12, min_tokens=12, temperature=0)
        assert len((await engine.complete(tiny_model.prompts[1], late)).token_ids) == 12


async def test_a_whole_float_is_a_token_as_in_transformers(tiny_model: Any, checkpoint: Path) -> None:
    reference = tiny_model.references[1]
    says(checkpoint, GENERATION, float(reference[0]))
    async with Engine(checkpoint, memory_budget="8MiB", config=tiny_model.config) as engine:
        completion = await engine.complete(tiny_model.prompts[1], SamplingParams(max_tokens=12, temperature=0))
        assert completion.token_ids == reference[:1]


@pytest.mark.parametrize("file", [CONFIG, GENERATION])
@pytest.mark.parametrize("eos", [12.5, math.inf, "12", "</s>", True, [[12]], [12, None], {"a": 12}, ["</s>"]])
async def test_what_is_no_token_is_refused_by_file_and_value(
    tiny_model: Any, checkpoint: Path, file: str, eos: Any
) -> None:
    says(checkpoint, file, eos)
    with pytest.raises(HermesError, match=f"{file}.*eos_token_id.*{re.escape(repr(eos))}"):
        async with Engine(checkpoint, memory_budget="8MiB", config=tiny_model.config):
            pytest.fail("entered")


@pytest.mark.parametrize("text", ["[]", "{", "5", '"eos_token_id"'])
async def test_a_generation_config_that_is_none(tiny_model: Any, checkpoint: Path, text: str) -> None:
    (checkpoint / GENERATION).write_text(text)
    with pytest.raises(CheckpointError, match=GENERATION):
        async with Engine(checkpoint, memory_budget="8MiB", config=tiny_model.config):
            pytest.fail("entered")
