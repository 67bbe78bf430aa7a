"""Where a command's log lines go: to standard error, from a level on."""

from __future__ import annotations

import logging
import sys
from typing import Literal

Level = Literal["debug", "info", "warning", "error"]

_LIBRARY = "hermes_async"
_REQUESTS = "hermes_async.requests"
_SERVER = "uvicorn"


class _Handler(logging.Handler):
    """Writes to what is standard error now: a display of progress replaces it to stay below the lines."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


class _OneLine(logging.Formatter):
    """As the commands' own messages."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return f"hermes-async: {record.levelname.lower()}: {record.getMessage()}"


_handler = _Handler()


def use_level(level: Level | None) -> Level | None:
    """Prints log lines from this level on. None prints warnings, but not of requests, whose errors commands print."""
    if level is None:
        _handler.setFormatter(_OneLine())
    else:
        _handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in (_LIBRARY, _SERVER):
        logging.getLogger(name).addHandler(_handler)  # a second time does nothing
    logging.getLogger(_LIBRARY).setLevel("WARNING" if level is None else level.upper())
    logging.getLogger(_REQUESTS).setLevel("ERROR" if level is None else "NOTSET")
    logging.getLogger(_SERVER).setLevel("DEBUG" if level == "debug" else "WARNING")
    return level
