"""Compiled functions: the machine code of loops, kept on disk, so that the compiler is needed once on each machine.

Numba compiles the loops of the modules `*_loops` (`compiling`). Importing it takes a second, its first function another
one, and both 125 MiB. What it has compiled is kept in the user's cache. LLVM's loader alone reads it, in a tenth of
a second.

Source: llvmlite's documentation, "Execution engine".
"""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import ctypes
import json
import logging
import os
import re
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from hermes_async.storage.own_file import NewFile

logger = logging.getLogger(__name__)

BoundFunction: TypeAlias = Callable[[Sequence[NDArray[Any]], Sequence[int]], None]
"""Takes the first arrays of a function, and its numbers."""

_SYMBOL = "hermes_kernel"
_FREES = "NRT_MemInfo_call_dtor"  # Numba's function that frees an array
_MAX_BYTES = 1 << 22  # of a file; they have some dozen kilobytes
_SHARED_SOURCES = ("lanes", "lane_sums", "kernel_sizes", "tile_kernels", "compiling", "machine_code")
_ARRAY = re.compile(r"\[([:, ]*1)\]")
_NUMBER = re.compile(r"\bint64(?!\[)")
_LOCK = threading.Lock()  # while a function is loaded or compiled
_loaded: list[tuple[Any, bytes]] = []  # what holds the code that functions run


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop to compile.

    Attributes:
        module: Of this package, without its name. Its `loop_of` takes the key, and returns the function to compile.
        key: What the function depends on.
        signature: As Numba takes it: arrays, and then numbers of the type int64.
    """

    module: str
    key: tuple[str | int, ...]
    signature: str


class CompiledFunction:
    """A compiled function of arrays, contiguous and of the types of its signature, and of whole numbers.

    It releases the interpreter's lock, and several threads may call it at once. It checks neither types nor indices.

    Source: Numba Developer Manual, "Notes on Numba's calling convention" and "Array data model": an array is its owner
    and its parent, which there are none of, the numbers of elements and of bytes of one, the address, the shape, and
    the strides. The result is a status.
    """

    def __init__(self, address: int, signature: str) -> None:
        types: list[Any] = [ctypes.c_void_p, ctypes.c_void_p]
        for dimensions in _ARRAY.findall(signature):
            types += [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64]
            types += [ctypes.c_int64] * (2 * dimensions.count(":") - 2)
        types += [ctypes.c_int64] * len(_NUMBER.findall(signature))
        self._signature = signature
        self._function = ctypes.CFUNCTYPE(ctypes.c_int32, *types)(address)
        self._results = ctypes.byref(ctypes.c_void_p()), ctypes.byref(ctypes.c_void_p())

    def __call__(self, arrays: Sequence[NDArray[Any]], numbers: Sequence[int] = ()) -> None:
        """Calls it.

        Raises:
            RuntimeError: It failed, such as by a division by zero.
        """
        self.bound(arrays)((), numbers)

    def bound(self, arrays: Sequence[NDArray[Any]]) -> BoundFunction:
        """The function with its last arrays. It takes the arrays before them, and the numbers.

        For many calls with the same arrays: converting an array takes two microseconds.
        """
        function, results, kept = self._function, self._results, tuple(arrays)
        last = tuple(map(_converted, chain.from_iterable(map(_of_array, kept))))

        def call(first: Sequence[NDArray[Any]], numbers: Sequence[int], arrays: Any = kept) -> None:
            if function(*results, *chain.from_iterable(map(_of_array, first)), *last, *numbers):
                raise RuntimeError(f"a compiled function of the signature {self._signature} failed")

        return call


def _converted(value: int | None) -> Any:
    """The argument, as the function takes it. Converting it in each call takes longer."""
    return ctypes.c_void_p() if value is None else ctypes.c_int64(value)


def _of_array(array: NDArray[Any]) -> tuple[Any, ...]:
    return None, None, array.size, array.itemsize, array.ctypes.data, *array.shape, *array.strides


@cache
def compiled(loop: Loop) -> CompiledFunction:
    """The compiled function of a loop.

    Loads its machine code; compiles it, within three seconds, if it is new on this machine. The loop must make no
    arrays.
    """
    with _LOCK:
        file = code_file(loop)
        code = _read(file)
        if code is None:
            from hermes_async.quantization.compiling import machine_code_of  # Numba, which is slow to import

            function = import_module(f"hermes_async.quantization.{loop.module}").loop_of(*loop.key)
            code = machine_code_of(function, loop.signature, _target_machine(), symbol=_SYMBOL, known={_FREES})
            _write(file, code)
        return CompiledFunction(_address(code), loop.signature)


def is_compiled(loop: Loop) -> bool:
    """Whether `compiled` needs no compiler."""
    return _read(code_file(loop)) is not None


def code_file(loop: Loop) -> Path:
    """The file of a loop's machine code. Its name depends on all that changes the code."""
    sources = sha256()
    for name in (loop.module, *_SHARED_SOURCES):
        found = find_spec(f"hermes_async.quantization.{name}")
        assert found is not None
        assert found.origin is not None
        sources.update(Path(found.origin).read_bytes())
    versions = version("numba"), version("llvmlite")
    key = json.dumps([loop.module, loop.key, loop.signature, sources.hexdigest(), versions, processor()])
    cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache_folder / "hermes-async" / "kernels" / f"{sha256(key.encode()).hexdigest()[:32]}.o"


