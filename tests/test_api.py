"""What users may import. A name more or less is a decision: change it here too, and say so in the changelog."""

from __future__ import annotations

import hermes_async

API = [
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


def test_the_public_names() -> None:
    assert hermes_async.__all__ == API
    assert all(hasattr(hermes_async, name) for name in API)


def test_every_error_is_a_hermes_error() -> None:
    errors = [getattr(hermes_async, name) for name in API if name.endswith("Error")]
    assert all(issubclass(error, hermes_async.HermesError) for error in errors)
    for error in (hermes_async.ConfigError, hermes_async.RequestError):
        assert issubclass(error, ValueError)


def test_every_public_name_is_documented() -> None:
    assert [name for name in API if not getattr(hermes_async, name).__doc__] == []
