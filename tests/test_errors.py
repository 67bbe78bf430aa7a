"""The errors: each can be copied and pickled, and keeps its attributes."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hermes_async import errors

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, errors.HermesError)]
VALUES: dict[str, Any] = {
    "path": Path("model.safetensors"),
    "names": ("a", "b"),
    "holders": {"ring": 3},
    "installed": {"torch": "2"},
}


def _made(kind: type[errors.HermesError]) -> errors.HermesError:
    names = [
        parameter.name
        for parameter in inspect.signature(kind.__init__).parameters.values()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return kind("what is wrong", **{name: VALUES.get(name, 7) for name in names})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, *[lambda error, p=p: pickle.loads(pickle.dumps(error, p)) for p in range(6)]],
)
def test_every_error_survives_with_its_attributes(kind: type[errors.HermesError], copied: Callable[[Any], Any]) -> None:
    error = _made(kind)
    error.add_note("a note")
    twin = copied(error)
    assert type(twin) is kind
    assert str(twin) == str(error) == "what is wrong"
    assert twin.args == error.args
    assert vars(twin) == vars(error)
