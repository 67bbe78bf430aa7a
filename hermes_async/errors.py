"""Every error a user can meet.

HermesError
├── ConfigError                an engine option that cannot work (also a ValueError)
├── IncompatibleVersionError   a version of transformers or torch that lacks what the engine needs
├── CheckpointError            a checkpoint that cannot be opened
│   ├── UnsupportedModelError
│   ├── MissingTensorError
│   └── CorruptShardError
├── ReadError                  a shard that cannot be read
│   ├── ShortReadError
│   └── ReadTimeoutError       a read that a disk did not answer in time
├── ParkingError               KV of an idle session that cannot be written to disk or read back
├── MemoryBudgetError          with the numbers: requested, smallest that works, largest holders
├── RequestError               one request that cannot be served; the engine goes on (also a ValueError)
│   ├── ContextLengthError
│   ├── QueueFullError
│   ├── DeadlineExceededError
│   └── SessionClosedError
└── EngineError
    ├── EngineClosedError
    └── EngineFailedError      with the error that ended the engine as its cause

Errors have attributes (path, offset, expected, actual), not only a text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class HermesError(Exception):
    """The base class of all errors that hermes_async raises. `pickle` and `copy` keep their attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own method calls the class with `args` alone, without the keyword arguments.
        return _rebuilt, (type(self), self.args), self.__dict__.copy()


class ConfigError(HermesError, ValueError):
    """An engine option that cannot work."""


class IncompatibleVersionError(HermesError):
    """A version of transformers or torch that lacks what the engine needs.

    Attributes:
        capability: What the version lacks.
        installed: The installed versions, by library.
    """

    def __init__(self, message: str, *, capability: str, installed: Mapping[str, str]) -> None:
        super().__init__(message)
        self.capability = capability
        self.installed = dict(installed)


class CheckpointError(HermesError):
    """A checkpoint that cannot be opened.

    Attributes:
        path: The file or directory at fault, if it is known.
    """

    def __init__(self, message: str, *, path: Path | str | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else Path(path)


class UnsupportedModelError(CheckpointError):
    """A model that would not run correctly. It is refused by name when the engine opens."""


class MissingTensorError(CheckpointError):
    """Tensors that the model needs and the checkpoint does not hold.

    Attributes:
        names: The parameters without a tensor.
    """

    def __init__(self, message: str, *, path: Path | str | None = None, names: tuple[str, ...] = ()) -> None:
        super().__init__(message, path=path)
        self.names = names


class CorruptShardError(CheckpointError):
    """A file that is not what the safetensors format (or its index) says it must be.

    Attributes:
        expected: The number that the format requires, in the unit of the message.
        actual: The number in the file.
    """

    def __init__(
        self, message: str, *, path: Path | str | None = None, expected: int | None = None, actual: int | None = None
    ) -> None:
        super().__init__(message, path=path)
        self.expected = expected
        self.actual = actual


class ReadError(HermesError):
    """A read that failed.

    Attributes:
        path: The shard.
        offset: Where the read began, in bytes.
        errno: The operating system's error number, if there is one.
    """

    def __init__(self, message: str, *, path: Path, offset: int, errno: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.offset = offset
        self.errno = errno


class ShortReadError(ReadError):
    """A shard that is shorter than its header says.

    Attributes:
        expected: Bytes requested from `offset`.
        actual: Bytes read.
    """

    def __init__(self, message: str, *, path: Path, offset: int, expected: int, actual: int) -> None:
        super().__init__(message, path=path, offset=offset)
        self.expected = expected
        self.actual = actual


class ReadTimeoutError(ReadError):
    """A read or a write that has not come back for `EngineConfig.read_timeout` seconds. Its thread still waits for it.

    Attributes:
        seconds: How long the read has taken so far.
    """

    def __init__(self, message: str, *, path: Path, offset: int, seconds: float) -> None:
        super().__init__(message, path=path, offset=offset)
        self.seconds = seconds


class ParkingError(HermesError):
    """Idle KV could not be written to disk or read back.

    Attributes:
        path: The folder of the file.
        errno: The operating system's error number, if there is one.
    """

    def __init__(self, message: str, *, path: Path, errno: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.errno = errno


class MemoryBudgetError(HermesError):
    """More memory was requested than the budget can ever give, or than the system gives now.

    Attributes:
        requested_bytes: The bytes requested.
        budget_bytes: The bytes that there are; 0 if the system has refused and does not say.
        minimum_bytes: The smallest budget that would work, if it is known.
        holders: The largest holders' bytes, by name.
    """

    def __init__(
        self,
        message: str,
        *,
        requested_bytes: int,
        budget_bytes: int,
        minimum_bytes: int | None = None,
        holders: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(message)
        self.requested_bytes = requested_bytes
        self.budget_bytes = budget_bytes
        self.minimum_bytes = minimum_bytes
        self.holders = dict(holders or {})


class RequestError(HermesError, ValueError):
    """A request that cannot be served. The engine and its other requests go on."""


class ContextLengthError(RequestError):
    """A prompt that does not fit into the model's context.

    Attributes:
        context_length: The most tokens that a sequence may have.
        num_tokens: The tokens that were requested.
    """

    def __init__(self, message: str, *, context_length: int, num_tokens: int) -> None:
        super().__init__(message)
        self.context_length = context_length
        self.num_tokens = num_tokens


class QueueFullError(RequestError):
    """As many requests wait as `EngineConfig.max_waiting` allows."""


class DeadlineExceededError(RequestError):
    """A request that did not end before its deadline."""


class SessionClosedError(RequestError):
    """A session that was used after it was closed."""


class EngineError(HermesError):
    """The engine itself cannot go on."""


class EngineClosedError(EngineError):
    """The engine was left, or never entered."""


class EngineFailedError(EngineError):
    """The engine stopped because of an error, which is the `__cause__` of this one."""


def _rebuilt(kind: type[HermesError], args: tuple[Any, ...]) -> HermesError:
    """Makes an error without attributes; `pickle` and `copy` then set them."""
    return kind.__new__(kind, *args)
