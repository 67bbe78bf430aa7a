"""Checks the scales of a checkpoint once, when it is opened: one that is not a number would spoil every answer."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass

import torch

from hermes_async.errors import CorruptShardError
from hermes_async.quantization.block_scales import EXPONENT_DTYPES
from hermes_async.quantization.encoded_weight import EncodedParameter
from hermes_async.quantization.encoding import Encoding
from hermes_async.storage.tensor_bytes import TensorBytes, read_tensors
from hermes_async.storage.tensor_spec import TensorSpec

_E8M0_NAN = 255


def check_scales(parameters: Iterable[EncodedParameter]) -> None:
    """Reads all scales that are tensors of their own. Blocks: call it on a worker thread.

    Scales that lie within the blocks of a format, as in GGUF, are not read.

    Raises:
        CorruptShardError: A scale is not a number, or infinite; or it is zero, and the format's writers write no zeros.
            The message names the tensor and its file.
        CheckpointError: A file cannot be read, or has changed since its header was read.
    """
    scales: dict[tuple[str, int], _Scales] = {}
    for matrix in (matrix for parameter in parameters for matrix in parameter.matrices):
        for part, spec in matrix.parts.items():
            if matrix.encoding.is_scale(part):
                scales[str(spec.file), spec.offset] = _Scales(spec, matrix.encoding, part)
    by_spec = {id(one.spec): one for one in scales.values()}
    with closing(read_tensors(one.spec for one in scales.values())) as reads:
        for read in reads:
            by_spec[id(read.spec)].check(read)


@dataclass(frozen=True, slots=True)
class _Scales:
    """A tensor of scales, and whose it is."""

    spec: TensorSpec
    encoding: Encoding
    part: str

    def check(self, read: TensorBytes) -> None:
        """Checks some of the scales.

        Raises:
            CorruptShardError: One is wrong.
        """
        wrong = _wrong(read.content, self.spec.dtype, zeros=self.encoding.may_be_zero(self.part))
        if wrong is None:
            return
        within, what = wrong
        index = read.start // self.spec.dtype.itemsize + within
        raise CorruptShardError(
            f"{self.spec.file}: a scale in tensor {self.spec.name!r} ({self.encoding.name}), number {index}, {what}; "
            "the file is damaged: download it or make it again",
            path=self.spec.file,
        )


def _wrong(content: memoryview, dtype: torch.dtype, *, zeros: bool) -> tuple[int, str] | None:
    """The index of a wrong scale, and what is wrong with it.

    Args:
        zeros: Whether zeros are right.
    """
    if dtype in EXPONENT_DTYPES:
        exponents = torch.frombuffer(content, dtype=torch.uint8)
        return None if exponents.max() < _E8M0_NAN else (int(exponents.argmax()), "is not a number")
    values = torch.frombuffer(content, dtype=dtype)
    if dtype.itemsize == 1:
        values = values.float()
    low, high = (bound.item() for bound in torch.aminmax(values))  # both are NaN if a number is
    if math.isfinite(low) and math.isfinite(high) and (zeros or low > 0 or high < 0):
        return None
    infinite = ~values.isfinite()
    if infinite.any():
        return int(infinite.byte().argmax()), "is infinite, or not a number"
    is_zero = values == 0
    if zeros or not is_zero.any():
        return None
    return int(is_zero.byte().argmax()), "is zero, which no writer of this format stores"
