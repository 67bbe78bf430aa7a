"""The product of a few lines of inputs with rows, as a compiled function that releases the interpreter's lock.

Functions of torch share each product among OpenMP's threads, which is of no use to a thread that computes rows of its
own. Numba, which compiles this one when the module is imported, is a part of the extra `gguf`.
"""

# mypy: disable-error-code="import-untyped, untyped-decorator"

from __future__ import annotations

import numba
import numpy as np
from numpy.typing import NDArray

_MAY_SUM_IN_ANY_ORDER = {"reassoc", "contract", "nsz"}
"""What lets the compiler sum several numbers at a time: flags of LLVM's language reference, "Fast-Math Flags"."""


@numba.njit(
    "void(float32[:, ::1], float32[:, ::1], float32[:, ::1], int64)", nogil=True, fastmath=_MAY_SUM_IN_ANY_ORDER
)
def multiply(rows: NDArray[np.float32], lines: NDArray[np.float32], out: NDArray[np.float32], first: int) -> None:
    """Writes the products of `rows` [n, columns] and `lines` [m, columns] to `out` [m, all rows], from `first` on."""
    for row in range(rows.shape[0]):
        for line in range(lines.shape[0]):
            total = np.float32(0)
            for column in range(rows.shape[1]):
                total += rows[row, column] * lines[line, column]
            out[line, first + row] = total