@cache
def processor() -> tuple[str, str]:
    """LLVM's name of this processor, and what it can do."""
    from llvmlite import binding  # takes a tenth of a second

    return str(binding.get_host_cpu_name()), str(binding.get_host_cpu_features().flatten())


def has_wide_vectors() -> bool:
    """Whether the processor has 32 registers of sixteen numbers in float32."""
    return "+avx512f" in processor()[1].split(",")


def _target_machine() -> Any:
    """LLVM's description of this processor, for machine code in memory."""
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name, features = processor()
    target = binding.Target.from_triple(binding.get_process_triple())
    return target.create_target_machine(cpu=name, features=features, opt=3, reloc="default", codemodel="jitdefault")


# --- the file: a digest, and the code behind it ---


def _read(file: Path) -> bytes | None:
    """The code in a file; None if it has none that this user has written as a whole."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0))
        with os.fdopen(descriptor, "rb") as opened:
            status = os.fstat(descriptor)
            others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or others_write:
                logger.warning("the machine code in %s is not used: another user may have written it", file)
                return None
            content = opened.read(_MAX_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("the machine code in %s cannot be read: %s", file, error.strerror or error)
        return None
    digest, code = content[:32], content[32:]
    if sha256(code).digest() == digest:
        return code
    logger.warning("the machine code in %s is damaged and is compiled again", file)
    return None


def _write(file: Path, code: bytes) -> None:
    """A failure is logged, and the next process compiles again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with NewFile(file) as new:
            new.file.write(sha256(code).digest() + code)
    except OSError as error:
        logger.warning("machine code cannot be kept in %s: %s", file.parent, error.strerror or error)


# --- loading ---


def _address(code: bytes) -> int:
    from llvmlite import binding

    machine, empty = _target_machine(), binding.parse_assembly("")
    # By these, LLVM knows what the system's object files call a function.
    empty.triple, empty.data_layout = machine.triple, str(machine.target_data)
    engine = binding.create_mcjit_compiler(empty, machine)
    # Code that is never reached names it: the loops make no arrays.
    binding.add_symbol(_FREES, ctypes.cast(_FREES_NOTHING, ctypes.c_void_p).value)
    engine.add_object_file(binding.object_file.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _loaded.append((engine, code))
    return int(engine.get_function_address(_SYMBOL))


_FREES_NOTHING = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: None)
