"""The loss, against transformers' own logits and perplexity."""

from __future__ import annotations

import math
from pathlib import Path

import anyio
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from hermes_async import MemoryBudgetError, RequestError
from hermes_async.conversion.loss import measure_loss, sample_text
from hermes_async.conversion.quantizing import quantize
from tests.models import TinyModel

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def quantized(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    quantize(tiny_model.path, out, "fp8")
    return out


async def test_the_loss_is_that_of_transformers_models(tiny_model: TinyModel, quantized: Path) -> None:
    token_ids = [(7 * idx) % 90 + 2 for idx in range(100)]  # more than the context of 64
    seen: list[tuple[int, int]] = []
    loss = await measure_loss(
        tiny_model.path,
        quantized,
        tiny_model.text(token_ids),
        on_progress=lambda done, total: seen.append((done, total)),
    )
    tensors = load_file(quantized / "model.safetensors")
    state = {name: tensor.float() for name, tensor in tensors.items() if not name.endswith("_scale")}
    state |= {name: weight * tensors[f"{name}_scale"] for name, weight in state.items() if f"{name}_scale" in tensors}
    models = [tiny_model.model, await anyio.to_thread.run_sync(lambda: type(tiny_model.model)(tiny_model.model.config))]
    models[1].load_state_dict(state)
    logits = []
    with torch.inference_mode():
        for model in models:
            windows = (torch.tensor([token_ids[:64]]), torch.tensor([token_ids[64:]]))
            logits.append([model.eval()(window).logits[0] for window in windows])
    nats = [
        sum(float(F.cross_entropy(one[:-1], ids, reduction="sum")) for one, ids in zip(both, following, strict=True))
        for both in logits
        for following in [(torch.tensor(token_ids[1:64]), torch.tensor(token_ids[65:]))]
    ]
    difference = torch.cat(logits[0]).sub(torch.cat(logits[1])).abs()
    assert (loss.num_tokens, loss.window, seen) == (98, 64, [(64, 100), (100, 100)])
    assert loss.perplexity_before == pytest.approx(math.exp(nats[0] / 98), rel=1e-4)
    assert loss.perplexity_after == pytest.approx(math.exp(nats[1] / 98), rel=1e-4)
    assert loss.largest_error == pytest.approx(float(difference.max()), rel=1e-3)
    assert loss.mean_error == pytest.approx(float(difference.mean()), rel=1e-3)
    assert loss.mean_error > 0


async def test_a_model_loses_nothing_to_itself(tiny_model: TinyModel) -> None:
    loss = await measure_loss(tiny_model.path, tiny_model.path, "w5 w6 w7", memory_budget="8MiB")
    assert (loss.largest_error, loss.mean_error, loss.same_token) == (0.0, 0.0, 1.0)
    assert loss.perplexity_after == loss.perplexity_before


async def test_what_cannot_be_measured(tiny_model: TinyModel) -> None:
    with pytest.raises(RequestError, match="less than two tokens"):
        await measure_loss(tiny_model.path, tiny_model.path, "w5", memory_budget="8MiB")
    with pytest.raises(MemoryBudgetError):
        await measure_loss(tiny_model.path, tiny_model.path, "w5 w6 w7", memory_budget="16KiB")


def test_the_text_of_the_package() -> None:
    assert 3000 < len(sample_text()) < 6000
