"""The threads on which torch's kernels compute: each thread that calls them gets some of its own.

torch's kernels use OpenMP. With GNU's library, the kernel threads of a thread spin between two kernels, so that the
next one starts within microseconds. But if there are more of them in the process than processors, all of them sleep
after each kernel, and waking them takes longer than a small kernel does: 100 instead of 10 microseconds on a virtual
machine. Threads that only wait count too. So a thread that will not compute soon ends its kernel threads.

Source: `omp_pause_resource_all`, OpenMP 5.0, section 3.2.44; libgomp's manual, section "GOMP_SPINCOUNT".
"""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from functools import cache
from pathlib import Path

_SOFT_PAUSE = 1  # `omp_pause_soft`: settings stay as they are
_MAPS = Path("/proc/self/maps")


def end_kernel_threads() -> None:
    """Ends the kernel threads of the calling thread; its next kernel starts new ones, in some 200 microseconds.

    Does nothing, within some microseconds, if there are none, or if OpenMP is not GNU's. The calling thread must not be
    within a kernel.
    """
    if "torch._C" in sys.modules:  # which loads OpenMP; torch itself may still be importing it
        for library in openmp_libraries():
            library.omp_pause_resource_all(_SOFT_PAUSE)


@cache
def openmp_libraries(maps: Path = _MAPS) -> tuple[ctypes.CDLL, ...]:
    """GNU's OpenMP libraries in this process. torch must have loaded its own.

    Args:
        maps: The system's list of what is mapped into the process's memory.
    """
    try:
        lines = maps.read_text().splitlines()
    except OSError:  # not Linux
        return ()
    mappings = (line.split(maxsplit=5) for line in lines)
    paths = {Path(fields[5]) for fields in mappings if len(fields) == 6 and "x" in fields[1]}
    libraries = []
    for path in sorted(path for path in paths if path.name.startswith("libgomp")):
        with suppress(OSError):  # its file was replaced or removed since it was loaded
            libraries.append(ctypes.CDLL(os.fspath(path)))
    return tuple(library for library in libraries if hasattr(library, "omp_pause_resource_all"))
