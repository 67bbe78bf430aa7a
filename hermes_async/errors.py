"""Every error a user can meet.

HermesError
├── ConfigError                an engine option that cannot work (also a ValueError)
├── IncompatibleVersionError   a version of transformers or torch that lacks what the engine needs
├── CheckpointError            the checkpoint, before any weight is read
│   ├── UnsupportedModelError
│   ├── MissingTensorError
│   └── CorruptShardError
├── ReadError                  a shard, while it is read
│   └── ShortReadError
├── ParkingError               idle KV, while it is written to disk or read back
├── MemoryBudgetError          with the numbers: asked, smallest that works, largest holders
├── RequestError               one request; the engine goes on (also a ValueError)
│   ├── ContextLengthError
│   ├── QueueFullError
│   ├── DeadlineExceededError
│   └── SessionClosedError
└── EngineError
    ├── EngineClosedError
    └── EngineFailedError      with the error that ended the engine as its cause

Errors carry what they are about as attributes (path, offset, expected, actual), not only in their text.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


class HermesError(Exception):
    """The root of every error that hermes_async raises; each survives `pickle` and `copy` with its attributes."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own calls the class with `args` alone, which lacks the arguments that have names.
        return _rebuilt, (type(self), self.args), self.__dict__.copy()


class ConfigError(HermesError, ValueError):
    """An engine option that cannot work."""


class IncompatibleVersionError(HermesError):
    """A version of transformers or torch that lacks what the engine needs.

    Attributes:
        capability: What it lacks.
        installed: The installed versions, by library.
    """

    def __init__(self, message: str, *, capability: str, installed: Mapping[str, str]) -> None:
        super().__init__(message)
        self.capability = capability
        self.installed = dict(installed)


class CheckpointError(HermesError):
    """A checkpoint that cannot be opened.

    Attributes:
        path: The file or directory at fault, where one is known.
    """

    def __init__(self, message: str, *, path: Path | str | None = None) -> None:
        super().__init__(message)
        self.path = None if path is None else Path(path)


class UnsupportedModelError(CheckpointError):
    """A model that would not run right, refused by name when the engine opens."""


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
        expected: What the format asks for, in the unit that the message names.
        actual: What the file holds.
    """

    def __init__(
        self, message: str, *, path: Path | str | None = None, expected: int | None = None, actual: int | None = None
    ) -> None:
        super().__init__(message, path=path)
        self.expected = expected
        self.actual = actual


class ReadError(HermesError):
    """A read that the operating system refused or broke off.

    Attributes:
        path: The shard.
        offset: Where the read began, in bytes.
        errno: The operating system's error number, where it gave one.
    """

    def __init__(self, message: str, *, path: Path, offset: int, errno: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.offset = offset
        self.errno = errno


class ShortReadError(ReadError):
    """A shard that ended before its header says.

    Attributes:
        expected: Bytes asked for from `offset`.
        actual: Bytes that came.
    """

    def __init__(self, message: str, *, path: Path, offset: int, expected: int, actual: int) -> None:
        super().__init__(message, path=path, offset=offset)
        self.expected = expected
        self.actual = actual


class ParkingError(HermesError):
    """Idle KV could not be written to disk or read back.

    Attributes:
        path: The folder of the file.
        errno: The operating system's error number, where it gave one.
    """

    def __init__(self, message: str, *, path: Path, errno: int | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.errno = errno


class MemoryBudgetError(HermesError):
    """More memory was asked for than the budget can ever give.

    Attributes:
        requested_bytes: What was asked for.
        budget_bytes: What there is.
        minimum_bytes: The smallest budget that would work, where it is known.
        holders: The largest holders, bytes by name.
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
    """A request that cannot be served as it was asked; the engine and its other requests go on."""


class ContextLengthError(RequestError):
    """A prompt, with the tokens asked for, that is longer than the model's context.

    Attributes:
        context_length: The most tokens a sequence may have.
        num_tokens: The tokens that were asked for.
    """

    def __init__(self, message: str, *, context_length: int, num_tokens: int) -> None:
        super().__init__(message)
        self.context_length = context_length
        self.num_tokens = num_tokens


class QueueFullError(RequestError):
    """More requests wait than the engine was told to let wait."""


class DeadlineExceededError(RequestError):
    """A request that did not end before its deadline."""


class SessionClosedError(RequestError):
    """A session that was used after its end."""


class EngineError(HermesError):
    """The engine itself cannot go on."""


class EngineClosedError(EngineError):
    """The engine was left, or was never entered."""


class EngineFailedError(EngineError):
    """The engine stopped on an error, which is this one's `__cause__`."""


def _rebuilt(kind: type[HermesError], args: tuple[Any, ...]) -> HermesError:
    """An error without its attributes, which `pickle` and `copy` set afterwards."""
    return kind.__new__(kind, *args)
