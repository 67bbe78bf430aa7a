"""What engines that open at once in one process must not do to each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from hermes_async.engine import opening
from hermes_async.engine.opening import open_model


def test_models_are_looked_at_one_at_a_time(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers sets torch's default dtype while it makes one: noise of another's self-check was rounded to it."""
    alone = []

    def noted(name: str) -> None:
        look = getattr(opening, name)

        def noting(*args: Any) -> Any:
            with ThreadPoolExecutor(1) as other:
                if other.submit(opening._LOOKING_AT.acquire, blocking=False).result():
                    opening._LOOKING_AT.release()
                    raise AssertionError(f"{name}: another engine could look at a model meanwhile")
            alone.append(name)
            return look(*args)

        monkeypatch.setattr(opening, name, noting)

    names = ["build_skeleton", "check_packing", "probe"]
    for name in names:
        noted(name)
    open_model(tiny_model.path, "8MiB", tiny_model.config).close()
    assert alone == names
    assert opening._LOOKING_AT.acquire(blocking=False)
    opening._LOOKING_AT.release()
