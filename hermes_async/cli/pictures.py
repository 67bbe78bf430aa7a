"""Pictures with matplotlib, which comes with the extra `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hermes_async.errors import ConfigError


def pyplot() -> Any:
    """matplotlib's, without a screen.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'hermes_async[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plots

    return plots


def save(figure: Any, output: Path) -> None:
    """Writes a picture in the format of the file's name, and closes it.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        figure.savefig(output, dpi=130)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{output} cannot be written: {error}") from error
    finally:
        pyplot().close(figure)
