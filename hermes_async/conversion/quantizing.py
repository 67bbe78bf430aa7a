"""Quantizes a checkpoint, a block of rows at a time, into a new folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from hermes_async.conversion.output_folder import (
    check_apart,
    check_space,
    copy_file,
    open_output,
    other_files,
    write_json,
    writing,
)
from hermes_async.conversion.targets import LinearWeight, Targets, check_no_gguf, find_targets
from hermes_async.errors import CheckpointError, ConfigError, ReadError, ShortReadError, UnsupportedModelError
from hermes_async.modeling.transformers_api import tensor_order
from hermes_async.quantization.processor_layout import ProcessorInt4
from hermes_async.quantization.write import GROUP_SIZES, OutputFormat, PackedIntegers, RowScaledFp8
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.file_state import FileState
from hermes_async.storage.shard_writer import NewTensor, ShardWriter, aligned, is_whole
from hermes_async.storage.tensor_bytes import read_into
from hermes_async.storage.tensor_spec import TensorSpec

SHARD_BYTES = 2**30
_INDEX_NAME = "model.safetensors.index.json"
_WEIGHT = "weight"
_COPIED_AT_ONCE = 16 * 2**20
_MOST_THREADS = 8
_VERSION = 1  # changes when the same settings give another output


@dataclass(frozen=True, slots=True)
class _Item:
    """A tensor of the source, and the tensors that are written for it.

    Attributes:
        weight: The linear layer whose weight is quantized: the tensor, or some of its rows. None if it is copied.
    """

    source: TensorSpec
    tensors: tuple[NewTensor, ...]
    weight: LinearWeight | None

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def extent(self) -> tuple[int, int]:
        """The first byte of the tensor that is read, and the number of bytes."""
        if self.weight is None:
            return 0, self.source.nbytes
        row_bytes = self.weight.columns * self.source.dtype.itemsize
        return self.weight.first_row * row_bytes, self.weight.rows * row_bytes


@dataclass(frozen=True, slots=True)
class _Shard:
    name: str
    items: tuple[_Item, ...]

    @property
    def tensors(self) -> list[NewTensor]:
        return aligned([tensor for item in self.items for tensor in item.tensors])


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """What was written.

    Attributes:
        title: The format, for people.
        num_quantized: Linear layers whose weights were quantized.
        num_copied: Tensors that are as they were.
        bits_per_weight: Of the quantized tensors, with their scales.
        source_bytes: Of all tensors before.
        nbytes: Of all tensors now.
        ignored: The linear layers that are as they were.
        left_out: Files that were not copied: pickles and other weights, and links out of the folder.
        generates: Whether the model is a causal language model.
        context_length: The most tokens of its sequences; None without a limit.
    """

    title: str
    num_quantized: int
    num_copied: int
    bits_per_weight: float
    source_bytes: int
    nbytes: int
    ignored: tuple[str, ...]
    left_out: tuple[str, ...]
    generates: bool
    context_length: int | None


def choose_format(
    name: str, group_size: int | None, columns: dict[str, int], *, for_this_machine: bool = False
) -> OutputFormat:
    """The format of this name, with groups that divide all matrices.

    Args:
        name: "int4", "int8" or "fp8".
        group_size: 32, 64, 128, or None: the largest of these that divides all matrices for int4, one scale a row for
            the others.
        columns: Of each matrix, by its name.
        for_this_machine: In the layout of this processor's kernel; for int4.

    Raises:
        ConfigError: There are no groups or no layout for this format, or groups do not divide a matrix.
    """
    if for_this_machine and name != "int4":
        raise ConfigError(
            f"--for-this-machine is for int4. {name} has no layout of its own: its bytes are read as fast as they are"
        )
    if name == "fp8":
        if group_size is not None:
            raise ConfigError("fp8 has one scale a row; groups are for int4 and int8")
        return RowScaledFp8()
    if group_size is None and name == "int8":
        return PackedIntegers(8, None)
    fitting = [size for size in reversed(GROUP_SIZES) if not any(count % size for count in columns.values())]
    size = group_size or (fitting[0] if fitting else GROUP_SIZES[0])
    if size not in fitting:
        which = next(tensor for tensor, count in columns.items() if count % size)
        works = f"groups of {' or '.join(map(str, reversed(fitting)))}" if fitting else "int8 or fp8, without groups"
        raise ConfigError(
            f"groups of {size} do not divide the {columns[which]} columns of {which!r}; {works} would work"
        )
    return (
        ProcessorInt4.for_this_machine(size) if for_this_machine else PackedIntegers(4 if name == "int4" else 8, size)
    )


def quantize(
    source: str | os.PathLike[str],
    out: Path,
    format_name: str,
    group_size: int | None = None,
    *,
    for_this_machine: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> QuantizedCheckpoint:
    """Writes a quantized copy of a checkpoint, or continues one that was interrupted. Blocks.

    It takes memory for some blocks of rows, whatever the size of the model and of its tensors.

    Args:
        out: A new or empty folder, or what an interrupted call with the same arguments left.
        format_name, group_size, for_this_machine: As `choose_format`.
        shard_bytes: Files get about this size. What was interrupted is continued from the last whole file.
        on_progress: Called after each block with the bytes of the source that are done, and all.

    Raises:
        ConfigError: `out` is something else, the disk has too little space, or groups do not divide a matrix, or this
            processor has no layout of its own.
        UnsupportedModelError: The model is quantized already, has no linear layers, or is not known.
        CheckpointError: The checkpoint cannot be opened, or a weight is infinite or no number.
        ReadError: It cannot be read.
    """
    check_no_gguf(source)
    checkpoint = Checkpoint.open(source)
    if checkpoint.root is not None:
        raise UnsupportedModelError(
            f"{checkpoint.root} has its model in the folder {checkpoint.path.name!r}; give that folder",
            path=checkpoint.path,
        )
    check_apart(checkpoint.path, out)
    targets = find_targets(checkpoint)
    columns = {weights[0].base.removesuffix("."): weights[0].columns for _, weights in sorted(targets.weights.items())}
    chosen = choose_format(format_name, group_size, columns, for_this_machine=for_this_machine)
    targets = targets.only(chosen.takes)
    shards = _plan_shards(checkpoint, targets, chosen, shard_bytes)
    copied, left_out = other_files(checkpoint.path)
    names = [*(shard.name for shard in shards), *copied, "config.json", _INDEX_NAME]
    missing = [shard for shard in shards if not is_whole(out / shard.name, shard.tensors)]
    needed = sum(item.nbytes for shard in missing for item in shard.items)
    check_space(out, needed + sum(path.stat().st_size for path in copied.values()))
    settings = _settings(checkpoint, chosen, targets, shard_bytes)
    with open_output(out, settings, names), _threads() as (threads, num_threads):
        progress = _Progress(checkpoint.total_bytes, on_progress)
        work = _Work(chosen, targets.dtype, progress, threads, num_threads)
        for shard in shards:
            if shard in missing:
                _write_shard(out / shard.name, shard, work)
            else:
                progress.add(sum(item.extent[1] for item in shard.items))
        for relative, path in copied.items():
            copy_file(path, out / relative)
        if len(shards) > 1:
            write_json(out / _INDEX_NAME, _index(shards))
        config = {name: value for name, value in checkpoint.config.items() if name != "transformers_weights"}
        write_json(out / "config.json", config | {"quantization_config": dict(chosen.settings(targets.ignored))})
    return _summary(checkpoint, targets, chosen, shards, left_out)


class _Progress:
    """Bytes of the source that are done; the only state of a run that is not on disk."""

    def __init__(self, total: int, on_progress: Callable[[int, int], None]) -> None:
        self._done, self._total, self._on_progress = 0, total, on_progress

    def add(self, num_bytes: int) -> None:
        self._done += num_bytes
        self._on_progress(self._done, self._total)


def _plan_shards(checkpoint: Checkpoint, targets: Targets, chosen: OutputFormat, shard_bytes: int) -> list[_Shard]:
    """The files that are written, layer after layer, each with whole matrices."""
    order = tensor_order()
    groups: list[list[_Item]] = [[]]
    size = 0
    for name in sorted(checkpoint.tensors, key=order):
        for item in _items(checkpoint.tensors[name], targets.weights.get(name, ()), chosen, targets.dtype):
            if groups[-1] and size + item.nbytes > shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(item)
            size += item.nbytes
    if len(groups) == 1:
        return [_Shard("model.safetensors", tuple(groups[0]))]
    return [
        _Shard(f"model-{idx:05d}-of-{len(groups):05d}.safetensors", tuple(items))
        for idx, items in enumerate(groups, start=1)
    ]


def _items(spec: TensorSpec, weights: Sequence[LinearWeight], chosen: OutputFormat, dtype: torch.dtype) -> list[_Item]:
    if spec.packed is not None:
        raise UnsupportedModelError(f"{spec.file}: tensor {spec.name!r} is in {spec.packed}", path=spec.file)
    if not weights:
        return [_Item(spec, (NewTensor(spec.name, spec.dtype, spec.shape),), None)]
    items = []
    for weight in weights:
        parts = chosen.parts(weight.rows, weight.columns, dtype)
        tensors = tuple(NewTensor(weight.base + part, one.dtype, one.shape) for part, one in parts.items())
        items.append(_Item(spec, tensors, weight))
    return items


def _settings(checkpoint: Checkpoint, chosen: OutputFormat, targets: Targets, shard_bytes: int) -> dict[str, Any]:
    """All that the output depends on."""
    states: dict[str, FileState] = {}
    for spec in checkpoint.tensors.values():
        states.update({path.name: state for path, state in spec.file_states.items()})
    shards = {name: [state.nbytes, state.modified_ns] for name, state in sorted(states.items())}
    config = sha256(repr(sorted(checkpoint.config.items())).encode()).hexdigest()
    return {
        "format": chosen.title,
        "model": {"files": shards, "config": config},
        "shard_bytes": shard_bytes,
        "quantized": sha256("\n".join(sorted(targets.weights)).encode()).hexdigest(),
        "version": _VERSION,
    }


@dataclass(frozen=True, slots=True)
class _Work:
    """How shards are written.

    Attributes:
        scale_dtype: That of the scales.
        threads: Quantize blocks, each with torch's operations on one thread; that many blocks are in memory.
    """

    chosen: OutputFormat
    scale_dtype: torch.dtype
    progress: _Progress
    threads: ThreadPoolExecutor
    num_threads: int


@contextmanager
def _threads() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Threads for blocks. torch's own threads would wait for each other at every operation on a block."""
    before = torch.get_num_threads()
    count = min(before, _MOST_THREADS)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(count, thread_name_prefix="quantize") as pool:
            yield pool, count
    finally:
        torch.set_num_threads(before)


