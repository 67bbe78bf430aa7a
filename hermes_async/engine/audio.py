"""Reads audio: a file, or an array of samples, as one channel of float32 at the rate that a model takes."""

from __future__ import annotations

import os
import wave
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hermes_async.config import format_bytes
from hermes_async.errors import RequestError
from hermes_async.foreign_errors import reason_of
from hermes_async.storage.file_kinds import is_dir

MAX_FILE_BYTES = 1 << 30
MAX_SECONDS = 3600
"""The longest audio. Its features are computed in one piece, which takes about 1 GiB an hour."""

Samples = npt.NDArray[np.float32]

_INSTALL = "install it with: pip install 'hermes-async[audio]'"
_SAMPLE_TYPES: dict[int, Any] = {1: np.uint8, 2: np.dtype("<i2"), 4: np.dtype("<i4")}


def load_audio(audio: Any, sampling_rate: int | None, wanted_rate: int) -> Samples:
    """One channel of samples at `wanted_rate`, float32 [samples]. Several channels are averaged.

    Args:
        audio: A file's path, or samples: [samples] or [samples, channels], floats from -1 to 1 or integers.
        sampling_rate: Of samples; None for a file, which has its own.

    Raises:
        RequestError: It is no audio, it is empty or too long, or a package that it needs is not installed.
    """
    if isinstance(audio, (str, os.PathLike)):
        if sampling_rate is not None:
            raise RequestError("sampling_rate is for samples; a file has its own")
        samples, rate = _read_file(Path(audio))
    else:
        samples, rate = _checked_samples(audio), _checked_rate(sampling_rate)
        _check_length(len(samples), rate, "the audio")
    if not len(samples):
        raise RequestError("the audio has no samples")
    if samples.ndim == 2:
        samples = samples.mean(axis=1, dtype=np.float32)
    return samples if rate == wanted_rate else _resampled(samples, rate, wanted_rate)


def _read_file(path: Path) -> tuple[Samples, int]:
    try:
        nbytes = path.stat().st_size
        if is_dir(path):
            raise RequestError(f"{path} is a directory, not an audio file")
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {reason_of(error)}") from error
    if nbytes > MAX_FILE_BYTES:
        raise RequestError(f"{path} has {format_bytes(nbytes)}; at most {format_bytes(MAX_FILE_BYTES)} are read")
    try:
        return _read_wave(path)
    except OSError as error:
        raise RequestError(f"{path} cannot be read: {reason_of(error)}") from error
    except (wave.Error, EOFError) as error:
        reason = str(error) or "it ends too early"
    if find_spec("soundfile") is None:
        raise RequestError(
            f"{path} is no WAV file of whole numbers ({reason}); other formats need the package soundfile: {_INSTALL}"
        )
    return _read_with_soundfile(path)


def _read_wave(path: Path) -> tuple[Samples, int]:
    with wave.open(str(path), "rb") as file:
        width, num_channels, rate = file.getsampwidth(), file.getnchannels(), _checked_rate(file.getframerate())
        # The header may promise more than there is.
        num_frames = min(file.getnframes(), path.stat().st_size // max(1, width * num_channels))
        _check_length(num_frames, rate, str(path))
        data = file.readframes(num_frames)
    data = data[: len(data) // (width * num_channels) * width * num_channels]
    if width == 3:
        packed = np.frombuffer(data, np.uint8).reshape(-1, 3)
        numbers = np.zeros((len(packed), 4), np.uint8)
        numbers[:, 1:] = packed
        whole: npt.NDArray[Any] = numbers.view(np.dtype("<i4"))[:, 0]
    else:
        whole = np.frombuffer(data, _SAMPLE_TYPES[width])
    return _as_floats(whole).reshape(-1, num_channels), rate


def _read_with_soundfile(path: Path) -> tuple[Samples, int]:
    soundfile: Any = import_module("soundfile")
    try:
        about = soundfile.info(str(path))
        _check_length(about.frames, about.samplerate, str(path))
        samples, rate = soundfile.read(str(path), dtype="float32", always_2d=True)
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"{path} is no audio file that soundfile reads: {reason_of(error)}") from error
    return samples, int(rate)


def _checked_samples(audio: Any) -> Samples:
    try:
        samples = np.asarray(audio)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RequestError(f"the audio cannot be made into an array: {reason_of(error)}") from error
    if samples.ndim not in (1, 2) or samples.dtype.kind not in "fiu":
        raise RequestError(
            "audio is the path of a file, or numbers [samples] or [samples, channels], not "
            f"{type(audio).__name__} {samples.dtype} {list(samples.shape)}"
        )
    if samples.ndim == 2 and samples.shape[1] > 64:
        raise RequestError(f"the audio has {samples.shape[1]} channels; samples of several are [samples, channels]")
    if samples.dtype.kind == "f" and not np.isfinite(samples).all():
        raise RequestError("the audio has samples that are no finite numbers")
    return _as_floats(samples)


def _as_floats(samples: npt.NDArray[Any]) -> Samples:
    if samples.dtype.kind == "f":
        return samples.astype(np.float32, copy=False)
    largest = float(np.iinfo(samples.dtype).max) + 1
    floats = samples.astype(np.float32)
    return floats / np.float32(largest / 2) - 1 if samples.dtype.kind == "u" else floats / np.float32(largest)


def _checked_rate(rate: Any) -> int:
    if rate is None:
        raise RequestError("samples need their sampling_rate, in samples a second")
    if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)) or not 1 <= rate <= 10_000_000:
        raise RequestError(f"sampling_rate must be a whole number of samples a second, not {rate!r}")
    return int(rate)


def _check_length(num_samples: int, rate: int, what: str) -> None:
    if num_samples > MAX_SECONDS * rate:
        raise RequestError(f"{what} is {num_samples / rate:.0f} s long; at most {MAX_SECONDS} s are taken at once")


def _resampled(samples: Samples, rate: int, wanted_rate: int) -> Samples:
    if find_spec("soxr") is None:
        raise RequestError(
            f"the audio has {rate} samples a second, and the model takes {wanted_rate}; to change that, the package "
            f"soxr is needed: {_INSTALL}"
        )
    soxr: Any = import_module("soxr")
    resampled: Samples = soxr.resample(samples, rate, wanted_rate).astype(np.float32, copy=False)
    return resampled
