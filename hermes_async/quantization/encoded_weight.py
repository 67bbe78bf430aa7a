"""A weight of a model whose values are computed from stored tensors, a block of rows at a time, when they are used.

The model's own code stays as it is. It multiplies with its weight, and `EncodedWeight` divides the product into blocks
of output rows: each block is dequantized into scratch memory, and multiplied. A use of another kind, such as a view of
another shape, dequantizes the whole weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any, Self, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn

from hermes_async.memory.library_caches import reused_heap
from hermes_async.quantization.bfloat16_products import LINEAR, Bfloat16Products
from hermes_async.quantization.encoding import Parts, StoredMatrix
from hermes_async.quantization.row_products import product_of_rows
from hermes_async.quantization.row_threads import ONE_THREAD, RowThreads
from hermes_async.quantization.tile_products import MOST_LINES
from hermes_async.storage.tensor_spec import TensorSpec

PartOf: TypeAlias = Callable[[str], torch.Tensor]
"""Gives a stored tensor that is in memory, by the name that `EncodedParameter.specs` has for it."""

SEPARATOR = "/"
"""Between a parameter's name and the names of its stored tensors. No parameter of transformers has it in its name."""

_BLOCK = 1 << 20
"""Elements that are dequantized and then multiplied."""
_SMALL_BLOCK = 1 << 18
"""The same in float32 with few rows of inputs, which are multiplied faster with what is in the processor's cache."""
_FEW_ROWS = 32


def parameter_of(name: str) -> str:
    """The parameter that a stored tensor belongs to. A tensor that is a parameter itself has the parameter's name."""
    return name.partition(SEPARATOR)[0]


@dataclass(frozen=True, slots=True)
class EncodedParameter:
    """A parameter of a model, and the stored matrices that it is made of.

    Attributes:
        name: The parameter's name in the model.
        shape: [rows, columns], or [experts, rows, columns]. Where the matrices are stored the other way round, the
            last two are [columns, rows]. A parameter that is `whole` may have any shape.
        dtype: That the model computes with.
        matrices: One behind the other; each has all columns. Of experts, those of the first expert come first.
        whole: It is dequantized as a whole when its stage is bound, and takes the place of its stored tensors then:
            norms, convolutions, and other small parameters.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    matrices: tuple[StoredMatrix, ...]
    whole: bool = False

    @property
    def num_experts(self) -> int:
        return 1 if self.whole else prod(self.shape[:-2])

    @property
    def transposed(self) -> bool:
        return self.matrices[0].transposed

    @property
    def stored_shape(self) -> tuple[int, int]:
        """The shape of all matrices together, as the weight has it: [rows, columns], or the other way round."""
        rows, columns = sum(matrix.shape[0] for matrix in self.matrices), self.matrices[0].shape[1]
        return (columns, rows) if self.transposed else (rows, columns)

    @property
    def nbytes(self) -> int:
        """Bytes of the dequantized parameter."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def divisible(self) -> bool:
        """Whether blocks of its rows can be read apart from each other."""
        return not self.whole and len(self.matrices) == 1 and self.matrices[0].divisible

    @property
    def cut_step(self) -> int:
        """Blocks of rows that are read apart begin at multiples of this."""
        return max(matrix.encoding.cut_step for matrix in self.matrices)

    @property
    def scratch_bytes(self) -> int:
        """The most memory that its use takes, unless it is dequantized as a whole."""
        return max(map(_block_bytes, self.matrices, [self.dtype.itemsize] * len(self.matrices)))

    def specs(self) -> Iterator[tuple[str, TensorSpec]]:
        """Its stored tensors, each with a name of its own that begins with the parameter's."""
        for idx, matrix in enumerate(self.matrices):
            for part, spec in matrix.parts.items():
                yield f"{self.name}{SEPARATOR}{idx}{SEPARATOR}{part}", spec

    def rows(self, name: str, start: int, stop: int) -> EncodedParameter:
        """The parameter `name` that has the rows `start` to `stop`. It must be `divisible`."""
        (only,) = self.matrices
        return replace(self, name=name, shape=(stop - start, self.shape[1]), matrices=(only.rows(start, stop),))

    @property
    def has_experts(self) -> bool:
        """Whether it is [experts, rows, columns], and each expert has stored matrices of its own."""
        return not self.whole and len(self.shape) == 3 and len(self.matrices) % self.shape[0] == 0

    def expert(self, name: str, idx: int) -> EncodedParameter:
        """The parameter `name` that is one of the experts. It must have experts."""
        count = len(self.matrices) // self.shape[0]
        chosen = self.matrices[idx * count : (idx + 1) * count]
        return replace(self, name=name, shape=self.shape[1:], matrices=chosen)

    def dequantized(self, part_of: PartOf) -> torch.Tensor:
        """All of its values, in a tensor of its shape."""
        return EncodedWeight.of(self, part_of).dequantized().view(self.shape)


