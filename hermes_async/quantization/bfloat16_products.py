"""Products with bfloat16 weights by other functions than `linear`, on processors where those are faster.

transformers calls `linear` for every number of tokens. Which function is the fastest depends on the processor and on
the number of tokens:

- One token: `mv`, torch's product of a matrix and a vector, takes half as long on some processors.
- Many tokens: a processor without bfloat16 instructions multiplies float32 numbers two to four times as fast. So blocks
  of the weight and of the inputs are converted to float32, and multiplied there.
- A few to some hundred tokens: compiled functions, which convert a weight where they multiply it, are twice as fast
  again. They need Numba.

All of these sum in float32 and round each result to bfloat16 once, but they add in another order. So results may differ
in the last bit of bfloat16. Weights in float32 and float16 are never multiplied so.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hermes_async.quantization.row_threads import ONE_THREAD, RowThreads
from hermes_async.quantization.tile_products import TiledInputs, can_tile, tile_bytes

_BLOCK = 1 << 20
"""Elements of a weight, and of results, that are in float32 at once."""
_SMALL_BLOCK = 1 << 19
"""The same with few lines, which are multiplied faster with what is in the processor's cache."""
_FEW_LINES = 64
_INPUTS = 1 << 22
"""Elements of inputs that are in float32 at once."""
_ITEMSIZE = torch.float32.itemsize


@dataclass(frozen=True, slots=True)
class Bfloat16Products:
    """Which functions multiply inputs with bfloat16 weights. By default, `linear` does.

    Attributes:
        vector_gain: How many times as fast as `linear` one token is with `mv`; 0 where `linear` multiplies it.
        widened_tokens: From so many tokens on, blocks are converted to float32; 0 where they never are.
        widened_gain: How many times as fast as `linear` that is, with many tokens.
        tiled_tokens: Numbers of tokens that compiled functions multiply; empty where none are.
        tiled_gain: How many times as fast as `linear` that is, at best.
        scales_inputs: Whether one token may be multiplied with quantized weights by `Encoding.scaled_product`.
    """

    vector_gain: float = 0.0
    widened_tokens: int = 0
    widened_gain: float = 0.0
    scales_inputs: bool = False
    tiled_tokens: range = range(0)
    tiled_gain: float = 0.0

    @property
    def is_linear(self) -> bool:
        """Whether `linear` multiplies all numbers of tokens with weights that are stored in bfloat16."""
        return not self.vector_gain and not self.widened_tokens and not self.tiled_tokens

    def explanation(self, *, scaled: bool) -> tuple[str, ...]:
        """Lines for a plan.

        Args:
            scaled: Whether the model has weights with a `scaled_product`.
        """
        lines = []
        if self.vector_gain:
            lines.append(f"one token: torch.mv is {self.vector_gain:.1f} times as fast as linear here")
        if self.tiled_tokens:
            lines.append(
                f"{self.tiled_tokens.start} to {self.tiled_tokens.stop - 1} tokens: compiled functions multiply with "
                f"bfloat16 weights, up to {self.tiled_gain:.1f} times as fast as linear here"
            )
        if self.widened_tokens:
            least = max(self.widened_tokens, self.tiled_tokens.stop)
            lines.append(
                f"{least} tokens and more: bfloat16 is multiplied in float32, a block of rows at a time, "
                f"{self.widened_gain:.1f} times as fast as linear here"
            )
        if self.scales_inputs and scaled:
            lines.append("one token: inputs are multiplied with the scales of quantized weights, which is faster")
        return tuple(f"{line}; it may round otherwise than kernels='transformers'" for line in lines)

    def converted(self, lines: torch.Tensor, threads: RowThreads) -> TiledInputs | WidenedInputs | None:
        """The inputs `lines` [n, columns] as they are multiplied with bfloat16 weights; None if `linear` does it.

        Args:
            threads: Divide the products of `TiledInputs`.
        """
        if lines.dtype != torch.bfloat16:
            return None
        if len(lines) in self.tiled_tokens and can_tile(lines):
            return TiledInputs(lines, threads)
        if self.widened_tokens and len(lines) >= self.widened_tokens:
            return WidenedInputs(lines)
        return None

    def linear(
        self,
        inputs: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        threads: RowThreads = ONE_THREAD,
    ) -> torch.Tensor:
        """`inputs` [..., columns] times a bfloat16 `weight` [rows, columns], plus `bias` [rows]: [..., rows]."""
        rows, columns = weight.shape
        if self.vector_gain and inputs.numel() == columns:
            vector = inputs.reshape(-1)
            # With `addmv` the sum and the bias are rounded together, as `linear` does.
            product = torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)
        else:
            lines = inputs.reshape(-1, columns)
            converted = self.converted(lines, threads) if weight.is_contiguous() else None
            if converted is None:
                return F.linear(inputs, weight, bias)
            product = torch.empty((lines.shape[0], rows), dtype=weight.dtype)
            converted.multiply(weight, bias, product)
        return product.view(*inputs.shape[:-1], rows)

    def scratch_bytes(self, num_tokens: int, shapes: Iterable[tuple[int, int]]) -> int:
        """The most memory that products of so many tokens with weights of these shapes [rows, columns] take."""
        most = 0
        for rows, columns in shapes:
            if self.widened_tokens and num_tokens >= self.widened_tokens:
                most = max(most, _scratch_bytes(num_tokens, rows, columns))
            if self.tiled_tokens and num_tokens >= self.tiled_tokens.start:
                most = max(most, tile_bytes(min(num_tokens, self.tiled_tokens.stop), columns) + rows * _ITEMSIZE)
        return most


