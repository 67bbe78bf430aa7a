"""What oneDNN and torch keep for each number of tokens is bounded, which only a process of its own can show."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from hermes_async.memory.kernel_caches import CAPACITY

# Each number of tokens takes a kernel of its own. In the second turn each is the one that was used longest ago.
PROGRAM = f"""
{{imports}}
import sys
import torch
weight = torch.ones(64, 64, dtype=torch.bfloat16)
with torch.inference_mode():
    for turn in range(2):
        print("turn", turn, flush=True)
        for num_tokens in range(2, {2 * CAPACITY + 2}):
            torch.nn.functional.linear(torch.ones(num_tokens, 64, dtype=torch.bfloat16), weight)
"""


def kernels_made_again(imports: str, **variables: str) -> int:
    """In the second turn; none where the caches hold as many as the first turn made."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
    environment |= {"ONEDNN_VERBOSE": "profile_create", **variables}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(imports=imports)],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    first, second = done.stdout.split("turn 1")
    if "create:cache_miss" not in first:
        pytest.skip("torch does not multiply bf16 with oneDNN here")
    return second.count("create:cache_miss")


@pytest.mark.parametrize("imports", ["import hermes_async", "import torch\nimport hermes_async"])
def test_the_caches_are_bounded(imports: str) -> None:
    assert kernels_made_again(imports) == 2 * CAPACITY


def test_the_libraries_own_bounds_are_larger() -> None:
    assert kernels_made_again("") == 0


def test_a_user_s_own_bounds_stand() -> None:
    own = {"LRU_CACHE_CAPACITY": "100", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "100"}
    assert kernels_made_again("import hermes_async", **own) == 0
