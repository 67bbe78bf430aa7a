"""What a benchmark makes is undone, however it ends."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.folders import temporary_folder

PROGRAM = """
import sys, threading
from pathlib import Path
from benchmarks.folders import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "weights").write_bytes(bytes(10))
    print("made", flush=True)
    threading.Event().wait(60)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_a_folder_is_deleted_after_a_signal(number: signal.Signals, code: int, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, tmp_path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "made\n"
        assert len(list(tmp_path.iterdir())) == 1
        process.send_signal(number)
    assert process.returncode == code
    assert not list(tmp_path.iterdir())


def test_a_handler_of_before_is_back_at_the_end(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with temporary_folder(tmp_path) as folder:
        assert folder.parent == tmp_path
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    assert not folder.exists()
