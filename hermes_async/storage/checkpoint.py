"""A checkpoint on disk: its configuration, and the file and bytes of each tensor.

It must be in safetensors or GGUF, and is read in place. This module reads headers only, and no weights. A checkpoint
may come from anywhere, so everything that a file says is checked.

Source: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from hermes_async.errors import CheckpointError, CorruptShardError, MissingTensorError
from hermes_async.storage.file_kinds import exists, is_dir, is_file
from hermes_async.storage.file_state import FileState
from hermes_async.storage.gguf import GgufHeader, is_gguf, read_gguf
from hermes_async.storage.gguf_models import only_gguf_model
from hermes_async.storage.headers import MAX_HEADER_BYTES, MAX_INT64, MAX_TENSORS, corrupt, num_elements, opened
from hermes_async.storage.hub import HubOptions, download, is_hub_id
from hermes_async.storage.other_files import check_other_files
from hermes_async.storage.other_formats import ONLY_SAFETENSORS, check_names, check_writer
from hermes_async.storage.tensor_spec import TensorSpec

_Json = TypeVar("_Json", dict[str, Any], list[Any])

_SINGLE_NAME = "model.safetensors"
_INDEX_NAME = "model.safetensors.index.json"
_INDEX_SUFFIX = ".safetensors.index.json"
_MAX_CONFIG_BYTES = 4 * 2**20
_MAX_INDEX_BYTES = 64 * 2**20
_MAX_VALUES = 2**20
"""The most values of a JSON file. One takes about a hundred bytes of memory."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}

_PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
"""Dtypes of the format in which a number takes less than a byte."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory with `config.json` and safetensors shards, or a GGUF file, whose headers are valid.

    Attributes:
        path: The directory, resolved; or the GGUF file, of several parts the one that was opened.
        config: The content of `config.json`; empty for GGUF.
        tensors: By their names in the files. Those of one shard are in the order of their bytes.
        root: The directory that was opened, if its `modules.json` names another one for the model
            (sentence-transformers' `0_Transformer`); None otherwise.
        gguf: What a GGUF file says beside its tensors; None for safetensors.
    """

    path: Path
    config: dict[str, Any] = field(repr=False)
    tensors: dict[str, TensorSpec] = field(repr=False)
    root: Path | None = field(default=None, repr=False)
    gguf: GgufHeader | None = field(default=None, repr=False)

    @property
    def total_bytes(self) -> int:
        """The size of all tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @classmethod
    def open(
        cls,
        source: str | os.PathLike[str],
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> Checkpoint:
        """Opens a directory or file, or downloads and opens a model on the hub. Blocks: call it in a worker thread.

        Args:
            source: A directory, or a GGUF file. A str that names neither is a hub id: "org/name", or
                "org/name:Q4_K_M" for the GGUF file whose name ends so.
            revision: A branch, tag or commit. This and the other arguments are for hub ids only.
            cache_dir: The directory for downloads, instead of the hub's default cache.
            token: The hub's token, instead of the one that is logged in.
            local_files_only: Use the files in the cache, without asking the hub.

        Raises:
            UnsupportedModelError: The weights are neither in safetensors nor in GGUF.
            MissingTensorError: The index names tensors that are not in its shards.
            CorruptShardError: A shard or the index violates its format.
            CheckpointError: There is no such checkpoint, or a part of it is missing or cannot be read.
        """
        try:
            return cls._of(source, HubOptions(revision, token, cache_dir), local_files_only=local_files_only)
        except OSError as error:  # the system cannot tell what a path is
            message = f"{error.filename or os.fspath(source)} cannot be read: {error.strerror or error}"
            raise CheckpointError(message, path=Path(source)) from error

    @classmethod
    def _of(cls, source: str | os.PathLike[str], hub: HubOptions, *, local_files_only: bool) -> Checkpoint:
        path = Path(source)
        gguf_file: Path | None = None
        if os.fspath(source) and is_dir(path):
            path = path.resolve()
            gguf_file = only_gguf_model(path)
        elif os.fspath(source) and exists(path):
            if not is_gguf(path):
                raise CheckpointError(f"{path} is a file; give the directory it is in, or a GGUF file", path=path)
            gguf_file = path.parent.resolve() / path.name  # a link keeps its name, by which other parts are found
        elif isinstance(source, str) and is_hub_id(source):
            path = download(source, hub, local_files_only=local_files_only)
            if is_file(path):
                gguf_file = path.parent.resolve() / path.name
            path = path.resolve()
        else:
            raise CheckpointError(f"no such directory or GGUF file: {os.fspath(source)!r}", path=path)
        if gguf_file is not None:
            header, tensors = read_gguf(gguf_file)
            return cls(gguf_file, {}, tensors, gguf=header)

        root, path = path, _model_folder(path)
        # Weights come first: if they are in another format, config.json is often missing too, and that error says less.
        # Keys of config.json may repeat: the last one counts, as in transformers.
        file = path / "config.json"
        config = read_config(file, dict) if is_file(file) else {}
        check_other_files(path)
        tensors = read_tensors(path, _named_weights(config, file))
        return cls(path, config or read_config(file, dict), tensors, None if root == path else root)


def open_checkpoint(source: str | os.PathLike[str], hub: HubOptions) -> Checkpoint:
    """As `Checkpoint.open`, with the options for the hub in one value."""
    return Checkpoint.open(source, revision=hub.revision, token=hub.token, cache_dir=hub.cache_dir)


def _model_folder(path: Path) -> Path:
    """The model's folder: old releases of sentence-transformers put it into one that `modules.json` names."""
    file = path / "modules.json"
    try:
        modules = read_config(file, list) if is_file(file) else []
    except CheckpointError:
        return path  # only sentence vectors need the file, and they report the error
    first = modules[0] if modules and isinstance(modules[0], dict) else {}
    folder = first.get("path")
    if not isinstance(folder, str) or not folder or not str(first.get("type", "")).endswith(".Transformer"):
        return path
    inside = (path / folder).resolve()
    return inside if inside.is_relative_to(path) and is_file(inside / "config.json") else path


