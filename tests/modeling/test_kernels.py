"""The switch between oneDNN's kernels and torch's own is the process's, and everybody who turns it turns it back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hermes_async.modeling.kernels import without_one_dnn


def is_on() -> bool:
    return bool(torch._C._get_mkldnn_enabled())


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = is_on()
    yield
    torch._C._set_mkldnn_enabled(before)


@pytest.mark.parametrize("before", [True, False])
def test_it_comes_back_as_it_was(before: bool) -> None:
    torch._C._set_mkldnn_enabled(before)
    with pytest.raises(ZeroDivisionError), without_one_dnn():
        assert not is_on()
        _ = 1 / 0
    assert is_on() is before


def test_it_stays_off_until_the_last_has_turned_it_back() -> None:
    torch._C._set_mkldnn_enabled(True)
    first, second = without_one_dnn(), without_one_dnn()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # as another thread's sweep ends, which began earlier
    assert not is_on()
    second.__exit__(None, None, None)
    assert is_on()
