"""How bfloat16 weights are multiplied is decided by the medians of a short measurement."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from hermes_async.engine import kernel_choice
from hermes_async.engine.kernel_choice import chosen_products, compiler_pays, measured_gains, measured_tiled_gains
from hermes_async.planning.profile import ProductsProfile
from hermes_async.quantization.bfloat16_products import Bfloat16Products


@pytest.mark.parametrize(
    ("gains", "expected"),
    [
        ({1: 1.5, 16: 1.2, 64: 2.5, 256: 2.8}, Bfloat16Products(1.5, 16, 2.8, True)),
        ({1: 0.5, 16: 1.05, 64: 2.5, 256: 2.0}, Bfloat16Products(0.0, 64, 2.5, True)),
        ({1: 1.05, 16: 3.0, 64: 0.9, 256: 2.0}, Bfloat16Products(0.0, 256, 2.0, True)),
        ({1: 2.0, 16: 3.0, 64: 3.0, 256: 0.5}, Bfloat16Products(2.0, 0, 0.0, True)),
        ({}, Bfloat16Products(scales_inputs=True)),
    ],
)
def test_what_is_faster_is_used(gains: dict[int, float], expected: Bfloat16Products) -> None:
    assert chosen_products(ProductsProfile(created_at=0.0, gains=gains, tiled_gains={})) == expected


@pytest.mark.parametrize(
    ("tiled_gains", "expected"),
    [
        ({2: 1.0, 4: 2.0, 16: 3.0, 64: 2.4, 256: 2.8}, range(4, 257)),
        ({2: 1.2, 4: 2.0, 16: 3.0, 64: 2.4, 256: 2.6}, range(2, 65)),  # in float32 it is 2.7 times as fast
        ({2: 0.9, 4: 2.0, 16: 1.0, 64: 2.4, 256: 2.8}, range(4, 5)),
        ({2: 0.9, 4: 1.05, 16: 1.2, 64: 1.9, 256: 2.0}, range(0)),
        ({}, range(0)),
    ],
)
def test_compiled_functions_have_the_tokens_for_which_they_are_the_fastest(
    tiled_gains: dict[int, float], expected: range
) -> None:
    gains = {1: 1.5, 16: 1.3, 64: 2.0, 256: 2.7}
    products = chosen_products(ProductsProfile(created_at=0.0, gains=gains, tiled_gains=tiled_gains))
    assert products.tiled_tokens == expected
    assert products.widened_tokens == 16


@pytest.mark.parametrize(
    ("nbytes", "room", "has", "pays"),
    [(1 << 30, 2 << 30, True, True), (1 << 30, 1 << 30, True, False), (1 << 30, 2 << 30, False, False)],
)
def test_the_compiler_pays_where_all_weights_stay(
    monkeypatch: pytest.MonkeyPatch, nbytes: int, room: int, has: bool, pays: bool
) -> None:
    monkeypatch.setattr(kernel_choice, "has_compiler", lambda: has)
    assert compiler_pays(nbytes, room) is pays


@pytest.mark.parametrize(("linear_s", "other_s", "gain"), [(3.0, 2.0, 1.5), (2.0, 3.0, 2 / 3)])
def test_gains_are_of_the_medians(
    monkeypatch: pytest.MonkeyPatch, linear_s: float, other_s: float, gain: float
) -> None:
    now, slowed = 0.0, itertools.cycle((7.0, 1.0, 1.0, 1.0, 1.0))  # by other programs

    def taking(seconds: float) -> Any:
        def multiply(*args: Any) -> torch.Tensor:
            nonlocal now
            now += seconds * next(slowed)
            return torch.zeros(())

        return multiply

    monkeypatch.setattr(kernel_choice.F, "linear", taking(linear_s))
    monkeypatch.setattr(kernel_choice.Bfloat16Products, "linear", taking(other_s))
    monkeypatch.setattr(kernel_choice.time, "perf_counter", lambda: now)
    assert measured_gains() == pytest.approx(dict.fromkeys((1, 16, 32, 64, 256), gain))


def test_all_ways_are_really_measured() -> None:
    gains, tiled_gains = measured_gains(), measured_tiled_gains()
    assert list(gains) == [1, 16, 32, 64, 256]
    assert list(tiled_gains) == [2, 4, 8, 16, 32, 64, 256]
    assert all(gain > 0 for gain in (*gains.values(), *tiled_gains.values()))