def read_tensors(directory: Path, chosen: str | None = None) -> dict[str, TensorSpec]:
    """Finds the shards of a directory and reads their headers; returns the tensors by name.

    Args:
        chosen: The file or index to use; None chooses as transformers does.

    Raises:
        UnsupportedModelError, MissingTensorError, CorruptShardError, CheckpointError: As `Checkpoint.open`.
    """
    try:
        names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be listed: {error.strerror}", path=directory) from error
    check_names(directory, names)
    if chosen is None:
        chosen = _default_weights(directory, names)
    if chosen is None:
        return _read_shards(directory, {shard: [] for shard in _all_shards(directory, names)})
    if chosen.endswith(_INDEX_SUFFIX):
        return _read_shards(directory, _shards_of_index(directory / chosen))
    return _read_header(directory / chosen)


def _default_weights(directory: Path, names: list[str]) -> str | None:
    """The file of weights, or else the index, that transformers would take."""
    if is_file(directory / _SINGLE_NAME):
        return _SINGLE_NAME
    return _INDEX_NAME if _INDEX_NAME in names else None


def _all_shards(directory: Path, names: list[str]) -> list[str]:
    if _SINGLE_NAME in names:  # no regular file, which its reader reports
        return [_SINGLE_NAME]
    shards = [name for name in names if name.endswith(".safetensors")]
    if not shards:
        missing = "no *.safetensors" if "config.json" in names else "no config.json and no *.safetensors"
        message = f"{directory} is not a checkpoint directory: {missing}; {ONLY_SAFETENSORS}"
        raise CheckpointError(message, path=directory)
    return shards


def _named_weights(config: dict[str, Any], path: Path) -> str | None:
    """The file of weights that config.json names; None if it names none."""
    name = config.get("transformers_weights")
    if name is None:
        return None
    if not isinstance(name, str) or not _is_plain_name(name.removesuffix(".index.json")):
        raise CheckpointError(
            f"{path}: transformers_weights is {name!r}, not a *.safetensors or *{_INDEX_SUFFIX} of this directory",
            path=path,
        )
    return name