LINEAR = Bfloat16Products()
"""`linear` multiplies everything."""


class WidenedInputs:
    """Inputs [n, columns] in bfloat16, to be multiplied with bfloat16 weights in float32.

    Blocks of the weights are converted to float32, and so are the inputs: once, or where they are too many, again for
    each weight.
    """

    def __init__(self, lines: torch.Tensor) -> None:
        self._lines = lines
        self._most_lines = _most_lines(*lines.shape)
        self._chunk = torch.empty((self._most_lines, lines.shape[1]))
        if self._most_lines == lines.shape[0]:
            self._chunk.copy_(lines)

    def multiply(
        self, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, first_column: int = 0
    ) -> None:
        """Writes the inputs times `weight` [rows, columns], plus `bias`, into `out`, from a column on.

        Args:
            bias: A number for each column of `out`. It is added before the results are rounded, as `linear` does.
            out: [n, at least as many columns as there are rows].
        """
        (num_lines, columns), num_rows = self._lines.shape, weight.shape[0]
        most_rows = _most_rows(self._most_lines, num_rows, columns)
        block = torch.empty((most_rows, columns))
        for first in range(0, num_lines, self._most_lines):
            last = min(num_lines, first + self._most_lines)
            inputs = self._chunk[: last - first]
            if self._most_lines < num_lines:
                inputs.copy_(self._lines[first:last])
            for start in range(0, num_rows, most_rows):
                stop = min(num_rows, start + most_rows)
                rows = block[: stop - start].copy_(weight[start:stop])
                written = slice(first_column + start, first_column + stop)
                bias_of_rows = None if bias is None else bias[written].float()
                out[first:last, written] = F.linear(inputs, rows, bias_of_rows)


def _most_lines(num_lines: int, columns: int) -> int:
    """Lines of the inputs that are in float32 at once."""
    return _evenly(num_lines, max(1, _INPUTS // columns))


def _most_rows(most_lines: int, num_rows: int, columns: int) -> int:
    """Rows of a weight that are in float32 at once."""
    block = _BLOCK if most_lines > _FEW_LINES else _SMALL_BLOCK
    return _evenly(num_rows, max(1, block // max(columns, most_lines)))


def _evenly(count: int, most: int) -> int:
    """The size of pieces of at most `most`: as few as possible, and none of them much smaller than the others."""
    return -(-count // max(1, -(-count // most)))


def _scratch_bytes(num_lines: int, num_rows: int, columns: int) -> int:
    """A bound that never shrinks with more lines. Even pieces may: a line more can make two of half the size."""
    most_lines, most_rows = min(num_lines, max(1, _INPUTS // columns)), min(num_rows, max(1, _BLOCK // columns))
    results = min(most_lines * most_rows, max(_BLOCK, most_lines))
    return (most_rows * columns + most_lines * columns + results + most_rows) * _ITEMSIZE
