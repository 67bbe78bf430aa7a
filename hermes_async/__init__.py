"""Runs Transformer models larger than the memory they are given, inside an asyncio program."""

from hermes_async import kernel_caches as kernel_caches  # before torch computes anything
from hermes_async.config import EngineConfig, SamplingParams, format_bytes, parse_bytes
from hermes_async.engine.classification import Label
from hermes_async.engine.engine import Engine
from hermes_async.engine.events import RequestEvent
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
from hermes_async.modeling.sampling import SampledToken
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
