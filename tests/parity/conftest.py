"""What transformers generates, what the engine generates, and the comparison of the two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

import hermes_async
from hermes_async import Plan
from hermes_async.engine.model_planner import ModelPlanner
from hermes_async.engine.opening import open_model, plans_by_budget

NUM_TOKENS = 12
TOP_LOGPROBS = 5


@dataclass(frozen=True)
class Expected:
    """What transformers generates from one prompt alone.

    Attributes:
        logprobs: [tokens, vocab] float32, of each generated token's distribution.
    """

    prompt: list[int]
    token_ids: list[int]
    logprobs: torch.Tensor


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Of different lengths, longer than the windows of the models here and than the smallest budget's sweeps."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in (5, 1, 40, 17)]


@pytest.fixture(scope="session")
def generated_by() -> Callable[..., list[Expected]]:
    """Runs `model.generate` for each prompt alone."""

    def generated(model: Any, prompts: Sequence[list[int]], *, num_tokens: int = NUM_TOKENS) -> list[Expected]:
        # Without end-of-sequence tokens: the requests ignore them.
        model.generation_config = GenerationConfig(pad_token_id=0)
        expected = []
        for prompt in prompts:
            input_ids = torch.tensor([prompt])
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=num_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            token_ids = output.sequences[0, len(prompt) :].tolist()
            logits = torch.cat(output.logits).float()
            expected.append(Expected(prompt, token_ids, logits.log_softmax(-1)))
        return expected

    return generated


@pytest.fixture(scope="session")
def greedy_reference(generated_by: Callable[..., list[Expected]]) -> Callable[..., list[Expected]]:
    """What the causal language model of a checkpoint generates, with transformers' default attention."""

    def reference(
        path: Path, prompts: Sequence[list[int]], *, dtype: torch.dtype = torch.float32, num_tokens: int = NUM_TOKENS
    ) -> list[Expected]:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        return generated_by(model, prompts, num_tokens=num_tokens)

    return reference


@pytest.fixture(scope="session")
def complete_all() -> Callable[..., Any]:
    """Submits all prompts at once; returns the completions in the prompts' order."""

    async def complete(
        engine: hermes_async.Engine, prompts: Sequence[list[int]], *, num_tokens: int = NUM_TOKENS
    ) -> list[hermes_async.Completion]:
        params = hermes_async.SamplingParams(
            max_tokens=num_tokens, temperature=0.0, ignore_eos=True, logprobs=TOP_LOGPROBS
        )
        completions: dict[int, hermes_async.Completion] = {}

        async def one(idx: int) -> None:
            completions[idx] = await engine.complete(prompts[idx], params)

        async with anyio.create_task_group() as tasks:
            for idx in range(len(prompts)):
                tasks.start_soon(one, idx)
        return [completions[idx] for idx in range(len(prompts))]

    return complete


@pytest.fixture(scope="session")
def assert_parity() -> Callable[..., None]:
    """Tokens equal, and log-probabilities of the likeliest ones within `atol`.

    With `ties`, a sequence may go another way where the reference's own choice is ahead of that token by no more; how
    half precision rounds depends on the processor's kernels. What comes after has another history and is not compared.
    """

    def check(
        completions: Sequence[hermes_async.Completion], expected: Sequence[Expected], *, atol: float, ties: float = 0.0
    ) -> None:
        for completion, item in zip(completions, expected, strict=True):
            assert len(completion.logprobs) == len(completion.token_ids) == len(item.token_ids)
            for sampled, token_id, logprobs in zip(completion.logprobs, item.token_ids, item.logprobs, strict=True):
                assert sampled.top_logprobs is not None
                top = torch.tensor(list(sampled.top_logprobs))
                given = torch.tensor(list(sampled.top_logprobs.values()))
                torch.testing.assert_close(given, logprobs[top], atol=atol, rtol=0)
                torch.testing.assert_close(given[:TOP_LOGPROBS], logprobs.topk(TOP_LOGPROBS).values, atol=atol, rtol=0)
                if sampled.token_id != token_id:
                    assert logprobs[token_id] - logprobs[sampled.token_id] < ties, (
                        completion.token_ids,
                        item.token_ids,
                    )
                    break

    return check


@pytest.fixture(scope="session")
def minimum_budget() -> Callable[[Path], int]:
    """The smallest budget, as the error of one that is too small names it."""

    def minimum(path: Path) -> int:
        with pytest.raises(hermes_async.MemoryBudgetError) as raised:
            open_model(path, 1, hermes_async.EngineConfig())
        assert raised.value.minimum_bytes is not None
        return raised.value.minimum_bytes

    return minimum


@pytest.fixture(scope="session")
def budgets_of() -> Callable[[Path], dict[str, int]]:
    """The smallest budget, one in which some stages are resident and some are not, and one in which all are.

    Of models as small as these, whose reads take no longer than starting them, more memory may go into a larger ring.
    """

    def budgets(path: Path) -> dict[str, int]:
        plans = plans_by_budget(path, hermes_async.EngineConfig(), 12)
        middle = next(plan for plan in plans if 0 < len(plan.resident) < len(plan.stages))
        return {"smallest": plans[0].minimum_budget, "middle": middle.memory_budget, "resident": 64 * 1024 * 1024}

    return budgets


@pytest.fixture
def least_budget(monkeypatch: pytest.MonkeyPatch) -> int:
    """A budget that stands for the smallest one of any model. So a model is opened once, and not twice to learn it."""
    plan = ModelPlanner.plan

    def plan_for_the_least(planner: ModelPlanner, budget: int) -> Plan:
        try:
            return plan(planner, budget)
        except hermes_async.MemoryBudgetError as error:
            if budget != 1:
                raise
            assert error.minimum_bytes is not None
            return plan(planner, error.minimum_bytes)

    monkeypatch.setattr(ModelPlanner, "plan", plan_for_the_least)
    return 1
