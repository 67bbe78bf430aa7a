"""Servers that the tests of a module share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.server.running import RunningServer, running_server


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A server without a key. At the end of a module, nothing of its requests may be left."""
    with running_server() as running:
        yield running
        running.check_nothing_is_left()
