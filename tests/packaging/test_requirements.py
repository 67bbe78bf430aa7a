"""The extras, and the pinned versions that they are tested with."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.project import PYPROJECT, ROOT

EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
FILES = {"constraints-dev.txt": "dev", "constraints-oldest.txt": "test"}


def requirements(extra: str) -> Iterator[Requirement]:
    """What an extra requires, with the extras that it includes."""
    for text in EXTRAS[extra]:
        requirement = Requirement(text)
        if requirement.name != "hermes-async":
            yield requirement
        for included in requirement.extras if requirement.name == "hermes-async" else ():
            yield from requirements(included)


def pinned(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[1:] == sorted(lines[1:])
    pins = [line.split("==") for line in lines[1:]]
    assert all(canonicalize_name(name) == name for name, _ in pins)
    return {name: Version(version) for name, version in pins}


@pytest.mark.parametrize(("file", "extra"), FILES.items())
def test_everything_that_is_asked_for_is_pinned_within_its_range(file: str, extra: str) -> None:
    versions = pinned(file)
    assert f'".[{extra}]"' in (ROOT / file).read_text()
    for requirement in [*map(Requirement, PYPROJECT["project"]["dependencies"]), *requirements(extra)]:
        assert versions[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_the_oldest_tested_versions_of_extras_are_the_lowest_declared_ones() -> None:
    versions = pinned("constraints-oldest.txt")
    for requirement in [*requirements("serve"), *requirements("structured")]:
        lowest = next(Version(one.version) for one in requirement.specifier if one.operator == ">=")
        assert versions[requirement.name].release[: len(lowest.release)] == lowest.release, requirement


def test_the_declared_versions_of_python_are_those_that_users_read_of() -> None:
    named = [one.rpartition(" ")[2] for one in PYPROJECT["project"]["classifiers"] if ":: Python :: 3." in one]
    assert PYPROJECT["project"]["requires-python"] == f">={named[0]}"
    for page in ("README.md", "docs/supported.md"):
        assert f"Python {named[0]} to {named[-1]}" in (ROOT / page).read_text(), page


def test_what_users_install_together() -> None:
    assert {one.name for one in requirements("all")} == {
        one.name
        for extra in ("audio", "compiled", "gguf", "ray", "serve", "structured", "vision")
        for one in requirements(extra)
    }
    assert {one.name for one in requirements("all")} <= {one.name for one in requirements("dev")}


def test_the_environments_of_older_and_newer_versions_stay_small() -> None:
    assert not {"ray", "playwright", "schemathesis", "mkdocs", "mypy", "matplotlib"} & {
        *pinned("constraints-oldest.txt")
    }


def test_no_file_names_an_index_or_a_path() -> None:
    for file in (*FILES, "pyproject.toml", "Makefile"):
        text = (ROOT / file).read_text()
        assert re.findall(r"https?://\S+|--(?:extra-)?index-url|file:", text) == [], file
