"""What engines that open at once in one process must not do to each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import LlamaConfig

from hermes_async import EngineConfig
from hermes_async.engine import probing
from hermes_async.engine.opening import open_model


def test_models_are_looked_at_one_at_a_time(
    random_model: Any, save_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transformers sets torch's default dtype while it makes one: noise of another's self-check was rounded to it."""
    alone = []

    def noted(name: str) -> None:
        look = getattr(probing, name)

        def noting(*args: Any) -> Any:
            with ThreadPoolExecutor(1) as other:
                if other.submit(probing._BUILDING.acquire, blocking=False).result():
                    probing._BUILDING.release()
                    raise AssertionError(f"{name}: another engine could build a model meanwhile")
            alone.append(name)
            return look(*args)

        monkeypatch.setattr(probing, name, noting)

    names = ["build_skeleton", "check_packing", "probe_packed"]
    for name in names:
        noted(name)
    path = save_model(random_model(LlamaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2)))
    open_model(path, "1GiB", EngineConfig()).close()
    assert alone == names
    assert probing._BUILDING.acquire(blocking=False)
    probing._BUILDING.release()
