"""Machine code is kept on disk, used only if this user has written it as a whole, and compiled again otherwise."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hermes_async.quantization import compiling, machine_code
from hermes_async.quantization.machine_code import Loop, code_file, compiled, is_compiled

code_of_loop: list[bytes] = []
LOOP = Loop("tile_loops", ("pack", "uint16"), "void(uint16[:, ::1], float32[::1])")


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The signatures of what was compiled. Nothing is kept from before; `LOOP` is really compiled once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    signatures: list[str] = []
    compile_loop = compiling.machine_code_of

    def observed(function: Callable[..., None], signature: str, *args: Any, **kwargs: Any) -> bytes:
        signatures.append(signature)
        if signature != LOOP.signature:
            return compile_loop(function, signature, *args, **kwargs)
        if not code_of_loop:
            code_of_loop.append(compile_loop(function, signature, *args, **kwargs))
        return code_of_loop[0]

    monkeypatch.setattr(compiling, "machine_code_of", observed)
    return signatures


def again(loop: Loop = LOOP) -> None:
    """Gets and calls the function as a new process does."""
    compiled.cache_clear()
    packed = np.empty(8 * 32, np.float32)
    compiled(loop)((np.full((8, 32), 0x3F80, np.uint16), packed))
    assert (packed == 1).all()


def test_a_loop_is_compiled_once(compilations: list[str]) -> None:
    assert not is_compiled(LOOP)
    for _ in range(3):
        again()
    assert is_compiled(LOOP)
    assert compilations == [LOOP.signature]
    status = code_file(LOOP).stat()
    assert status.st_mode & 0o777 == 0o600


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "of others", "a link", "a pipe", "cannot be read"])
def test_a_file_that_is_not_whole_or_not_ours_is_not_used(
    compilations: list[str],
    damage: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    again()
    file = code_file(LOOP)
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "of others":
        file.chmod(0o620)
    elif damage == "a link":
        (tmp_path / "elsewhere").write_bytes(content)
        file.unlink()
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "a pipe":
        file.unlink()
        os.mkfifo(file)
    else:

        def fails(*args: Any) -> int:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(machine_code.os, "open", fails)
    caplog.set_level(logging.WARNING)
    compiled.cache_clear()
    if damage == "cannot be read":
        assert not is_compiled(LOOP)
    else:
        again()
        assert len(compilations) == 2
        assert is_compiled(LOOP)
    assert "the machine code in" in caplog.text


def test_what_cannot_be_kept_is_compiled_in_each_process(
    compilations: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "hermes-async").write_text("a file where the folder should be")
    for _ in range(2):
        again()
    assert len(compilations) == 2
    assert "machine code cannot be kept" in caplog.text


def test_other_keys_signatures_and_processors_have_other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    loops = (LOOP, Loop(LOOP.module, ("pack", "float32"), LOOP.signature), Loop(LOOP.module, LOOP.key, "void(int64)"))
    files = {code_file(loop) for loop in (*loops, Loop("gguf_loops", LOOP.key, LOOP.signature))}
    monkeypatch.setattr(machine_code, "processor", lambda: ("haswell", "+avx2"))
    files.add(code_file(LOOP))
    assert len(files) == 5


def test_another_process_needs_no_compiler(compilations: list[str]) -> None:
    again()
    script = f"""
import sys
import numpy as np
from hermes_async.quantization.machine_code import Loop, compiled
packed = np.empty(8 * 32, np.float32)
compiled({LOOP!r})((np.full((8, 32), 0x3F80, np.uint16), packed))
print((packed == 1).all(), "numba" in sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["True", "False"]


def test_a_loop_that_makes_arrays_is_refused() -> None:
    def loop(array):
        array[0] = np.empty(int(array[0]), np.float32)[0]

    with pytest.raises(ValueError, match=r"loop calls .*NRT_MemInfo_alloc"):
        compiling.machine_code_of(loop, "void(float32[::1])", None, symbol="x", known={"NRT_MemInfo_call_dtor"})


def test_a_function_that_fails_says_so(compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def divides(array, number):
        array[0] = 1 // number

    monkeypatch.setattr("hermes_async.quantization.tile_loops.loop_of", lambda *key: divides)
    function = compiled(Loop("tile_loops", ("test",), "void(int64[::1], int64)"))
    array = np.zeros(1, np.int64)
    function((array,), (1,))
    assert array[0] == 1
    with pytest.raises(RuntimeError, match="failed"):
        function((array,), (0,))
    compiled.cache_clear()
