"""Writes a safetensors file, a piece of a tensor at a time, so that no tensor has to be in memory as a whole.

The header needs only names, dtypes and shapes, and so it comes first. The file has a temporary name until all of it is
on disk.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from hermes_async.storage.checkpoint import DTYPES
from hermes_async.storage.own_file import NewFile

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8  # of the first tensor, as the reference implementation has it


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that is to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def aligned(tensors: Sequence[NewTensor]) -> list[NewTensor]:
    """The tensors in an order in which each lies at a multiple of its item size: the given one, if possible.

    Readers map tensors where they lie, which needs this. The format has no place for bytes between tensors.
    """
    offset = 0
    for tensor in tensors:
        if offset % tensor.dtype.itemsize:
            return sorted(tensors, key=lambda one: -one.dtype.itemsize)
        offset += tensor.nbytes
    return list(tensors)


def header_of(tensors: Sequence[NewTensor]) -> bytes:
    """The bytes before the first tensor of a file of these tensors, which lie one behind the other."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        offset += tensor.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def is_whole(path: Path, tensors: Sequence[NewTensor]) -> bool:
    """Whether a file has the header and the size that it would have with these tensors."""
    header = header_of(tensors)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return size == len(header) + sum(one.nbytes for one in tensors) and file.read(len(header)) == header
    except OSError:
        return False


class ShardWriter:
    """Writes one file. Leaving the block gives the file its name; after an error it removes what was written.

    Raises:
        OSError: The file cannot be written.
    """

    def __init__(self, path: Path, tensors: Sequence[NewTensor]) -> None:
        self._path = path
        self._header = header_of(tensors)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._offsets: dict[str, int] = {}
        offset = len(self._header)
        for tensor in tensors:
            self._offsets[tensor.name] = offset
            offset += tensor.nbytes
        # All mutable state: the file, and the bytes that each tensor has so far.
        self._new: NewFile
        self._written = dict.fromkeys(self._tensors, 0)

    def __enter__(self) -> Self:
        self._new = NewFile(self._path)
        self._write(self._header, 0)
        return self

    def append(self, name: str, piece: torch.Tensor) -> None:
        """Writes the next elements of a tensor."""
        content = piece.contiguous().view(-1).view(torch.uint8).numpy().data
        self._write(content, self._offsets[name] + self._written[name])
        self._written[name] += len(content)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            self._new.discard()
            return
        short = [name for name, count in self._written.items() if count != self._tensors[name].nbytes]
        assert not short, f"{self._path}: {short[0]} has {self._written[short[0]]} bytes"
        self._new.finish()

    def _write(self, content: bytes | memoryview, offset: int) -> None:
        view = memoryview(content)
        while view:
            count = os.pwrite(self._new.file.fileno(), view, offset)
            view, offset = view[count:], offset + count
