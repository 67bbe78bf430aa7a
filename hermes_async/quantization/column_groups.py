"""Which group each column of a matrix belongs to, where a checkpoint says so: its tensors `g_idx`.

Most checkpoints have them although their columns are in order. So they are read once, when the checkpoint is opened.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace

import torch

from hermes_async.errors import CorruptShardError
from hermes_async.quantization.encoding import StoredMatrix
from hermes_async.quantization.packed_integers import OrderedEncoding, num_groups
from hermes_async.storage.tensor_bytes import TensorBytes, read_tensors

_PART = "g_idx"


def without_groups_in_order(matrices: Mapping[str, StoredMatrix]) -> dict[str, StoredMatrix]:
    """The same matrices. Those whose columns are in order have no part "g_idx" any more. Blocks.

    Raises:
        CorruptShardError: There is no such group, or a part has another shape. The message names the tensor.
        CheckpointError: A file cannot be read, or has changed since its header was read.
    """
    ordered = {name: matrix for name, matrix in matrices.items() if _PART in matrix.parts}
    by_spec = {id(matrix.parts[_PART]): name for name, matrix in ordered.items()}
    for matrix in ordered.values():
        matrix.check()
    in_order = dict.fromkeys(ordered, True)
    with closing(read_tensors(matrix.parts[_PART] for matrix in ordered.values())) as reads:
        for read in reads:
            name = by_spec[id(read.spec)]
            in_order[name] &= _in_order(read, ordered[name])
    return {name: _unordered(matrix) if in_order.get(name) else matrix for name, matrix in matrices.items()}


def _in_order(read: TensorBytes, matrix: StoredMatrix) -> bool:
    """Whether these are groups of columns in order, or none at all."""
    spec, columns, encoding = read.spec, matrix.shape[-1], matrix.encoding
    assert isinstance(encoding, OrderedEncoding)
    count = num_groups(columns, encoding.group_size)
    groups = torch.frombuffer(read.content, dtype=spec.dtype)
    low, high = (int(bound) for bound in torch.aminmax(groups))
    if low == high == -1:  # what some writers store for columns that were not ordered
        return True
    if low < 0 or high >= count:
        raise CorruptShardError(
            f"{spec.file}: tensor {spec.name!r} has the index {low if low < 0 else high}, where there are {count} "
            "groups; the file is damaged: download it or make it again",
            path=spec.file,
        )
    first = read.start // spec.dtype.itemsize
    expected = (
        torch.arange(first, first + len(groups)).remainder_(columns).div_(columns // count, rounding_mode="floor")
    )
    return torch.equal(groups.to(torch.int64), expected)


def _unordered(matrix: StoredMatrix) -> StoredMatrix:
    encoding = matrix.encoding
    assert isinstance(encoding, OrderedEncoding)
    parts = {part: spec for part, spec in matrix.parts.items() if part != _PART}
    return replace(matrix, encoding=encoding.unordered(), parts=parts)
