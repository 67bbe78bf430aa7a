"""Bounds what oneDNN and torch keep on the side for each number of tokens that they have computed with.

Both read these variables when they first compute with oneDNN, so the package imports this module before all else. It
does not matter whether torch was imported before. A program that has computed with oneDNN before keeps the libraries'
own bounds of 1,024 kernels each, which can come to more than a gibibyte.
"""

from __future__ import annotations

import os

CAPACITY = 16
"""Kernels that each of the two caches keeps. A sweep uses a few: one for each shape of a layer's matrices."""

BESIDE_BUDGET_BYTES = 64 << 20
"""What an engine may take beside the process's baseline and its budget, whatever the model, the lengths and the budget.

The kernels in the caches took 35 MiB at the most, with matrices of 2 to 3,000 tokens; the rest is for stacks of threads
and pieces of the heap. `python -m benchmarks.memory` holds it.
"""

_VARIABLES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")

for _variable in _VARIABLES:
    os.environ.setdefault(_variable, str(CAPACITY))  # a user's own choice stands
