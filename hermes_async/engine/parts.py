"""What an engine is made of, imported when it is first asked for: torch and transformers take seconds to import."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hermes_async.engine.classification import Label, prepare_classification
    from hermes_async.engine.embedding import embed_batches, prepare_embedding
    from hermes_async.engine.forwarding import prepare_forward
    from hermes_async.engine.opening import OpenedModel, open_model
    from hermes_async.engine.running import RunningModel, running_model
    from hermes_async.engine.serving import Serving
    from hermes_async.engine.session_kv import SessionKV

__all__ = [
    "Label",
    "OpenedModel",
    "RunningModel",
    "Serving",
    "SessionKV",
    "embed_batches",
    "open_model",
    "prepare_classification",
    "prepare_embedding",
    "prepare_forward",
    "running_model",
]

_MODULES = ("opening", "running", "serving", "session_kv", "forwarding", "embedding", "classification")


def load() -> None:
    """Imports all of it; for a worker thread."""
    for module_name in _MODULES:
        module = import_module(f"hermes_async.engine.{module_name}")
        globals().update({name: value for name, value in vars(module).items() if name in __all__})


def __getattr__(name: str) -> Any:
    """Imports all of it when a name of it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    load()
    return globals()[name]
