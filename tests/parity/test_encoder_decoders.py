"""Encoder-decoders: greedy tokens are those of transformers' `generate`; the encoder is read for first calls only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
import transformers as t

from hermes_async import Engine, EngineConfig, SamplingParams
from hermes_async.engine.opening import open_model

pytestmark = pytest.mark.anyio

NUM_TOKENS = 8
LENGTHS = (1, 5, 40, 200, 17)  # of the prompts
NUM_PROMPTS = len(LENGTHS)
TOKENS = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 3}
SIDES = TOKENS | {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
}
MODELS: dict[str, Callable[[], Any]] = {
    "T5ForConditionalGeneration": lambda: t.T5Config(**TOKENS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
    # Its head is no table of the input, and it is not tied.
    "MT5ForConditionalGeneration": lambda: t.MT5Config(
        **TOKENS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, tie_word_embeddings=False
    ),
    "BartForConditionalGeneration": lambda: t.BartConfig(**SIDES, forced_bos_token_id=7),
    "MBartForConditionalGeneration": lambda: t.MBartConfig(**SIDES),
    "MarianMTModel": lambda: t.MarianConfig(**SIDES),  # its positions are not in the checkpoint
    "PegasusForConditionalGeneration": lambda: t.PegasusConfig(**SIDES),
    # The two sides have vocabularies of their own.
    "FSMTForConditionalGeneration": lambda: t.FSMTConfig(
        **{name: value for name, value in SIDES.items() if name != "vocab_size"},
        src_vocab_size=300,
        tgt_vocab_size=200,
        langs=["en", "de"],
    ),
}


@dataclass(frozen=True)
class Subject:
    """A checkpoint, and what transformers generates from each prompt alone."""

    path: Path
    prompts: list[list[int]]
    expected: list[list[int]]


def generated(model: Any, prompts: Sequence[list[int]]) -> list[list[int]]:
    model.generation_config.eos_token_id = None
    greedy = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "num_beams": 1}
    with torch.inference_mode():
        return [model.generate(torch.tensor([prompt]), **greedy)[0, 1:].tolist() for prompt in prompts]


@pytest.fixture(scope="module", params=MODELS)
def subject(
    request: pytest.FixtureRequest, random_model: Callable[..., Any], save_model: Callable[..., Path]
) -> Subject:
    model_class = getattr(t, request.param)
    model = random_model(MODELS[request.param](), model_class=model_class)
    model.generation_config = t.GenerationConfig.from_model_config(model.config)
    path = save_model(model)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(4, 200, (length,), generator=generator).tolist() for length in LENGTHS]
    return Subject(path, prompts, generated(model_class.from_pretrained(path).eval(), prompts))


PARAMS = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)


async def test_alone_together_and_joining(subject: Subject) -> None:
    opened = await anyio.to_thread.run_sync(open_model, subject.path, "64MiB", EngineConfig())
    opened.close()
    answers: dict[int, list[int]] = {}
    async with Engine(subject.path, memory_budget=opened.plan.minimum_budget) as engine:
        assert engine.plan.in_turns

        async def answer(idx: int) -> None:
            completion = await engine.complete(subject.prompts[idx], PARAMS)
            answers[idx] = list(completion.token_ids)
            assert completion.usage.prompt_tokens == len(subject.prompts[idx])

        for idx in range(3):
            await answer(idx)
        assert [answers.pop(idx) for idx in range(3)] == subject.expected[:3]
        async with anyio.create_task_group() as tasks:
            for idx in range(NUM_PROMPTS):
                tasks.start_soon(answer, idx)
        assert [answers.pop(idx) for idx in range(NUM_PROMPTS)] == subject.expected
        async with anyio.create_task_group() as tasks:  # one joins after each chunk of the first
            joining = iter(range(1, NUM_PROMPTS))
            tokens: list[int] = []
            async for chunk in engine.generate(subject.prompts[0], PARAMS):
                tokens += chunk.token_ids
                for idx in islice(joining, 2):
                    tasks.start_soon(answer, idx)
            for idx in joining:
                tasks.start_soon(answer, idx)
        assert [tokens, *(answers[idx] for idx in range(1, NUM_PROMPTS))] == subject.expected
        statistics = engine.statistics()
        assert statistics.peak_bytes_in_use <= engine.plan.memory_budget
        assert statistics.kv_bytes == 0


async def test_in_more_memory_without_drafts(subject: Subject) -> None:
    config = EngineConfig(prompt_lookup=False, max_resident_layers=6)
    completions: list[list[int]] = [[] for _ in subject.prompts]
    async with Engine(subject.path, memory_budget="64MiB", config=config) as engine:
        sizes = {stage.group: 0 for stage in engine.plan.stages}

        async def answer(idx: int) -> None:
            completions[idx] = list((await engine.complete(subject.prompts[idx], PARAMS)).token_ids)

        async with anyio.create_task_group() as tasks:
            for idx in range(len(subject.prompts)):
                tasks.start_soon(answer, idx)
        assert sizes.keys() == {None, "encoder"}
    assert completions == subject.expected


async def test_the_encoder_is_read_for_first_calls_only(subject: Subject) -> None:
    config = EngineConfig(prompt_lookup=False, max_resident_layers=3, num_loading_agents=2)
    async with Engine(subject.path, memory_budget="64MiB", config=config) as engine:
        await engine.complete(subject.prompts[1], PARAMS)
        before = engine.statistics()
        await engine.complete(subject.prompts[1], PARAMS)
        after = engine.statistics()
        of_encoder = engine.plan.bytes_by_group["encoder"]
        of_decoder = sum(stage.slot_bytes for stage in engine.plan.stages) - of_encoder
        read = after.bytes_read - before.bytes_read
        assert after.sweeps - before.sweeps == NUM_TOKENS
        # The ring is full of the next sweep's first stages in between.
        assert read <= of_encoder + (NUM_TOKENS + 2) * of_decoder
