"""Compiles loops over the rows of a matrix with Numba: a copy of the same loop for each kind of numbers.

A loop refers to names that it does not define, such as `num_lines`. Each copy has values of its own for these.
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from types import FunctionType
from typing import Any

import numba
from llvmlite import binding

from hermes_async.quantization import lane_sums

inlined = numba.njit(forceinline=True)
"""Makes a function a part of the compiled functions that call it."""


def names_of_lines(count: int) -> dict[str, Any]:
    """The names of a loop that multiplies so many lines at once."""
    return {"num_lines": count, "no_sums": lane_sums.empty_sums(count)}


def inlined_copy(function: Callable[..., Any], names: Mapping[str, Any]) -> Any:
    """A copy of a function, in which `names` have values of their own, for the compiled functions that call it."""
    return inlined(copy_of(function, names))


def copy_of(function: Any, names: Mapping[str, Any]) -> FunctionType:
    """A copy of a function, in which `names` have values of their own."""
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__, {**vars(sys.modules[function.__module__]), **names})
    own.__name__ = own.__qualname__ = function.__name__
    own.__module__ = function.__module__
    return own


def machine_code_of(
    function: Callable[..., None], signature: str, machine: Any, *, symbol: str, known: Collection[str]
) -> bytes:
    """The machine code of a function for a `TargetMachine` of LLVM, as an object file.

    Args:
        symbol: Its name in the file.
        known: Functions that it may name, which whoever loads it has.

    Raises:
        ValueError: It calls others, of Numba's own, such as those that make and reshape arrays.
    """
    options: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    dispatcher: Any = numba.njit(signature, **options)(function)
    (types,) = dispatcher.signatures
    module = binding.parse_assembly(dispatcher.inspect_llvm(types))
    called = {one.name for one in module.functions if one.is_declaration and not one.name.startswith("llvm.")}
    if called - {*known}:
        raise ValueError(f"{function.__name__} calls {', '.join(sorted(called - {*known}))}")
    module.get_function(dispatcher.overloads[types].fndesc.llvm_func_name).name = symbol
    code: bytes = machine.emit_object(module)
    return code
