"""Reads the headers of GGUF files, which llama.cpp and other engines use: entries of metadata, and a table of tensors.

A file may come from anywhere, so everything that it says is checked, and nothing is allocated by a number in it alone.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch

from hermes_async.errors import CheckpointError, UnsupportedModelError
from hermes_async.storage.file_state import FileState
from hermes_async.storage.gguf_models import PART
from hermes_async.storage.headers import MAX_HEADER_BYTES, MAX_INT64, MAX_TENSORS, corrupt, num_elements, opened
from hermes_async.storage.tensor_spec import TensorSpec

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_ENTRIES = 2**16
_MAX_ITEMS = 2**20
"""The most items of one list. The largest vocabularies have a quarter of that, and their merges a half."""
_MAX_NAME_BYTES = 2**16 - 1
_MAX_DIMENSIONS = 8
_ALIGNMENT = 32
"""Of tensors in a file that does not say."""
_OWN_ENTRIES = ("general.alignment", "split.")
"""The beginnings of keys whose entries are of a file, and not of its model."""
_KEPT_ITEMS = 4096
"""Longer lists of numbers, such as the scores of a vocabulary, are not kept."""

_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
"""The formats of numbers, for `struct`, by the format's number of a type."""

_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
_BLOCKS = {
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18),
    21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1),
    25: ("I16", 1, 2),
    26: ("I32", 1, 4),
    27: ("I64", 1, 8),
    28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56),
    34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36),
    41: ("Q1_0", 128, 18),
}
"""By the format's number of a tensor's type: its name, and the numbers and bytes of a block."""

Value: TypeAlias = "int | float | bool | str | list[int | float | bool]"


class ByteSource(Protocol):
    """What a header is read from, from its first byte to its last."""

    def read(self, nbytes: int, /) -> bytes:
        """The next `nbytes` bytes."""


class _Entry(NamedTuple):
    """Where an entry of the metadata lies: its first byte, its size, and whether it is a long list."""

    offset: int
    nbytes: int
    is_long: bool


@dataclass(frozen=True, slots=True, eq=False)
class GgufHeader:
    """What a model's files say beside its tensors.

    Attributes:
        files: The parts of the model, in order. The first one has the metadata.
        metadata: Numbers, texts and short lists of numbers, by key. Of a list of texts, the number of items. Longer
            lists of numbers are left out.
        tensor_names: Of all parts.
    """

    files: tuple[Path, ...]
    metadata: Mapping[str, Value]
    tensor_names: tuple[str, ...]
    entries: Mapping[str, _Entry]

    @property
    def architecture(self) -> str:
        """As the format names it, such as "llama"."""
        return str(self.metadata["general.architecture"])

    def write_outline(self, path: Path, numbers: Mapping[str, int], keep: Iterable[str] = ()) -> None:
        """Writes a small GGUF file with the same metadata and tensor names, for readers that need nothing else.

        Vocabularies and other long lists are left out, and every tensor is one number.

        Args:
            numbers: Entries that are added.
            keep: Keys of long lists that are not left out.
        """
        kept = [
            entry
            for key, entry in self.entries.items()
            if (not entry.is_long or key in keep) and key not in numbers and not key.startswith(_OWN_ENTRIES)
        ]
        with self.files[0].open("rb") as source, path.open("wb") as out:
            out.write(_MAGIC + struct.pack("<IQQ", 3, len(self.tensor_names), len(kept) + len(numbers)))
            for entry in kept:
                source.seek(entry.offset)
                out.write(source.read(entry.nbytes))
            for key, number in numbers.items():
                out.write(_text_bytes(key) + struct.pack("<II", 4, number))
            for idx, name in enumerate(self.tensor_names):
                out.write(_text_bytes(name) + struct.pack("<IQIQ", 1, 1, 0, idx * _ALIGNMENT))
            out.write(bytes(-out.tell() % _ALIGNMENT + len(self.tensor_names) * _ALIGNMENT))


