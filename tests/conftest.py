"""Fixtures for all tests: event loops, and small models made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

EVENT_LOOPS = [("asyncio", {"use_uvloop": False}), ("asyncio", {"use_uvloop": True})]


@pytest.fixture(params=EVENT_LOOPS, ids=["asyncio", "uvloop"])
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(scope="session", autouse=True)
def quiet_transformers() -> None:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def random_model() -> Callable[..., PreTrainedModel]:
    """Makes a model of a config whose greedy tokens vary: weights far larger than at the start of a training."""

    def make(
        config: PreTrainedConfig,
        *,
        model_class: Any = AutoModelForCausalLM,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> PreTrainedModel:
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        make_model = getattr(model_class, "from_config", model_class)
        model: PreTrainedModel = make_model(config).float()
        with torch.no_grad():
            for parameter in model.parameters():
                # Vectors are norms, which begin at one (or at zero, where one is added), and biases.
                noise = torch.empty_like(parameter).normal_(0, 0.2 if parameter.dim() > 1 else 0.1, generator=generator)
                parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
        model.generation_config = GenerationConfig()
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a model as transformers does, in a directory of its own."""

    def save(model: PreTrainedModel, **kwargs: Any) -> Path:
        path = tmp_path_factory.mktemp(type(model).__name__)
        model.save_pretrained(path, **kwargs)
        return path

    return save