def _write_shard(path: Path, shard: _Shard, work: _Work) -> None:
    with writing(path.parent), ShardWriter(path, shard.tensors) as writer:
        for item in shard.items:
            if item.weight is None:
                for block in _blocks(item, _COPIED_AT_ONCE):
                    writer.append(item.source.name, block)
                    work.progress.add(block.nbytes)
            else:
                _write_quantized(writer, item, item.weight, work)


def _write_quantized(writer: ShardWriter, item: _Item, weight: LinearWeight, work: _Work) -> None:
    for part, content in work.chosen.whole_parts(weight.rows, weight.columns).items():
        writer.append(weight.base + part, content)

    def quantized(block: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = block.view(item.source.dtype).view(-1, weight.columns).float()
        if not bool(torch.isfinite(rows).all()):
            raise CheckpointError(
                f"{item.source.file}: tensor {item.source.name!r} has weights that are infinite or no numbers",
                path=item.source.file,
            )
        return work.chosen.quantize(rows, work.scale_dtype)

    row_bytes = weight.columns * item.source.dtype.itemsize
    blocks = _blocks(item, work.chosen.block_rows(weight.rows, weight.columns) * row_bytes)
    while together := list(islice(blocks, work.num_threads)):
        for parts in work.threads.map(quantized, together):
            for part, content in parts.items():
                writer.append(weight.base + part, content)
        work.progress.add(sum(block.nbytes for block in together))


def _blocks(item: _Item, block_bytes: int) -> Iterator[torch.Tensor]:
    """The bytes that are read for an item, as uint8, in blocks of a size; the last one may be shorter.

    Raises:
        ReadError: They cannot be read, or the file has changed since its header was read.
    """
    spec = item.source
    first, nbytes = item.extent
    try:
        with spec.file.open("rb", buffering=0) as file:
            state = FileState.of(os.fstat(file.fileno()))
            if spec.file_states.get(spec.file, state) != state:
                raise ReadError(f"{spec.file} has changed while it was read", path=spec.file, offset=spec.offset)
            for start in range(0, nbytes, block_bytes):
                block = torch.empty(min(block_bytes, nbytes - start), dtype=torch.uint8)
                _fill(file.fileno(), spec, spec.offset + first + start, block.numpy().data)
                yield block
    except OSError as error:
        raise ReadError(
            f"{spec.file} cannot be read: {error.strerror or error}",
            path=spec.file,
            offset=spec.offset,
            errno=error.errno,
        ) from error


def _fill(fd: int, spec: TensorSpec, offset: int, view: memoryview) -> None:
    done = read_into(fd, view, offset)
    if done < len(view):
        raise ShortReadError(
            f"{spec.file} ends within tensor {spec.name!r}",
            path=spec.file,
            offset=offset,
            expected=len(view),
            actual=done,
        )


def _index(shards: Sequence[_Shard]) -> dict[str, Any]:
    weight_map = {tensor.name: shard.name for shard in shards for item in shard.items for tensor in item.tensors}
    total = sum(item.nbytes for shard in shards for item in shard.items)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _summary(
    checkpoint: Checkpoint, targets: Targets, chosen: OutputFormat, shards: Sequence[_Shard], left_out: Sequence[str]
) -> QuantizedCheckpoint:
    items = [item for shard in shards for item in shard.items]
    quantized = [item for item in items if item.weight is not None]
    num_weights = sum(item.weight.rows * item.weight.columns for item in quantized if item.weight is not None)
    return QuantizedCheckpoint(
        title=chosen.title,
        num_quantized=len(quantized),
        num_copied=len(items) - len(quantized),
        bits_per_weight=8 * sum(item.nbytes for item in quantized) / num_weights,
        source_bytes=checkpoint.total_bytes,
        nbytes=sum(item.nbytes for item in items),
        ignored=targets.ignored,
        left_out=tuple(left_out),
        generates=targets.generates,
        context_length=targets.context_length,
    )