def _text_bytes(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def is_gguf(path: Path) -> bool:
    """Whether a file is in GGUF, by its name or its first bytes."""
    if path.suffix.lower() == ".gguf":
        return True
    with opened(path) as (file, state):
        return file.read(min(4, state.nbytes)) == _MAGIC


def read_header(path: Path, file: ByteSource, nbytes: int) -> None:
    """Reads the header of a file that is `nbytes` long, and no byte behind it.

    Args:
        path: For messages.

    Raises:
        CorruptShardError, UnsupportedModelError: As `read_gguf`.
    """
    _Reader(path, file, FileState(nbytes, 0, 0, 0)).read_all()


def read_gguf(path: Path) -> tuple[GgufHeader, dict[str, TensorSpec]]:
    """Reads the header of a file, and of the other parts of its model if it is one of several.

    Returns:
        The header, and the tensors by name. The dtype of a tensor in blocks is uint8, and its shape [..., bytes of a
        row]; `packed` is the name of its type.

    Raises:
        CorruptShardError: A file violates the format.
        UnsupportedModelError: The file is in another version of the format, or big-endian.
        CheckpointError: A part is missing.
    """
    first = _Reader.read(path)
    count = first.metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return _joined([first])
    named = PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise CheckpointError(
            f"{path} is a part of a model of {count} files, which are found by their names; its name must end in "
            f"-00001-of-{count:05}.gguf, with its own number",
            path=path,
        )
    readers = []
    for idx in range(count):
        part = path.with_name(f"{named['name']}-{idx + 1:05}-of-{named['count']}.gguf")
        reader = first if part == path else _Reader.read(part)
        said = (reader.metadata.get("split.no"), reader.metadata.get("split.count"))
        if said != (idx, count):
            raise corrupt(part, f"says that it is part {said[0]} of {said[1]} (split.no, split.count), not {idx}")
        readers.append(reader)
    return _joined(readers)


def _joined(parts: list[_Reader]) -> tuple[GgufHeader, dict[str, TensorSpec]]:
    first = parts[0]
    if not isinstance(first.metadata.get("general.architecture"), str):
        raise corrupt(first.path, "the metadata has no text `general.architecture`")
    tensors: dict[str, TensorSpec] = {}
    for part in parts:
        for name, spec in part.tensors.items():
            if name in tensors:
                both = f"{tensors[name].file.name!r} and {part.path.name!r}"
                raise corrupt(part.path, f"tensor {name!r} is in both {both}")
            tensors[name] = spec
    total = first.metadata.get("split.tensors.count", len(tensors))
    if len(parts) > 1 and total != len(tensors):
        raise corrupt(first.path, f"the parts have {len(tensors)} tensors, and split.tensors.count is {total}")
    files = tuple(part.path for part in parts)
    return GgufHeader(files, first.metadata, tuple(tensors), first.entries), tensors


class _Reader:
    """Reads one file's header from its first byte to its last. The state is in `_left`, `metadata` and `tensors`."""

    def __init__(self, path: Path, file: ByteSource, state: FileState) -> None:
        self.path = path
        self.metadata: dict[str, Value] = {}
        self.entries: dict[str, _Entry] = {}
        self.tensors: dict[str, TensorSpec] = {}
        self._file, self._state = file, state
        self._limit = min(state.nbytes, MAX_HEADER_BYTES)
        self._left = self._limit

    @classmethod
    def read(cls, path: Path) -> _Reader:
        with opened(path) as (file, state):
            reader = cls(path, file, state)
            reader.read_all()
        return reader

    def read_all(self) -> None:
        """Reads the whole header."""
        num_tensors, num_entries = self._counts()
        for _ in range(num_entries):
            self._read_entry()
        self._read_tensors(num_tensors)

    # --- numbers and texts ---

    def _take(self, nbytes: int, what: str) -> bytes:
        if nbytes > self._left:
            more = "" if self._limit == self._state.nbytes else f" of the {self._limit} bytes that a header may have"
            message = f"{what} takes {nbytes} bytes, where {self._left}{more} are left"
            raise corrupt(self.path, message, expected=nbytes, actual=self._left)
        self._left -= nbytes
        return self._file.read(nbytes)

    def _number(self, layout: str, what: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout), what))[0]

    def _text(self, what: str, max_bytes: int = MAX_HEADER_BYTES) -> str:
        nbytes = self._number("<Q", what)
        if nbytes > max_bytes:
            raise corrupt(self.path, f"{what} has {nbytes} bytes, of at most {max_bytes}")
        try:
            return self._take(nbytes, what).decode()
        except UnicodeDecodeError as error:
            raise corrupt(self.path, f"{what} is not UTF-8: {error}") from error

    # --- the parts of a header ---

    def _counts(self) -> tuple[int, int]:
        """The numbers of tensors and of entries."""
        magic = self._take(4, "the beginning of a GGUF file")
        if magic == b"vers":
            raise corrupt(self.path, "a Git LFS pointer in place of the weights; run `git lfs pull`")
        if magic != _MAGIC:
            raise corrupt(self.path, f"does not begin with {_MAGIC!r}, so it is no GGUF file")
        version = self._number("<I", "the version")
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "big"), "little")
            what = f"is in version {version} of GGUF" if version <= swapped else "is a big-endian GGUF file"
            raise UnsupportedModelError(
                f"{self.path} {what}; hermes_async reads versions 2 and 3, little-endian. Convert the model again "
                "with a recent llama.cpp",
                path=self.path,
            )
        counts = []
        for what, least, most in (("tensors", 24, MAX_TENSORS), ("entries of metadata", 13, _MAX_ENTRIES)):
            count = self._number("<Q", f"the number of {what}")
            if count > min(most, self._left // least):
                raise corrupt(self.path, f"claims {count} {what}, of at most {min(most, self._left // least)}")
            counts.append(count)
        return counts[0], counts[1]

    def _read_entry(self) -> None:
        start = self._limit - self._left
        key = self._text("the key of an entry of metadata", _MAX_NAME_BYTES)
        if key in self.metadata or key in self.entries:
            raise corrupt(self.path, f"has two entries {key!r}")
        kind, what = self._number("<I", f"entry {key!r}"), f"entry {key!r}"
        value: Value | None
        if kind == _STRING:
            value = self._text(what)
        elif kind == _ARRAY:
            value = self._array(what)
        elif kind in _NUMBERS:
            value = self._number(_NUMBERS[kind], what)
        else:
            raise corrupt(self.path, f"{what} has a value of type {kind}, which the format does not know")
        if value is not None:
            self.metadata[key] = value
        nbytes = self._limit - self._left - start
        self.entries[key] = _Entry(start, nbytes, is_long=kind == _ARRAY and nbytes > 4 * _KEPT_ITEMS)

    def _array(self, what: str) -> Value | None:
        """The numbers of a short list; of a list of texts, how many; None for a longer list."""
        kind, count = self._number("<I", what), self._number("<Q", what)
        if count > _MAX_ITEMS:
            raise corrupt(self.path, f"{what} is a list of {count} items, of at most {_MAX_ITEMS}")
        if kind == _STRING:
            for _ in range(count):
                self._take(self._number("<Q", what), what)
            return int(count)
        if kind == _ARRAY:
            raise corrupt(self.path, f"{what} is a list of lists, which no model needs")
        if kind not in _NUMBERS:
            raise corrupt(self.path, f"{what} is a list of type {kind}, which the format does not know")
        layout = _NUMBERS[kind]
        stored = self._take(count * struct.calcsize(layout), what)
        return [one for (one,) in struct.iter_unpack(layout, stored)] if count <= _KEPT_ITEMS else None

    def _read_tensors(self, count: int) -> None:
        alignment = self.metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise corrupt(self.path, f"general.alignment is {alignment!r}, not a power of two")
        found = [self._tensor(alignment) for _ in range(count)]
        end = self._limit - self._left
        data_offset = -(-end // alignment) * alignment
        states = {self.path: self._state}
        specs = [replace(spec, offset=data_offset + spec.offset, file_states=states) for spec in found]
        specs.sort(key=lambda spec: (spec.offset, spec.nbytes))
        end, previous = data_offset, ""
        for spec in specs:
            if spec.name in self.tensors:
                raise corrupt(self.path, f"has two tensors {spec.name!r}")
            if spec.offset < end:
                raise corrupt(self.path, f"tensors {previous!r} and {spec.name!r} overlap")
            end, previous = spec.offset + spec.nbytes, spec.name
            if end > self._state.nbytes:
                raise corrupt(
                    self.path,
                    f"truncated: tensor {spec.name!r} ends at byte {end}, and the file has {self._state.nbytes}",
                    expected=end,
                    actual=self._state.nbytes,
                )
            self.tensors[spec.name] = spec

    def _tensor(self, alignment: int) -> TensorSpec:
        """The next tensor of the table, with its offset within the data."""
        name = self._text("the name of a tensor", _MAX_NAME_BYTES)
        what = f"tensor {name!r}"
        num_dimensions = self._number("<I", what)
        if num_dimensions > _MAX_DIMENSIONS:
            raise corrupt(self.path, f"{what} has {num_dimensions} dimensions, of at most {_MAX_DIMENSIONS}")
        sizes = struct.unpack(f"<{num_dimensions}Q", self._take(8 * num_dimensions, what))
        shape = sizes[::-1]  # the format's first dimension is the one whose numbers lie side by side
        kind, offset = self._number("<I", what), self._number("<Q", what)
        if offset % alignment or offset > MAX_INT64:
            raise corrupt(self.path, f"{what} has the offset {offset}, not a multiple of the alignment {alignment}")
        count = num_elements(self.path, name, shape)
        packed: str | None = None
        dtype, nbytes = _PLAIN.get(kind, torch.uint8), 0
        if kind in _PLAIN:
            nbytes = count * dtype.itemsize
        elif kind in _BLOCKS:
            packed, block, block_bytes = _BLOCKS[kind]
            columns = shape[-1] if shape else 1
            if columns % block:
                message = (
                    f"{what} has rows of {columns} numbers, which cannot be divided into {packed} blocks of {block}"
                )
                raise corrupt(self.path, message, expected=block, actual=columns)
            nbytes = count // block * block_bytes
            shape = (*shape[:-1], columns // block * block_bytes)
        else:
            raise corrupt(self.path, f"{what} is of type {kind}, which the format does not know")
        return TensorSpec(
            name=name, file=self.path, offset=offset, nbytes=nbytes, dtype=dtype, shape=shape, packed=packed
        )


def block_of(type_name: str) -> tuple[int, int]:
    """The numbers and bytes of a block of a type that is no plain dtype."""
    return next((block, nbytes) for name, block, nbytes in _BLOCKS.values() if name == type_name)
