"""A tiny model on disk that tests may damage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.faults.hanging import Hanging
from tests.models import BareModel, TinyMixture


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> BareModel:
    return BareModel(tmp_path_factory.mktemp("bare"))


@pytest.fixture
def tiny_model(bare_model: BareModel) -> Iterator[BareModel]:
    """Whole again afterwards, whatever a test does to its shard."""
    data = bare_model.shard.read_bytes()
    yield bare_model
    if not bare_model.shard.exists() or bare_model.shard.read_bytes() != data:
        bare_model.shard.write_bytes(data)


@pytest.fixture(scope="session")
def tiny_mixture(tmp_path_factory: pytest.TempPathFactory) -> TinyMixture:
    return TinyMixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture
def hanging(disk: Any) -> Iterator[Hanging]:
    """Nothing hangs at first, and nothing after the test."""
    hanging = Hanging(disk)
    yield hanging
    hanging.let_go.set()
