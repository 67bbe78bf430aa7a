"""Runs Transformer models larger than the memory they are given, inside an asyncio program.

torch and transformers are imported when the first engine opens, not with this package.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hermes_async import kernel_caches as kernel_caches  # before torch computes anything

if TYPE_CHECKING:
    from hermes_async.config import EngineConfig, SamplingParams, format_bytes, parse_bytes
    from hermes_async.engine.engine import Engine
    from hermes_async.engine.events import RequestEvent
    from hermes_async.engine.label import Label
    from hermes_async.engine.request import Chunk, Completion, Timings, Usage
    from hermes_async.engine.session import Session
    from hermes_async.engine.statistics import EngineStatistics
    from hermes_async.errors import (
        CheckpointError,
        ConfigError,
        ContextLengthError,
        CorruptShardError,
        DeadlineExceededError,
        EngineClosedError,
        EngineError,
        EngineFailedError,
        HermesError,
        IncompatibleVersionError,
        MemoryBudgetError,
        MissingTensorError,
        ParkingError,
        QueueFullError,
        ReadError,
        RequestError,
        SessionClosedError,
        ShortReadError,
        UnsupportedModelError,
    )
    from hermes_async.modeling.sampled_token import SampledToken
    from hermes_async.pipeload.plan import Plan
    from hermes_async.pipeload.prediction import Prediction, predict

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Chunk",
    "Completion",
    "ConfigError",
    "ContextLengthError",
    "CorruptShardError",
    "DeadlineExceededError",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "EngineFailedError",
    "EngineStatistics",
    "HermesError",
    "IncompatibleVersionError",
    "Label",
    "MemoryBudgetError",
    "MissingTensorError",
    "ParkingError",
    "Plan",
    "Prediction",
    "QueueFullError",
    "ReadError",
    "RequestError",
    "RequestEvent",
    "SampledToken",
    "SamplingParams",
    "Session",
    "SessionClosedError",
    "ShortReadError",
    "Timings",
    "UnsupportedModelError",
    "Usage",
    "format_bytes",
    "parse_bytes",
    "predict",
]

_MODULES = {
    "Chunk": "engine.request",
    "Completion": "engine.request",
    "Engine": "engine.engine",
    "EngineConfig": "config",
    "EngineStatistics": "engine.statistics",
    "Label": "engine.label",
    "Plan": "pipeload.plan",
    "Prediction": "pipeload.prediction",
    "RequestEvent": "engine.events",
    "SampledToken": "modeling.sampled_token",
    "SamplingParams": "config",
    "Session": "engine.session",
    "Timings": "engine.request",
    "Usage": "engine.request",
    "format_bytes": "config",
    "parse_bytes": "config",
    "predict": "pipeload.prediction",
}
"""Where each public name is; the errors are in `errors`."""


def __getattr__(name: str) -> Any:
    """Imports a public name's module when it is first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