@lru_cache(maxsize=64)
def _order(rows: tuple[int, ...]) -> torch.Tensor:
    """An index of rows, kept because each sweep needs it again."""
    return torch.tensor(rows)


def _block_bytes(matrix: StoredMatrix, itemsize: int) -> int:
    rows, columns = min(matrix.shape[-2], matrix.block_rows(_BLOCK)), matrix.shape[-1]
    return rows * columns * itemsize + matrix.encoding.scratch_bytes(rows, columns, itemsize)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """A matrix whose stored tensors are in memory, under names that begin with `prefix`."""

    matrix: StoredMatrix
    prefix: str
    part_of: PartOf

    def parts(self) -> Parts:
        return {part: self.part_of(f"{self.prefix}{SEPARATOR}{part}") for part in self.matrix.parts}


class EncodedWeight(nn.Parameter):
    """Stands for an `EncodedParameter`, or for one expert of it, in a module of the model.

    It has the shape and dtype of the weight. Functions of torch that know it multiply block by block; all others get
    the dequantized weight.
    """

    # All state; it does not change.
    _matrices: tuple[_Loaded, ...]
    _flipped: bool  # whether its rows are the last dimension
    _products: Bfloat16Products
    _row_threads: RowThreads

    @classmethod
    def of(
        cls,
        encoded: EncodedParameter,
        part_of: PartOf,
        products: Bfloat16Products = LINEAR,
        row_threads: RowThreads = ONE_THREAD,
    ) -> Self:
        """A weight whose stored tensors `part_of` gives.

        Args:
            products: How inputs are multiplied with blocks that are dequantized to bfloat16. One token is always
                multiplied by `mv`.
            row_threads: Divide products in float32 whose weights a compiled function dequantizes.
        """
        matrices = tuple(
            _Loaded(matrix, f"{encoded.name}{SEPARATOR}{idx}", part_of) for idx, matrix in enumerate(encoded.matrices)
        )
        shape = encoded.stored_shape if encoded.whole else encoded.shape
        flipped = encoded.transposed
        return cls._make(shape, encoded.dtype, matrices, flipped, products=products, row_threads=row_threads)

    @classmethod
    def _make(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        matrices: tuple[_Loaded, ...],
        flipped: bool,
        *,
        products: Bfloat16Products,
        row_threads: RowThreads,
    ) -> Self:
        weight = torch.zeros((), dtype=dtype).expand(shape).as_subclass(cls)
        weight._matrices, weight._flipped = matrices, flipped
        weight._products, weight._row_threads = products, row_threads
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = _KNOWN.get(func)
        if known is not None:
            result = known(*args, **kwargs)
            if result is not NotImplemented:
                return result
        elif reads_no_values(func):
            return super().__torch_function__(func, types, args, kwargs)  # type: ignore[no-untyped-call]
        return func(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})

    def dequantized(self) -> torch.Tensor:
        """All of its values, in a plain tensor."""
        *experts, first, second = tuple(self.shape)
        rows, columns = (second, first) if self._flipped else (first, second)
        stored = torch.empty((*experts, rows, columns), dtype=self.dtype)
        lines = stored.view(-1, columns)
        for matrix, parts, offset in self._pieces():
            own = lines[offset : offset + matrix.shape[0]]
            with reused_heap():
                for start, stop in matrix.blocks(_BLOCK):
                    matrix.encoding.dequantize(parts, start, stop, own[start:stop])
            if matrix.row_order is not None:
                own.copy_(own[_order(matrix.row_order)])
        return stored.transpose(-1, -2) if self._flipped else stored

    def expert(self, idx: int) -> EncodedWeight:
        """One of the matrices [rows, columns] of a weight [experts, rows, columns]."""
        num_experts = self.shape[0]
        if not -num_experts <= idx < num_experts:
            raise IndexError(f"expert {idx} of {num_experts}")
        per_expert = len(self._matrices) // num_experts
        chosen = slice(idx % num_experts * per_expert, (idx % num_experts + 1) * per_expert)
        return self._changed(tuple(self.shape[1:]), self._matrices[chosen], self._flipped)

    def flipped(self) -> EncodedWeight:
        """The transposed weight."""
        shape = (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return self._changed(shape, self._matrices, not self._flipped)

    def _changed(self, shape: tuple[int, ...], matrices: tuple[_Loaded, ...], flipped: bool) -> EncodedWeight:
        products, row_threads = self._products, self._row_threads
        return self._make(shape, self.dtype, matrices, flipped, products=products, row_threads=row_threads)

    def product(self, inputs: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`inputs` [..., columns] times the rows, plus `bias` [rows]: [..., rows]."""
        lines = inputs.reshape(-1, inputs.shape[-1])
        products = [
            self._product(matrix, parts, lines, None if bias is None else bias[offset : offset + matrix.shape[0]])
            for matrix, parts, offset in self._pieces()
        ]
        out = products[0] if len(products) == 1 else torch.cat(products, dim=-1)
        return out.view(*inputs.shape[:-1], out.shape[-1])

    def _product(
        self, matrix: StoredMatrix, parts: Parts, lines: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """`lines` [n, columns] times the rows of one matrix, plus `bias` [rows]: [n, rows]."""
        order = None if matrix.row_order is None else _order(matrix.row_order)
        if bias is not None and order is not None:
            bias = torch.empty_like(bias).index_copy_(0, order, bias)
        out = matrix.encoding.product(parts, lines)
        if out is not None:
            out = out if bias is None else out.add_(bias)
        else:
            out = self._compiled_product(matrix, parts, lines, bias)
        if out is None and bias is None and self._products.scales_inputs and _is_one_vector(lines):
            with reused_heap():
                product = matrix.encoding.scaled_product(parts, lines[0])
            out = None if product is None else product[None]
        if out is None:
            out = self._product_of_blocks(matrix, parts, lines, bias)
        return out if order is None else out[:, order]

    def _compiled_product(
        self, matrix: StoredMatrix, parts: Parts, lines: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor | None:
        if self.dtype != torch.float32 and not (self._products.scales_inputs and len(lines) <= MOST_LINES):
            return None
        compiled = matrix.encoding.compiled_rows(parts, matrix.shape[1], self.dtype)
        if compiled is None:
            return None
        block_rows = matrix.block_rows(_BLOCK)
        with reused_heap():
            return product_of_rows(
                compiled, matrix.shape[0], lines, bias, block_rows=block_rows, threads=self._row_threads
            )

    def _product_of_blocks(
        self, matrix: StoredMatrix, parts: Parts, lines: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        rows, columns = matrix.shape
        elements = _SMALL_BLOCK if self.dtype == torch.float32 and lines.shape[0] < _FEW_ROWS else _BLOCK
        out = torch.empty((lines.shape[0], rows), dtype=lines.dtype)
        with reused_heap():
            is_bfloat16 = self.dtype == torch.bfloat16
            converted = self._products.converted(lines, self._row_threads) if is_bfloat16 else None
            scratch = torch.empty((min(rows, matrix.block_rows(elements)), columns), dtype=self.dtype)
            for start, stop in matrix.blocks(elements):
                block = scratch[: stop - start]
                matrix.encoding.dequantize(parts, start, stop, block)
                bias_of_block = None if bias is None else bias[start:stop]
                if bias is None and _is_one_vector(lines):
                    torch.mv(block, lines[0], out=out[0, start:stop])
                elif converted is not None:
                    converted.multiply(block, bias, out, start)
                else:
                    out[:, start:stop] = F.linear(lines, block, bias_of_block)
        return out

    def looked_up(self, ids: torch.Tensor) -> torch.Tensor:
        """The rows [..., columns] of a weight [rows, columns] with these indices [...]."""
        unique, inverse = torch.unique(ids, return_inverse=True)
        found = torch.empty((unique.numel(), self.shape[-1]), dtype=self.dtype)
        for place, row in enumerate(unique.tolist()):
            self._row_into(row, found[place : place + 1])
        return found[inverse]

    def _row_into(self, row: int, out: torch.Tensor) -> None:
        for matrix, parts, offset in self._pieces():
            within = row - offset
            if not 0 <= within < matrix.shape[0]:
                continue
            stored = within if matrix.row_order is None else matrix.row_order[within]
            step = matrix.encoding.row_step
            start = stored // step * step
            stop = min(matrix.shape[0], start + step)
            block = torch.empty((stop - start, matrix.shape[1]), dtype=self.dtype)
            matrix.encoding.dequantize(parts, start, stop, block)
            out.copy_(block[stored - start : stored - start + 1])
            return
        raise IndexError(f"row {row} of {self.shape[0]}")

    def _pieces(self) -> Iterator[tuple[StoredMatrix, Parts, int]]:
        """Each matrix with its stored tensors, and the rows before it."""
        offset = 0
        for one in self._matrices:
            yield one.matrix, one.parts(), offset
            offset += one.matrix.shape[0]


def _is_one_vector(lines: torch.Tensor) -> bool:
    """Whether the product of a matrix and a vector is faster than that of two matrices. In float16 it is slower."""
    return lines.shape[0] == 1 and lines.dtype == torch.bfloat16


def _plain(value: Any) -> Any:
    if isinstance(value, EncodedWeight):
        return value.dequantized()
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value))
    return value


# --- functions of torch that do not dequantize the whole weight ---


def _linear(inputs: Any, weight: Any, bias: torch.Tensor | None = None) -> Any:
    if not isinstance(weight, EncodedWeight) or isinstance(inputs, EncodedWeight) or weight._flipped:
        return NotImplemented
    return weight.product(inputs, bias) if weight.dim() == 2 else NotImplemented


def _matmul(inputs: Any, weight: Any) -> Any:
    if not isinstance(weight, EncodedWeight) or isinstance(inputs, EncodedWeight) or not weight._flipped:
        return NotImplemented
    return weight.product(inputs, None) if weight.dim() == 2 and inputs.dim() > 1 else NotImplemented


def _addmm(bias: Any, inputs: Any, weight: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1 or bias.dim() != 1 or not isinstance(weight, EncodedWeight) or not weight._flipped:
        return NotImplemented
    return weight.product(inputs, bias)


def _getitem(weight: Any, index: Any) -> Any:
    if not isinstance(weight, EncodedWeight) or weight.dim() != 3:
        return NotImplemented
    if isinstance(index, torch.Tensor) and index.dim() == 0 and not index.is_floating_point():
        index = int(index)
    return weight.expert(index) if isinstance(index, int) and not isinstance(index, bool) else NotImplemented


def _embedding(ids: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    max_norm = args[1] if len(args) > 1 else kwargs.get("max_norm")
    if max_norm is not None or not isinstance(weight, EncodedWeight) or weight._flipped:
        return NotImplemented
    return weight.looked_up(ids)


def _embedding_of_torch(weight: Any, ids: Any, *args: Any) -> Any:
    return _embedding(ids, weight)


def _flip(weight: Any) -> Any:
    return weight.flipped() if weight.dim() >= 2 else NotImplemented


def _transpose(weight: Any, first: int, second: int) -> Any:
    dims = {first % weight.dim(), second % weight.dim()}
    return weight.flipped() if dims == {weight.dim() - 1, weight.dim() - 2} else NotImplemented


def _same(weight: Any) -> Any:
    return weight


_KNOWN: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    torch.Tensor.addmm: _addmm,
    torch.Tensor.__getitem__: _getitem,
    F.embedding: _embedding,
    torch.embedding: _embedding_of_torch,
    torch.t: _flip,
    torch.Tensor.t: _flip,
    torch.Tensor.T.__get__: _flip,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__: _flip,  # type: ignore[attr-defined]
    torch.transpose: _transpose,
    torch.Tensor.transpose: _transpose,
    torch.Tensor.data.__get__: _same,  # type: ignore[attr-defined]
    torch.Tensor.contiguous: _same,
    torch.Tensor.detach: _same,
}

_READS_NO_VALUES = frozenset(
    {
        *("__get__", "__len__", "__repr__", "data_ptr", "dim", "element_size", "is_complex", "is_floating_point"),
        *("ndimension", "numel", "size"),
    }
)


def uses_rows(func: Any, args: Sequence[Any]) -> bool:
    """Whether a function of torch uses a weight row by row or expert by expert, so that it is not dequantized whole."""
    if func is torch.Tensor.__getitem__:
        return isinstance(args[1], int) or (isinstance(args[1], torch.Tensor) and args[1].dim() == 0)
    return func in _KNOWN or reads_no_values(func)


def reads_no_values(func: Any) -> bool:
    """Whether a function of torch reads only a tensor's shape, dtype and the like. `__get__` reads an attribute."""
    return getattr(func, "__name__", str(func)) in _READS_NO_VALUES
