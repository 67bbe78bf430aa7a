"""What users do with an encoder-decoder: texts in, options, many at once, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    GenerationConfig,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from hermes_async import (
    ConfigError,
    ContextLengthError,
    DeadlineExceededError,
    Engine,
    EngineConfig,
    MemoryBudgetError,
    RequestError,
    SamplingParams,
    UnsupportedModelError,
)
from tests.engines import check_nothing_is_left
from tests.inside import inside
from tests.models import TinyModel

pytestmark = pytest.mark.anyio

VOCAB_SIZE = 96
TEXT = "w5 w6 w7 w8 w9 w5 w6"
GREEDY = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)


class TinyT5:
    """With a tokenizer that puts an end token behind each text."""

    def __init__(self, path: Path, random_model: Callable[..., Any]) -> None:
        self.path = path
        config = T5Config(
            vocab_size=VOCAB_SIZE, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0,
            eos_token_id=1, pad_token_id=0, n_positions=256,
        )  # fmt: skip
        model = random_model(config, model_class=T5ForConditionalGeneration)
        model.generation_config = GenerationConfig.from_model_config(config)
        model.save_pretrained(path)
        words = ["<pad>", "</s>", *(f"w{idx}" for idx in range(2, VOCAB_SIZE))]
        tokenizer = Tokenizer(models.WordLevel({word: idx for idx, word in enumerate(words)}, unk_token="w2"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>").save_pretrained(path)
        self.model = T5ForConditionalGeneration.from_pretrained(path).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def generate(self, text: str, **options: Any) -> list[int]:
        inputs = self.tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            output = self.model.generate(**inputs, max_new_tokens=8, eos_token_id=None, **options)
        return output[0, 1:].tolist()


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[..., Any]) -> TinyT5:
    return TinyT5(tmp_path_factory.mktemp("t5"), random_model)


@pytest.fixture
async def engine(t5: TinyT5) -> Any:
    async with Engine(t5.path, memory_budget="32MiB") as engine:
        yield engine
        await check_nothing_is_left(engine)


async def test_a_text_ends_as_the_tokenizer_ends_it(engine: Engine, t5: TinyT5) -> None:
    completion = await engine.complete(TEXT, GREEDY)
    assert list(completion.token_ids) == t5.generate(TEXT, do_sample=False)
    assert completion.text == " ".join(f"w{token_id}" for token_id in completion.token_ids if token_id > 1)
    assert completion.usage.prompt_tokens == 8
    assert completion.finish_reason == "length"


async def test_options_do_what_they_do_for_other_models(engine: Engine, t5: TinyT5) -> None:
    penalty = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, repetition_penalty=1.5)
    assert list((await engine.complete(TEXT, penalty)).token_ids) == t5.generate(
        TEXT, do_sample=False, repetition_penalty=1.5
    )
    greedy = await engine.complete(TEXT, GREEDY)
    word = greedy.text.split()[2]
    first = greedy.text.split().index(word)
    stopped = await engine.complete(TEXT, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, stop=word))
    assert (stopped.finish_reason, stopped.text.split()) == ("stop", greedy.text.split()[:first])
    sampling = SamplingParams(max_tokens=8, temperature=1.5, seed=3, ignore_eos=True, logprobs=2)
    sampled = [await engine.complete(TEXT, sampling) for _ in range(2)]
    assert sampled[0].token_ids == sampled[1].token_ids
    assert len(sampled[0].logprobs) == 8
    assert len(sampled[0].logprobs[0].top_logprobs or {}) >= 2


async def test_forward_and_embed_go_on(engine: Engine, t5: TinyT5) -> None:
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 1]]), "decoder_input_ids": torch.tensor([[0, 9, 90]])}
    output: Any = None
    vector: Any = None

    async def forward() -> None:
        nonlocal output, vector
        output = await engine.forward(**inputs)
        vector = await engine.embed(TEXT, pooling="mean")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(forward)
        completion = await engine.complete(TEXT, GREEDY)
    assert list(completion.token_ids) == t5.generate(TEXT, do_sample=False)
    with torch.inference_mode():
        torch.testing.assert_close(output.logits, t5.model(**inputs).logits, atol=1e-4, rtol=1e-4)
        ids = t5.tokenizer(TEXT, return_tensors="pt").input_ids
        hidden_states = t5.model.get_encoder()(input_ids=ids).last_hidden_state
    torch.testing.assert_close(torch.tensor(vector), hidden_states[0].mean(0), atol=1e-4, rtol=1e-4)


async def test_who_leaves_frees_the_memory_and_the_others_go_on(engine: Engine, t5: TinyT5) -> None:
    answers: list[Any] = []

    async def stay() -> None:
        answers.append(list((await engine.complete(TEXT, GREEDY)).token_ids))

    async def leave() -> None:
        async for _ in engine.generate(TEXT, GREEDY):
            break

    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(stay)
            tasks.start_soon(leave)
    assert answers == [t5.generate(TEXT, do_sample=False)] * 2
    with pytest.raises(DeadlineExceededError):
        await engine.complete(TEXT, GREEDY, deadline=anyio.current_time() - 1)


async def test_what_the_cache_takes_is_leased(engine: Engine) -> None:
    params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)
    prompt = [5 + idx % 80 for idx in range(200)]
    most = 0
    async for chunk in engine.generate(prompt, params, request_id="long"):
        if chunk.finish_reason is None:
            held, leased = inside(engine).cache_bytes("long")
            most = max(most, held)
            assert held <= leased
    assert most >= 200 * 32 * 4 + 2 * 2 * 200 * 32 * 4  # the encoder's output, and keys and values of each layer


async def test_refusals(engine: Engine) -> None:
    with pytest.raises(RequestError, match="T5ForConditionalGeneration is an encoder-decoder and has no sessions"):
        engine.session()
    with pytest.raises(ContextLengthError, match="300 tokens; the encoder takes at most 256"):
        await engine.complete([5] * 300, GREEDY)
    with pytest.raises(RequestError, match="token id 96 is not one of the 96 tokens"):
        await engine.complete([96], GREEDY)
    with pytest.raises(RequestError, match="takes no audio"):
        await engine.transcribe([0.0], sampling_rate=16000)
    with pytest.raises(RequestError, match="num_beams"):
        await engine.complete(TEXT, SamplingParams(num_beams=2))
    assert len((await engine.complete(TEXT, GREEDY)).token_ids) == 8


async def test_a_prompt_that_fits_into_no_sweep_is_refused_with_the_numbers(t5: TinyT5) -> None:
    async with Engine(t5.path, memory_budget="32MiB", config=EngineConfig(max_tokens_per_sweep=64)) as engine:
        with pytest.raises(MemoryBudgetError, match="max_tokens_per_sweep=101") as raised:
            await engine.complete([5] * 100, GREEDY)
        assert raised.value.requested_bytes is not None
        assert len((await engine.complete([5] * (engine.plan.max_prompt_tokens - 1), GREEDY)).token_ids) == 8


async def test_what_cannot_be_opened(t5: TinyT5, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="is an encoder-decoder, and those run in turns"):
        async with Engine(t5.path, memory_budget="32MiB", config=EngineConfig(batching="packed")):
            pass
    llama = TinyModel(tmp_path / "llama")
    with pytest.raises(ConfigError, match="the model is a T5ForConditionalGeneration, an encoder-decoder"):
        async with Engine(t5.path, memory_budget="32MiB", draft_model=llama.path):
            pass


async def test_tables_that_are_read_by_row(random_model: Callable[..., Any], tmp_path: Path) -> None:
    """Those of both sides, whatever a forward pass makes the decoder's tokens of."""
    config = T5Config(
        vocab_size=9000, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = random_model(config, model_class=T5ForConditionalGeneration)
    model.generation_config = GenerationConfig.from_model_config(config)
    model.save_pretrained(tmp_path)
    few_layers = EngineConfig(max_resident_layers=3)
    passes: list[dict[str, Any]] = [
        {"decoder_input_ids": [[7, 8999]]},
        {"labels": [[11, 8000]]},
        {"labels": [[11, -100]]},
    ]
    prompt = [8998, 5, 17]
    with torch.inference_mode():
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)[0, 1:].tolist()
    async with Engine(tmp_path, memory_budget="64MiB", config=few_layers) as engine:
        assert [table.name for table in inside(engine).row_tables] == ["encoder.embed_tokens", "decoder.embed_tokens"]
        params = SamplingParams(max_tokens=4, temperature=0)
        assert list((await engine.complete(prompt, params)).token_ids) == expected
        for inputs in passes:
            output = await engine.forward(input_ids=[prompt], **inputs)
            with torch.inference_mode():
                tensors = {name: torch.tensor(value) for name, value in inputs.items()}
                wanted = model(input_ids=torch.tensor([prompt]), **tensors).logits
            torch.testing.assert_close(output.logits, wanted, atol=1e-3, rtol=1e-3)


async def test_an_encoder_says_what_runs_it(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    BertModel(config).save_pretrained(tmp_path)
    async with Engine(tmp_path, memory_budget="32MiB") as engine:
        with pytest.raises(RequestError, match="does not generate; forward and embed run it"):
            await engine.complete([5], GREEDY)
