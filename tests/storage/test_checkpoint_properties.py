"""Any set of tensors is read whole and without waste; no file, however broken, escapes as a foreign error."""

from __future__ import annotations

import json
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from hermes_async.errors import CheckpointError
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.tensor_spec import TensorSpec, merge_extents

no_deadline = settings(deadline=None)  # the disk may be slow, and that is no failure

specs = st.builds(
    lambda file, offset, nbytes: TensorSpec("t", Path(file), offset, nbytes, torch.uint8, (nbytes,)),
    st.sampled_from(["a", "b"]),
    st.integers(0, 500),
    st.integers(0, 60),
)


def bytes_of(ranges: Any) -> set[tuple[Path, int]]:
    return {(r.file, byte) for r in ranges for byte in range(r.offset, r.offset + r.nbytes)}


@no_deadline
@given(st.lists(specs, max_size=20), st.integers(0, 40))
def test_extents_cover_tensors_exactly(tensors: list[TensorSpec], max_gap: int) -> None:
    extents = merge_extents(tensors, max_gap=max_gap)
    needed, read = bytes_of(tensors), bytes_of(extents)

    assert needed <= read
    for tensor in tensors:  # and each tensor lies in one extent, so that it is contiguous in memory
        inside = [
            extent
            for extent in extents
            if extent.file == tensor.file
            and extent.offset <= tensor.offset
            and tensor.offset + tensor.nbytes <= extent.offset + extent.nbytes
        ]
        assert len(inside) == 1 or not tensor.nbytes

    assert extents == sorted(extents, key=lambda extent: (extent.file, extent.offset))
    for extent in extents:  # what is read and not needed are gaps of at most max_gap, and no extent begins with one
        gap = 0
        for byte in range(extent.offset, extent.offset + extent.nbytes):
            gap = 0 if (extent.file, byte) in needed else gap + 1
            assert gap <= max_gap
        assert gap == 0
        assert (extent.file, extent.offset) in needed
    for before, after in pairwise(extents):
        assert before.file != after.file or after.offset - (before.offset + before.nbytes) > max_gap


@no_deadline
@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.data())
def test_blocks_of_rows_partition_a_tensor(shape: list[int], data: st.DataObject) -> None:
    nbytes = 4 * torch.Size(shape).numel()
    spec = TensorSpec("t", Path("f"), 96, nbytes, torch.float32, tuple(shape))
    bounds = sorted({0, shape[0], *data.draw(st.lists(st.integers(0, shape[0])))})
    end = spec.offset
    for start, stop in pairwise(bounds):
        rows = spec.rows(start, stop)
        assert rows.offset == end
        assert rows.nbytes == 4 * torch.Size(rows.shape).numel()
        end += rows.nbytes
    assert end == spec.offset + nbytes


@no_deadline
@given(st.lists(specs, min_size=1, max_size=8), st.data())
def test_rows_of_joined_tensors_are_their_bytes(tensors: list[TensorSpec], data: st.DataObject) -> None:
    joined = TensorSpec.joined(tensors, (sum(tensor.nbytes for tensor in tensors),))

    def places(pieces: Any) -> list[tuple[Path, int]]:
        return [(piece.file, byte) for piece in pieces for byte in range(piece.offset, piece.offset + piece.nbytes)]

    assert places(joined.pieces) == places(tensors)
    for before, after in pairwise(joined.pieces):
        assert (before.file, before.offset + before.nbytes) != (after.file, after.offset), "two reads where one does"
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, joined.nbytes)] * 2)))
    rows = joined.rows(start, stop)
    assert (rows.shape, rows.nbytes) == ((stop - start,), stop - start)
    assert places(rows.pieces) == places(tensors)[start:stop]
    if rows.nbytes:
        assert (rows.file, rows.offset) == places(tensors)[start]


def try_open(files: dict[str, bytes]) -> Checkpoint | None:
    """Open a checkpoint of these files; None where it is refused, as it may only be refused."""
    with tempfile.TemporaryDirectory() as directory:
        for name, data in {"config.json": b"{}", **files}.items():
            (Path(directory) / name).write_bytes(data)
        try:
            return Checkpoint.open(directory)
        except CheckpointError as error:
            str(error).encode()
            return None


def reference_accepts(shard: bytes) -> bool:
    try:
        load(shard)
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        return False
    return True


GOOD = save({"a": torch.zeros(3, 2), "b": torch.ones(4, dtype=torch.int8), "c": torch.zeros(0)}, {"format": "pt"})

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
small = st.integers(-1, 20)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["U8", "I16", "F32", "BF16", "F4", "C64"]) | json_values,
        "shape": st.lists(small | st.integers(), max_size=4) | json_values,
        "data_offsets": st.lists(small, min_size=2, max_size=2) | st.lists(st.integers()) | json_values,
    }
)
headers = st.dictionaries(st.text(max_size=4), entries | json_values, max_size=3) | json_values


@no_deadline
@given(st.binary(max_size=64))
@example(bytes(8))
@example((2**63).to_bytes(8, "little"))
def test_random_shards(shard: bytes) -> None:
    try_open({"model.safetensors": shard})


@no_deadline
@given(
    st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=4),
    st.integers(0, len(GOOD)),
)
def test_mutated_shards(changes: list[tuple[int, int]], length: int) -> None:
    shard = bytearray(GOOD)
    for position, value in changes:
        shard[position] = value
    assert (try_open({"model.safetensors": bytes(shard)}) is None) or reference_accepts(bytes(shard))
    try_open({"model.safetensors": bytes(shard[:length])})


@no_deadline
@given(headers, st.binary(max_size=40))
def test_random_headers(header: Any, data: bytes) -> None:
    text = json.dumps(header).encode()
    shard = len(text).to_bytes(8, "little") + text + data
    checkpoint = try_open({"model.safetensors": shard})
    if checkpoint is not None:
        assert checkpoint.total_bytes == len(data)


@no_deadline
@given(st.binary(max_size=30) | json_values.map(lambda value: json.dumps(value).encode()))
def test_random_configs(config: bytes) -> None:
    try_open({"model.safetensors": GOOD, "config.json": config})


@no_deadline
@given(st.dictionaries(st.text(max_size=3), st.text(max_size=3).map(lambda name: name + ".safetensors") | json_values))
@example({"a": "\ud800.safetensors"})
@example({"\ud800": "one.safetensors"})
def test_random_indexes(weight_map: dict[str, Any]) -> None:
    index = json.dumps({"weight_map": weight_map}).encode()
    try_open({"one.safetensors": GOOD, "model.safetensors.index.json": index})