def _read_shards(directory: Path, listed: dict[str, list[str]]) -> dict[str, TensorSpec]:
    """Reads the headers of these shards, including tensors that the index does not name, as transformers does.

    Args:
        listed: The tensors that each shard must have, by the shard's name.
    """
    tensors: dict[str, TensorSpec] = {}
    for shard, names in sorted(listed.items()):
        path = directory / shard
        header = _read_header(path)
        missing = tuple(name for name in names if name not in header)
        if missing:
            more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
            message = f"{path} lacks tensor {missing[0]!r}{more}, which the index places there"
            raise MissingTensorError(message, path=path, names=missing)
        for name, spec in header.items():
            if name in tensors:
                both = f"{tensors[name].file.name!r} and {shard!r}"
                raise corrupt(directory, f"tensor {name!r} is in both {both}; remove one of them")
            tensors[name] = spec
    return tensors


def _shards_of_index(index: Path) -> dict[str, list[str]]:
    """The shards that the index names, with the tensors of each."""
    text = _read_bytes(index, _MAX_INDEX_BYTES, CorruptShardError)
    weight_map = _parse_json(index, text, dict, CorruptShardError, unique=True).get("weight_map")
    if not isinstance(weight_map, dict):
        raise corrupt(index, "no object `weight_map`")
    names_by_shard: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or (shard not in names_by_shard and not _is_plain_name(shard)):
            raise corrupt(index, f"puts tensor {name!r} in {shard!r}, not a *.safetensors of this directory")
        names_by_shard.setdefault(shard, []).append(name)
    return names_by_shard


def _is_plain_name(name: str) -> bool:
    """Whether a shard's name stays inside its directory, on every platform.

    Only the name counts. In the hub's cache, every shard is a link out of its snapshot.
    """
    plain = name.endswith(".safetensors") and name.isprintable() and "\\" not in name and ":" not in name
    return plain and not any(part in ("", ".", "..") for part in name.split("/"))


def read_config(path: Path, kind: type[_Json]) -> _Json:
    """Reads a JSON file of a checkpoint, of at most 4 MiB.

    Raises:
        CheckpointError: It cannot be read, or is not of that kind.
    """
    return _parse_json(path, _read_bytes(path, _MAX_CONFIG_BYTES, CheckpointError), kind, CheckpointError)


def _read_bytes(path: Path, max_bytes: int, mapped: type[CheckpointError]) -> bytes:
    with opened(path) as (file, state):
        if state.nbytes > max_bytes:
            raise mapped(f"{path}: {state.nbytes} bytes, more than the {max_bytes} that are read", path=path)
        return file.read(state.nbytes)


def _parse_json(
    path: Path, text: bytes, kind: type[_Json], mapped: type[CheckpointError], *, unique: bool = False
) -> _Json:
    if text.count(b",") + text.count(b"[") + text.count(b"{") > _MAX_VALUES:
        raise mapped(f"{path}: more than {_MAX_VALUES} values, which are too many", path=path)
    try:
        parsed = json.loads(text.decode(), object_pairs_hook=_unique if unique else None)
    except (ValueError, RecursionError) as error:
        raise mapped(f"{path}: not valid JSON: {error!s:.1000}", path=path) from error
    if not isinstance(parsed, kind):
        expected = "an object" if kind is dict else "a list"
        raise mapped(f"{path}: a JSON {type(parsed).__name__}, not {expected}", path=path)
    return parsed


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError(f"duplicate key {Counter(key for key, _ in pairs).most_common(1)[0][0]!r}")
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """What a shard's header says beside its tensors.

    Raises:
        CorruptShardError, CheckpointError: The header violates its format, or cannot be read.
    """
    return _read_entries(path)[1]


def _read_header(path: Path) -> dict[str, TensorSpec]:
    """Reads and checks a shard's header."""
    entries, metadata, data_offset, state = _read_entries(path)
    check_writer(path, metadata)
    states = {path: state}
    specs = [_parse_entry(path, name, entry, data_offset, states) for name, entry in entries.items()]
    specs.sort(key=lambda spec: (spec.offset, spec.nbytes))
    _check_layout(path, specs, data_offset, state.nbytes)
    return {spec.name: spec for spec in specs}


