"""Checks an installed wheel: `python -I tests/packaging/installed.py [EXTRA ...]`, with the extras that are installed.

It runs in an environment that has nothing but the wheel, so it imports no other test.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import hermes_async
from hermes_async.demo import MODEL_PATH

MODULES = {"serve": ("fastapi", "starlette", "uvicorn", "prometheus_client"), "structured": ("llguidance",)}
COMMAND = Path(sys.executable).with_name("hermes-async")


def hermes(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, args)], capture_output=True, text=True, check=False)


def check(holds: bool, what: object) -> None:
    if not holds:
        sys.exit(f"the installed package is wrong: {what}")


def main(extras: set[str]) -> None:
    folder = Path(hermes_async.__file__).parent
    check("site-packages" in folder.parts, folder)
    check((folder / "py.typed").exists(), "no py.typed")
    check(not importlib.util.find_spec("tests"), "tests are installed")
    for name in hermes_async.__all__:
        check(hasattr(hermes_async, name), name)
    version = hermes("--version")
    check(version.stdout == f"hermes-async {metadata.version('hermes-async')}\n", version)
    answer = hermes("generate", MODEL_PATH, "All:", "--memory", "6MiB", "--max-tokens", 3, "--json")
    check(answer.returncode == 0, answer.stderr)
    check(json.loads(answer.stdout)["usage"]["completion_tokens"] == 3, answer.stdout)
    for extra, modules in MODULES.items():
        for module in modules:
            check((importlib.util.find_spec(module) is not None) == (extra in extras), f"{module}, of {extra}")
    found = json.loads(hermes("doctor", "--json").stdout)["findings"]
    for extra in MODULES:
        installed = next(one["installed"] for one in found if one["name"] == f"extra {extra}")
        check(installed == (extra in extras), f"doctor: {extra}")
    if "serve" in extras:
        check(hermes("serve", "--help").returncode == 0, "serve --help")
        refused = hermes("serve", MODEL_PATH, "--host", "0.0.0.0")
        check(refused.returncode == 1 and "--no-auth" in refused.stderr, refused)
    else:
        refused = hermes("serve", MODEL_PATH)
        check(refused.returncode == 1 and "[serve]" in refused.stderr, refused)
    print(f"hermes-async {hermes_async.__version__} works with {', '.join(sorted(extras)) or 'no extra'}")


if __name__ == "__main__":
    main(set(sys.argv[1:]))
