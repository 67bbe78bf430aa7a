"""Stages of modules that only some calls run belong to the group of those calls."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import transformers as t

from hermes_async import EngineConfig
from hermes_async.engine.opening import open_model
from hermes_async.modeling.partition import partition

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("limit", [None, 1 << 20, 5_000])
def test_a_tower_is_a_group(limit: int | None, tmp_path: Path) -> None:
    config = t.CLIPConfig(
        text_config={**SMALL, "vocab_size": 100}, vision_config={**SMALL, "image_size": 16, "patch_size": 4}
    )
    t.CLIPModel(config).save_pretrained(tmp_path)
    with closing(open_model(tmp_path, "1GiB", EngineConfig())) as opened:
        tower = {name: "vision" for name in opened.probe.visits if name.startswith("vision_model.")}
        parts = partition(opened.skeleton, replace(opened.probe, groups=tower), limit)
        assert bool(parts.linear_blocks) is (limit == 5_000)
        assert {stage.group for stage in parts.stages} == {None, "vision"}
        for stage in parts.stages:
            assert (stage.group == "vision") is stage.name.startswith("vision_model.")
        without = partition(opened.skeleton, opened.probe, limit)
        text = [stage for stage in without.stages if not stage.name.startswith("vision_model.")]
        assert [stage for stage in parts.stages if stage.group is None] == text
        in_base = {each.name for each in parts.base.placements if each.name.startswith("vision_model.")}
        divided = {"vision_model.embeddings.class_embedding"} if limit == 5_000 else set()  # the embeddings do not fit
        assert in_base == divided
        placed = [
            {each.name for stage in (one.base, *one.stages) for each in stage.placements} for one in (parts, without)
        ]
        assert placed[0] == placed[1]


def test_tied_weights_of_an_optional_stage_and_another_always_stay(tmp_path: Path) -> None:
    """If all is resident, they are loaded once, and a sweep may enter either of the stages without the other."""
    config = t.LlamaConfig(**SMALL, vocab_size=100, tie_word_embeddings=True)
    t.LlamaForCausalLM(config).save_pretrained(tmp_path)
    tied = {"model.embed_tokens.weight", "lm_head.weight"}
    with closing(open_model(tmp_path, "1GiB", EngineConfig())) as opened:
        for groups in ({}, {"lm_head": "head"}):
            parts = partition(opened.skeleton, replace(opened.probe, groups=groups), None)
            held = {placement.name for placement in parts.base.placements} & tied
            assert held == (tied if groups else set())
            staged = {placement.name for stage in parts.stages for placement in stage.placements} & tied
            assert staged == tied - held
