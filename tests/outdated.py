"""Says which of the project's libraries have a newer release than what the tests pass on (`make outdated`).

The index that pip is configured with is asked. Exits with 1 where something is newer, so that a scheduled job can tell.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

sys.path.insert(0, str(Path(__file__).parent.parent))

from hermes_async.modeling.transformers_api import TESTED_VERSIONS
from tests.project import PYPROJECT, ROOT


def tested_versions() -> dict[str, Version]:
    """The highest version of each library that the tests passed on, by name."""
    tested: dict[str, Version] = {}
    for path in sorted(ROOT.glob("constraints-*.txt")):
        for name, version in re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), flags=re.MULTILINE):
            tested[name] = max(tested.get(name, Version("0")), Version(version))
    # torch's newest comes with gigabytes of CUDA, so it is tested by hand and not pinned for every run.
    return {**tested, **{name: Version(highest) for name, (_, highest) in TESTED_VERSIONS.items()}}


def latest_version(name: str) -> Version:
    """The newest release on the index that this interpreter can install."""
    command = [sys.executable, "-m", "pip", "index", "versions", name, "--disable-pip-version-check"]
    answer = subprocess.run(command, check=True, capture_output=True, text=True)
    match = re.match(r"\S+ \((\S+)\)", answer.stdout)  # "name (latest)", then all versions
    assert match is not None, answer.stdout
    return Version(match[1])


def main() -> int:
    tested, newer = tested_versions(), 0
    for requirement in PYPROJECT["project"]["dependencies"]:
        name = Requirement(requirement).name
        try:
            latest = latest_version(name)
        except subprocess.CalledProcessError as error:
            print(f"{name}: the index does not answer: {error.stderr.strip().splitlines()[-1:]}")
            newer += 1
            continue
        if latest > tested[name]:
            print(f"{name} {latest} is out; tested up to {tested[name]}")
            newer += 1
    if not newer:
        print("nothing is newer than what was tested")
    return 1 if newer else 0


if __name__ == "__main__":
    sys.exit(main())
