"""How late the event loop is: seen when something blocks it, and measured only while there is work."""

from __future__ import annotations

import time

import anyio
import pytest

from hermes_async.serving.loop_lag import LoopLag
from tests.engines import both_loops, until

pytestmark = pytest.mark.anyio
anyio_backend = both_loops()


async def test_what_blocks_the_loop_is_seen() -> None:
    lag = LoopLag()
    assert lag.milliseconds() == {"p50": 0.0, "p99": 0.0, "max": 0.0}
    lag.begin()
    lag.begin()  # as before each sweep
    time.sleep(0.3)  # noqa: ASYNC251 - it blocks the loop on purpose
    await until(lambda: lag.milliseconds()["max"] > 0)
    assert lag.milliseconds()["max"] >= 200  # the call was due after 50 ms
    lag.pause()
    measured = lag.milliseconds()
    assert 0 <= measured["p50"] <= measured["p99"] <= measured["max"]


async def test_nothing_is_measured_without_work() -> None:
    lag = LoopLag()
    lag.begin()
    lag.pause()
    lag.pause()
    time.sleep(0.1)  # noqa: ASYNC251 - it blocks the loop on purpose
    await anyio.sleep(0.1)
    assert lag.milliseconds()["max"] == 0.0
