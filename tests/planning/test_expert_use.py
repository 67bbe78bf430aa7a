"""How many experts are used and read: what is expected, against the cache itself with random routes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hermes_async.planning.expert_use import expected_use, measured_uses, uses_of_one_token
from tests.pipeload.test_expert_cache import Rig

NUM_LAYERS, NUM_EXPERTS, NUM_PER_TOKEN = 3, 32, 4


class Routes:
    """Experts of tokens, drawn without replacement. Each layer has other likely ones.

    Args:
        skew: The exponent of Zipf's law.
    """

    def __init__(self, skew: float) -> None:
        self._random = np.random.default_rng(0)
        popularity = np.log(1 / np.arange(1, NUM_EXPERTS + 1) ** skew)
        self._popularity = [self._random.permutation(popularity) for _ in range(NUM_LAYERS)]

    def token(self, layer: int) -> NDArray[np.int64]:
        noise = self._random.gumbel(size=NUM_EXPERTS)
        return np.argsort(-(self._popularity[layer] + noise))[:NUM_PER_TOKEN]

    def sweep(self, layer: int, num_tokens: int) -> list[int]:
        return sorted({int(idx) for _ in range(num_tokens) for idx in self.token(layer)})


def simulated(routes: Routes, num_tokens: int, share: float, num_sweeps: int = 80) -> tuple[float, float]:
    """The experts of a layer that a sweep uses, and those of them that are read, by the cache itself."""
    rig = Rig([[1] * NUM_EXPERTS] * NUM_LAYERS, slots=round(share * NUM_LAYERS * NUM_EXPERTS))
    used = 0
    for number in range(2 * num_sweeps):
        for layer in range(NUM_LAYERS):
            chosen = routes.sweep(layer, num_tokens)
            rig.visit(layer, chosen)
            used += len(chosen) if number >= num_sweeps else 0
        rig.end_sweep()
        if number == num_sweeps - 1:
            before = len(rig.loads)
    return used / num_sweeps / NUM_LAYERS, (len(rig.loads) - before) / num_sweeps / NUM_LAYERS


@pytest.mark.parametrize("num_tokens", [1, 4])
@pytest.mark.parametrize(("skew", "share"), [(0.0, 0.1), (0.0, 0.6), (0.7, 0.3), (1.2, 0.1), (1.2, 0.6)])
def test_what_is_expected_of_measured_routes_is_what_the_cache_does(skew: float, share: float, num_tokens: int) -> None:
    routes = Routes(skew)
    layers = [[routes.sweep(layer, 1) for _ in range(64)] for layer in range(NUM_LAYERS)]
    expected = expected_use(measured_uses(layers, NUM_EXPERTS), num_tokens, share * NUM_EXPERTS)
    num_used, num_read = simulated(routes, num_tokens, share)
    assert expected.num_used == pytest.approx(num_used, rel=0.1)
    assert expected.num_read == pytest.approx(num_read, rel=0.2)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_without_a_measurement_all_experts_are_as_likely(share: float) -> None:
    uses = uses_of_one_token(NUM_EXPERTS, NUM_PER_TOKEN)
    expected = expected_use(uses, 2, share * NUM_EXPERTS)
    assert expected.num_hits == pytest.approx(share * expected.num_used, rel=0.05)
    num_used, num_read = simulated(Routes(0.0), 2, share)
    assert (expected.num_used, expected.num_read) == pytest.approx((num_used, num_read), rel=0.1)
    assert uses_of_one_token(NUM_EXPERTS, NUM_PER_TOKEN, (1.0, 1.0)) == uses  # measured with other layers
    assert uses_of_one_token(2, 1, (0.75, 0.25)) == (0.75, 0.25)
    assert expected_use(uses_of_one_token(8, 0), 1, 2.0).num_used == 8  # nobody says how many there are


def test_if_nearly_all_are_used_the_others_are_read_with_them() -> None:
    uses = uses_of_one_token(NUM_EXPERTS, NUM_PER_TOKEN)
    few, many = expected_use(uses, 16, 8.0), expected_use(uses, 20, 8.0)
    assert not few.is_nearly_all and few.num_used < 0.9 * NUM_EXPERTS
    assert few.num_read == pytest.approx(few.num_used * 0.75)
    assert many.is_nearly_all and many.num_read == NUM_EXPERTS - 8


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=20).map(lambda uses: tuple(sorted(uses, reverse=True))),
    st.integers(1, 100),
    st.floats(0, 20),
    st.floats(0, 20),
)
def test_more_tokens_use_more_and_a_larger_cache_reads_less(
    uses: tuple[float, ...], num_tokens: int, num_cached: float, more: float
) -> None:
    one, other = (expected_use(uses, num_tokens + count, num_cached) for count in (0, 1))
    assert 0 <= one.num_hits <= one.num_used <= other.num_used <= len(uses) + 1e-9
    assert expected_use(uses, num_tokens, num_cached + more).num_read <= one.num_read + 1e-9
