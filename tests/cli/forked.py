"""Commands and code in processes that need not import everything again: one that has done so forks for each of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from typing import IO, Any, Self

from hermes_async.cli import main
from hermes_async.engine.lifetime import import_torch

IMPORTED = ("hermes_async.engine.opening", "hermes_async.server", "transformers.models.llama.modeling_llama")
"""Modules that most commands import. No more is done before a fork: a child does not have the threads of its parent."""


class ForkedCommands:
    """The process that forks. It runs one command at a time, without the options that variables of here may set."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        with theirs:
            program = [sys.executable, "-m", "tests.cli.forked", str(theirs.fileno())]
            env = {name: value for name, value in os.environ.items() if not name.startswith("HERMES_ASYNC_")}
            self._process = subprocess.Popen(program, pass_fds=[theirs.fileno()], env=env)
        self._answers = self._socket.makefile("r")

    def start(
        self,
        *args: object,
        code: str = "",
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> ForkedCommand:
        """Starts a command in a session of its own.

        Args:
            code: Runs instead of a command, as `python -c` runs it; `args` are its arguments.
            stdin: A file descriptor, which is not closed; by default, there is no input.
            stdout: A file descriptor, or None for a pipe.
            stderr: As `stdout`.
            env: Environment variables in addition to those of this process.
        """
        command = ForkedCommand(self._answers)
        null = os.open(os.devnull, os.O_RDWR)
        files = [null if stdin is None else stdin]
        for name, file in (("stdout", stdout), ("stderr", stderr)):
            if file is None:
                reader, file = os.pipe()
                setattr(command, name, os.fdopen(reader, "rb"))
            files.append(file)
        message = json.dumps({"args": [str(arg) for arg in args], "code": code, "env": dict(env or {})}).encode()
        socket.send_fds(self._socket, [message], files)
        command.process_id = int(self._answers.readline())
        os.close(null)
        for file, given in zip(files[1:], (stdout, stderr), strict=True):
            if given is None:
                os.close(file)
        return command

    def close(self) -> None:
        """Ends the process that forks."""
        self._answers.close()
        self._socket.close()
        if self._process.wait(60):
            raise ChildProcessError(f"the process that forks ended with {self._process.returncode}")


class ForkedCommand:
    """The process of a command, with what tests use of `subprocess.Popen`. Leaving it kills what still runs."""

    process_id: int
    stdout: IO[bytes]
    stderr: IO[bytes]

    def __init__(self, answers: IO[str]) -> None:
        self._answers = answers
        self.returncode: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.send_signal(signal.SIGKILL)
        self.wait()
        for name in ("stdout", "stderr"):
            if hasattr(self, name):
                getattr(self, name).close()

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended, and nobody has asked for its code
                os.kill(self.process_id, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """The exit code, when it has ended."""
        if self.returncode is None:
            self.returncode = int(self._answers.readline())
        return self.returncode

    def communicate(self) -> tuple[bytes, bytes]:
        """All output to pipes, when it has ended. A pipe must hold what comes on standard error."""
        output = self.stdout.read(), self.stderr.read()
        self.wait()
        return output


# --- in the process that forks ---


def _next_command(connection: socket.socket) -> dict[str, Any] | None:
    """In a process of its own, its arguments and code; None in this one, when there is nothing more."""
    while True:
        message, files, _, _ = socket.recv_fds(connection, 1 << 16, 3)
        if not message:
            return None
        asked: dict[str, Any] = json.loads(message)
        process_id = os.fork()
        if not process_id:
            os.setsid()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            connection.close()
            sys.stdin = open(0, encoding="utf-8")  # noqa: SIM115 - as the interpreter makes them
            sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8")  # noqa: SIM115
            sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            os.environ.update(asked["env"])
            return asked
        for file in files:
            os.close(file)
        connection.sendall(b"%d\n" % process_id)
        code = os.waitstatus_to_exitcode(os.waitpid(process_id, 0)[1])
        connection.sendall(b"%d\n" % code)


if __name__ == "__main__":
    import_torch()
    for name in IMPORTED:
        import_module(name)
    command = _next_command(socket.socket(fileno=int(sys.argv[1])))
    if command is not None and command["code"]:
        sys.argv = ["-c", *command["args"]]
        exec(command["code"], {"__name__": "__main__"})
    elif command is not None:
        sys.argv = ["hermes-async", *command["args"]]
        main()
