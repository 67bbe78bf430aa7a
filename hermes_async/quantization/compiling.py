"""Compiles loops over the rows of a matrix with Numba: a copy of the same loop for each kind of numbers.

A loop refers to names that it does not define, such as `num_lines`. Each copy has values of its own for these.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import inspect
import sys
import zlib
from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType
from typing import Any

import numba

from hermes_async.quantization import lane_sums, lanes

LINES_AT_ONCE = 4
"""More than one line is multiplied with a row in groups of so many."""
COLUMNS_AT_ONCE = 4096
"""As many numbers of the lines are multiplied with one row after another: they stay in the processor's first cache."""

inlined = numba.njit(forceinline=True)
"""Makes a function a part of the compiled functions that call it."""


def names_of_lines(count: int) -> dict[str, Any]:
    """The names of a loop that multiplies so many lines at once."""
    return {"num_lines": count, "no_sums": lane_sums.empty_sums(count)}


def inlined_copy(function: Callable[..., Any], names: Mapping[str, Any]) -> Any:
    """A copy of a function, in which `names` have values of their own, for the compiled functions that call it."""
    return inlined(_copy(function, function.__name__, names))


def compiled_copy(function: Callable[..., None], signature: str, name: str, names: Mapping[str, Any]) -> Any:
    """A compiled copy of a function, in which `names` have values of their own. It releases the interpreter's lock.

    Numba keeps what it compiles on disk, by the function's module, and by its name with `name` behind it. Where no
    folder can be written to, it is compiled again in each process. Numba compiles a function again when its own file
    has changed, but not when another one has. So the name has a digest of `lanes` and `lane_sums` in it.
    """
    own = _copy(function, f"{function.__name__}_{name}_{_lanes_digest()}", names)
    try:
        return numba.njit(signature, cache=True, nogil=True)(own)
    except (RuntimeError, OSError):  # no folder for it, or no space
        return numba.njit(signature, nogil=True)(own)


@cache
def _lanes_digest() -> str:
    try:
        source = inspect.getsource(lanes) + inspect.getsource(lane_sums)
    except OSError:  # only bytecode is installed, for which Numba keeps nothing either
        source = ""
    return f"{zlib.crc32(source.encode()):08x}"


def _copy(function: Callable[..., Any], name: str, names: Mapping[str, Any]) -> FunctionType:
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__, {**vars(sys.modules[function.__module__]), **names})
    own.__name__ = own.__qualname__ = name
    own.__module__ = function.__module__
    return own
