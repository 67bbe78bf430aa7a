"""The sdist, and the wheel that is built from it: what is in them, and what they say."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest
from packaging.requirements import Requirement

import hermes_async
from tests.project import PYPROJECT, ROOT

PACKAGE = ROOT / "hermes_async"
PROJECT = PYPROJECT["project"]


def build(source: Path, target: str, output: Path) -> Path:
    """Builds an sdist or a wheel without an environment of its own; returns its file."""
    command = [sys.executable, "-m", "hatchling", "build", "--target", target, "--directory", str(output)]
    ended = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (file,) = output.iterdir()
    return file


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(ROOT, "sdist", folder / "built")) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"hermes_async-{PROJECT['version']}"


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    file = build(source, "wheel", tmp_path_factory.mktemp("wheel") / "built")
    assert file.name == f"hermes_async-{PROJECT['version']}-py3-none-any.whl"
    return zipfile.ZipFile(file)


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return Parser().parsestr(wheel.read(about("METADATA")).decode())


def about(name: str) -> str:
    return f"hermes_async-{PROJECT['version']}.dist-info/{name}"


def package_files() -> set[str]:
    """Every file of the package in the working tree: modules, the demo model, the page."""
    files = (file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return {file.relative_to(ROOT).as_posix() for file in files}


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    assert {name for name in names if PurePosixPath(name).parts[0] == "hermes_async"} == package_files()
    others = {PurePosixPath(name).parts[0] for name in names} - {"hermes_async"}
    assert others == {about("")[:-1]}
    assert {"hermes_async/py.typed", "hermes_async/demo/model/model.safetensors", about("licenses/LICENSE")} <= names
    assert wheel.read("hermes_async/demo/model/config.json") == (PACKAGE / "demo/model/config.json").read_bytes()


def test_the_wheels_entry_point(wheel: zipfile.ZipFile) -> None:
    text = wheel.read(about("entry_points.txt")).decode()
    assert text.split() == ["[console_scripts]", "hermes-async", "=", "hermes_async.cli:main"]


def test_the_wheels_metadata(metadata: Message) -> None:
    assert (metadata["Name"], metadata["Version"]) == ("hermes-async", hermes_async.__version__)
    assert (metadata["License-Expression"], metadata["Requires-Python"]) == ("Apache-2.0", ">=3.11")
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert str(metadata.get_payload()).startswith("# hermes_async\n")
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_a_plain_install_brings_no_extra(metadata: Message) -> None:
    required = [Requirement(text) for text in metadata.get_all("Requires-Dist", [])]
    always = {one.name for one in required if one.marker is None or one.marker.evaluate({"extra": ""})}
    assert always == {Requirement(text).name for text in PROJECT["dependencies"]}
    serve = {one.name for one in required if one.marker is not None and one.marker.evaluate({"extra": "serve"})}
    assert serve - always == {"fastapi", "prometheus-client", "starlette", "uvicorn"}


def test_the_sdist_has_what_the_tests_need(source: Path) -> None:
    for name in ("README.md", "LICENSE", "CHANGELOG.md", "Makefile", "constraints-dev.txt", "pyproject.toml"):
        assert (source / name).read_bytes() == (ROOT / name).read_bytes()
    for folder in ("tests", "benchmarks"):
        here = {file.relative_to(ROOT).as_posix() for file in (ROOT / folder).rglob("*.py")}
        assert {file.relative_to(source).as_posix() for file in (source / folder).rglob("*.py")} == here
    assert (source / "docs" / "architecture.md").exists()
