"""Tensors that are read while a checkpoint is opened."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hermes_async.errors import CheckpointError, CorruptShardError
from hermes_async.storage.file_state import FileState
from hermes_async.storage.tensor_bytes import read_small_tensor, read_tensors
from hermes_async.storage.tensor_spec import TensorSpec

MIB = 1 << 20


def spec(file: Path, offset: int, nbytes: int) -> TensorSpec:
    states = {file: FileState.of(file.stat())}
    return TensorSpec(f"at {offset}", file, offset, nbytes, torch.uint8, (nbytes,), file_states=states)


def test_tensors_of_each_size_and_place(tmp_path: Path) -> None:
    contents = {tmp_path / name: bytes(idx * 7 % 251 for idx in range(MIB)) * 9 for name in ("a", "b")}
    for file, content in contents.items():
        file.write_bytes(content)
    places = [(0, 10), (10, 1), (11, 5000), (40_000, 3), (70_000, 0), (MIB, 4 * MIB + 5), (8 * MIB, MIB)]
    specs = [spec(file, *place) for file in contents for place in places]
    specs += [spec(tmp_path / "a", 5000 + 64 * idx, 2) for idx in range(1000)]
    specs.append(TensorSpec.joined([specs[0], specs[8], specs[2]], (5011,)))
    found: dict[int, dict[int, bytes]] = defaultdict(dict)
    for read in read_tensors(specs):
        assert len(read.content) <= 4 * MIB
        found[id(read.spec)][read.start] = bytes(read.content)
    for one in specs:
        pieces = one.pieces or (one,)
        content = b"".join(contents[piece.file][piece.offset : piece.offset + piece.nbytes] for piece in pieces)
        assert b"".join(own for _, own in sorted(found[id(one)].items())) == content
        if len(content) < 6000:
            assert read_small_tensor(one, 6000) == content
    assert not [thread for thread in threading.enumerate() if "tensors of hermes" in thread.name]


def test_a_tensor_that_is_not_small(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(bytes(100))
    with pytest.raises(CorruptShardError, match="'at 0' has 100 bytes, and may have at most 99"):
        read_small_tensor(spec(tmp_path / "a", 0, 100), 99)


def test_a_file_that_has_changed_or_ends_early(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes(bytes(100))
    changed, short = spec(file, 0, 100), replace(spec(file, 0, 101), file_states={})
    with pytest.raises(CorruptShardError, match="ends at byte 100"):
        list(read_tensors([short]))
    file.write_bytes(bytes(99))
    with pytest.raises(CheckpointError, match="was changed"):
        list(read_tensors([changed]))
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        list(read_tensors([changed]))