def _read_entries(path: Path) -> tuple[dict[str, Any], dict[str, str], int, FileState]:
    """Reads a header: 8 bytes of little-endian length, then as many bytes of JSON.

    Returns:
        The entries of the tensors, the metadata, where the tensors' bytes begin, and the file's state.
    """
    with opened(path) as (file, state):
        size = state.nbytes
        prefix = file.read(min(8, size))
        if len(prefix) < 8:
            raise corrupt(path, "too short for the 8 bytes of header length", expected=8, actual=size)
        if prefix == b"version ":
            raise corrupt(path, "a Git LFS pointer in place of the weights; run `git lfs pull`")
        header_bytes = int.from_bytes(prefix, "little")
        limit = min(MAX_HEADER_BYTES, size - 8)
        if header_bytes > limit:
            message = f"a header of {header_bytes} bytes, of at most {limit}"
            raise corrupt(path, message, expected=header_bytes, actual=limit)
        header = file.read(header_bytes)
    if not header.startswith(b"{"):
        raise corrupt(path, "the header does not begin with '{'")
    if header.count(b'"data_offsets"') > MAX_TENSORS:
        raise corrupt(path, f"more than {MAX_TENSORS} tensors, which are too many")
    entries = _parse_json(path, header, dict, CorruptShardError, unique=True)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise corrupt(path, "`__metadata__` is not an object of strings")
    return entries, metadata, 8 + header_bytes, state


def _parse_entry(
    path: Path, name: str, entry: object, data_offset: int, states: Mapping[Path, FileState]
) -> TensorSpec:
    match entry:
        case {"dtype": str(dtype_name), "shape": list(shape), "data_offsets": [begin, end], **other}:
            pass
        case _:
            raise corrupt(path, f"tensor {name!r} lacks one of `dtype`, `shape` and two `data_offsets`")
    if other:
        raise corrupt(path, f"tensor {name!r} has unknown entries: {', '.join(map(repr, other))}")
    numbers = (*shape, begin, end)
    if not all(type(number) is int and 0 <= number <= MAX_INT64 for number in numbers) or begin > end:
        raise corrupt(path, f"tensor {name!r} has an impossible shape or range")
    bits = _PACKED_BITS.get(dtype_name)
    dtype = torch.uint8 if bits else DTYPES.get(dtype_name)
    if dtype is None:
        known = ", ".join((*DTYPES, *_PACKED_BITS))
        raise corrupt(path, f"tensor {name!r} has dtype {dtype_name!r}; known are {known}")
    count = num_elements(path, name, shape)
    if bits and count * bits % 8:
        raise corrupt(path, f"tensor {name!r} of {dtype_name} {shape} does not end with a whole byte")
    nbytes = count * bits // 8 if bits else count * dtype.itemsize
    if nbytes != end - begin:
        message = f"tensor {name!r} has {end - begin} bytes, where {dtype_name} {shape} takes {nbytes}"
        raise corrupt(path, message, expected=nbytes, actual=end - begin)
    return TensorSpec(
        name=name,
        file=path,
        offset=data_offset + begin,
        nbytes=nbytes,
        dtype=dtype,
        shape=_shape_of_bytes(shape, nbytes, bits) if bits else tuple(shape),
        packed=dtype_name if bits else None,
        file_states=states,
    )


def _shape_of_bytes(shape: list[int], nbytes: int, bits: int) -> tuple[int, ...]:
    """The shape of the bytes of packed numbers; all in one row if rows do not end with a byte."""
    if not shape or shape[-1] * bits % 8:
        return (nbytes,)
    return (*shape[:-1], shape[-1] * bits // 8)


def _check_layout(path: Path, specs: list[TensorSpec], data_offset: int, file_size: int) -> None:
    """Checks that `specs`, in the order of their bytes, cover the file from `data_offset` on, each byte once.

    The reference implementation refuses holes and trailing bytes too: they could hide another file.
    """
    end, previous = data_offset, ""
    for spec in specs:
        if spec.offset < end:
            raise corrupt(path, f"tensors {previous!r} and {spec.name!r} overlap")
        if spec.offset > end:
            message = f"{spec.offset - end} bytes before tensor {spec.name!r} belong to no tensor"
            raise corrupt(path, message, expected=end, actual=spec.offset)
        end, previous = spec.offset + spec.nbytes, spec.name
    if end > file_size:
        message = f"truncated: {file_size} bytes, where the header needs {end}"
        raise corrupt(path, message, expected=end, actual=file_size)
    if end < file_size:
        message = f"{file_size - end} bytes after the last tensor belong to no tensor"
        raise corrupt(path, message, expected=end, actual=file_size)
