"""Runs commands in processes that need not import everything again: a JSON array of arguments a line.

Each command's process writes to the two files that come first in the array. Its exit code is printed.
"""

from __future__ import annotations

import json
import os
import sys

from hermes_async.cli import main
from hermes_async.engine.lifetime import import_torch


def next_command() -> list[str] | None:
    """In a process of its own, its arguments; None in this one, when there is nothing more."""
    for line in sys.stdin:
        stdout, stderr, *args = json.loads(line)
        process = os.fork()
        if not process:
            for stream, file in ((1, stdout), (2, stderr)):
                os.dup2(os.open(file, os.O_WRONLY), stream)
            return args
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)
    return None


import_torch()
args = next_command()
if args is not None:
    sys.argv = ["hermes-async", *args]
    main()
