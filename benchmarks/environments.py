"""Installs the libraries that benchmarks compare with, each in an environment of its own, with its versions pinned."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaConfig

from benchmarks.gguf_files import gguf_file

CACHE = Path("~/.cache/hermes-async").expanduser()
"""Where environments are made, unless a benchmark is told otherwise."""

ROOT = Path(__file__).parents[1]

LLAMA_CPP = "llama-cpp-python==0.3.36"
_NO_MATRIX_INSTRUCTIONS = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


class InstallError(SystemExit):
    """A library cannot be installed, or does not run on this machine."""


@dataclass(frozen=True)
class Environment:
    """A library, and what is installed with it.

    Attributes:
        requirements: Installed with all that they require.
        alone: Installed afterwards, without what they require.
        module: Can be imported when all is well.
    """

    name: str
    requirements: tuple[str, ...]
    module: str
    alone: tuple[str, ...] = ()

    @property
    def versions(self) -> str:
        return ", ".join((*self.alone, *self.requirements))


def environment(one: Environment, cache: Path) -> Path:
    """The Python of an environment. Makes it if it is not there, or if it has other versions.

    Raises:
        InstallError: With the last lines of what went wrong.
    """
    folder = cache / one.name
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists() or complete.read_text() != one.versions:
        print(f"installing {one.versions} into {folder}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        venv.create(folder, with_pip=True)
        pip_install(python, list(one.requirements))
        if one.alone:
            pip_install(python, ["--no-deps", *one.alone])
        _checked([python, "-c", f"import {one.module}"], f"{one.name} cannot be imported")
        complete.write_text(one.versions)
    return python


def llama_cpp_environment(cache: Path) -> Path:
    """The Python of an environment that has llama.cpp, built for this processor. Makes it if it is not there.

    A virtual machine may list a processor's matrix instructions (AMX) and end a program that uses them. Then llama.cpp
    is built without them.

    Raises:
        InstallError: It cannot be built, or does not run on this machine.
    """
    folder = cache / LLAMA_CPP.replace("==", "-")
    python, complete = folder / "bin" / "python", folder / "complete"
    if not complete.exists():
        for flags in ("", _NO_MATRIX_INSTRUCTIONS):
            print(f"building {LLAMA_CPP} in {folder}; it takes some minutes", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            venv.create(folder, with_pip=True)
            options = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF", "CFLAGS": flags, "CXXFLAGS": flags}
            pip_install(python, ["--no-binary", "llama-cpp-python", "--no-cache-dir", LLAMA_CPP], options)
            code = _tried(python, cache)
            if code == 0:
                complete.write_text(f"built for this processor {flags}")
                break
            print(f"llama.cpp ends with code {code}, built with the flags {flags!r}", flush=True)
        else:
            raise InstallError("llama.cpp does not run on this machine")
    text = "import llama_cpp; print(llama_cpp.__version__, llama_cpp.llama_print_system_info().decode())"
    said = _checked([python, "-I", "-c", text], "llama.cpp cannot be imported")
    print(f"llama-cpp-python {said.strip()} {complete.read_text()}", flush=True)
    return python


def _tried(python: Path, folder: Path) -> int:
    """The exit code of llama.cpp after it decoded from a very small file."""
    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=1024,
    )
    prompt = list(range(1, 9))
    points = [{"prompts": [prompt] * number, "tokens": 3} for number in (1, 16)]
    with gguf_file(config, "Q4_K_M", folder) as path:
        asked = {"path": str(path), "load": "copied", "threads": os.cpu_count() or 1, "points": points}
        arguments = [str(python), "-s", "-P", "-m", "benchmarks.llama_cpp_decode", json.dumps(asked)]
        variables = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(
            arguments, input="go\n" * 2, stdout=subprocess.DEVNULL, text=True, env=variables
        ).returncode


def pip_install(python: Path, arguments: list[str], variables: Mapping[str, str] | None = None) -> None:
    """Installs with `pip`, with these variables beside this process's own.

    Raises:
        InstallError: With the last lines of what went wrong.
    """
    wrong = f"pip cannot install {arguments[-1]}"
    _checked([python, "-m", "pip", "install", "--quiet", *arguments], wrong, variables)


def _checked(command: list[str | Path], wrong: str, variables: Mapping[str, str] | None = None) -> str:
    ended = subprocess.run(command, env=os.environ | dict(variables or {}), capture_output=True, text=True)
    if ended.returncode:
        last = [line.strip() for line in ended.stderr.splitlines() if line.strip()][-3:]
        raise InstallError(f"{wrong}: {' / '.join(last) or f'exit code {ended.returncode}'}")
    return ended.stdout
