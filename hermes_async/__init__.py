"""Runs Transformer models larger than the memory they are given, inside an asyncio program.

torch and transformers are imported when the first engine opens, not with this package.
"""

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

from hermes_async.memory import library_caches as library_caches  # before torch computes anything

if TYPE_CHECKING:
    from hermes_async.config import EngineConfig, SamplingParams, StructuredOutputs, format_bytes, parse_bytes
    from hermes_async.engine.engine import Engine
    from hermes_async.engine.response import ResponseStream
    from hermes_async.engine.session import Session
    from hermes_async.engine.transcribing import Transcript, TranscriptSegment
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
        ReadTimeoutError,
        RequestError,
        SessionClosedError,
        ShortReadError,
        UnsupportedModelError,
    )
    from hermes_async.planning.cost_model import Prediction, predict
    from hermes_async.planning.plan import Plan
    from hermes_async.results import (
        Chunk,
        Completion,
        Embeddings,
        EngineSnapshot,
        EngineStatistics,
        Label,
        MemorySnapshot,
        MessageDelta,
        RankedDocument,
        RequestEvent,
        RequestSnapshot,
        SampledToken,
        StageSnapshot,
        Timings,
        ToolCall,
        Usage,
    )

logging.getLogger("hermes_async").addHandler(logging.NullHandler())  # the application decides where log lines go

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Chunk",
    "Completion",
    "ConfigError",
    "ContextLengthError",
    "CorruptShardError",
    "DeadlineExceededError",
    "Embeddings",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "EngineFailedError",
    "EngineSnapshot",
    "EngineStatistics",
    "HermesError",
    "IncompatibleVersionError",
    "Label",
    "MemoryBudgetError",
    "MemorySnapshot",
    "MessageDelta",
    "MissingTensorError",
    "ParkingError",
    "Plan",
    "Prediction",
    "QueueFullError",
    "RankedDocument",
    "ReadError",
    "ReadTimeoutError",
    "RequestError",
    "RequestEvent",
    "RequestSnapshot",
    "ResponseStream",
    "SampledToken",
    "SamplingParams",
    "Session",
    "SessionClosedError",
    "ShortReadError",
    "StageSnapshot",
    "StructuredOutputs",
    "Timings",
    "ToolCall",
    "Transcript",
    "TranscriptSegment",
    "UnsupportedModelError",
    "Usage",
    "format_bytes",
    "parse_bytes",
    "predict",
]

_MODULES = {
    "Chunk": "results",
    "Completion": "results",
    "Engine": "engine.engine",
    "Embeddings": "results",
    "EngineConfig": "config",
    "EngineSnapshot": "results",
    "EngineStatistics": "results",
    "Label": "results",
    "MemorySnapshot": "results",
    "MessageDelta": "results",
    "Plan": "planning.plan",
    "Prediction": "planning.cost_model",
    "RankedDocument": "results",
    "RequestEvent": "results",
    "RequestSnapshot": "results",
    "ResponseStream": "engine.response",
    "SampledToken": "results",
    "SamplingParams": "config",
    "Session": "engine.session",
    "StageSnapshot": "results",
    "StructuredOutputs": "config",
    "Timings": "results",
    "ToolCall": "results",
    "Transcript": "engine.transcribing",
    "TranscriptSegment": "engine.transcribing",
    "Usage": "results",
    "format_bytes": "config",
    "parse_bytes": "config",
    "predict": "planning.cost_model",
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
