"""Saves pictures made with matplotlib, which the extra `bench` installs."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

from hermes_async.errors import ConfigError
from hermes_async.storage.own_file import NewFile, check_own_file, own_file_errors

_MADE_BY = "hermes-async picture"
_METADATA = {"png": "Software", "svg": "Creator", "pdf": "Creator", "ps": "Creator", "eps": "Creator"}


def pyplot() -> Any:
    """matplotlib's `pyplot`, without a screen.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError("pictures need matplotlib: pip install 'hermes_async[bench]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plots

    return plots


def save(figure: Any, output: Path) -> None:
    """Saves a picture in the format of the file's name, and closes it. Overwrites only pictures of this package.

    Raises:
        ConfigError: The picture cannot be written.
    """
    suffix = output.suffix.removeprefix(".").lower()
    metadata = {_METADATA[suffix]: _MADE_BY} if suffix in _METADATA else None
    drawn = BytesIO()
    try:
        figure.savefig(drawn, dpi=130, format=suffix or "png", metadata=metadata)
        check_own_file(output, lambda content: _MADE_BY.encode() in content, "picture")
        with own_file_errors(output, "picture"), NewFile(output) as new:
            new.file.write(drawn.getbuffer())
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(f"{output} cannot be written: {error}") from error
    finally:
        pyplot().close(figure)
