"""Options that several commands share."""

from __future__ import annotations

import pytest

from hermes_async import ConfigError
from hermes_async.cli import options


@pytest.mark.parametrize(("given", "expected"), [("auto", "auto"), ("on", True), ("off", False)])
def test_memory_is_locked_on_off_or_as_the_system_allows(given: str, expected: object) -> None:
    assert options.engine_config(None, None, lock_memory=given).lock_memory == expected


def test_another_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="--lock-memory must be on, off or auto, not 'yes'"):
        options.engine_config(None, None, lock_memory="yes")
