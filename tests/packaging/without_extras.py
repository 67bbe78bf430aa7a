"""Runs the command line as if no extra were installed: `python -m tests.packaging.without_extras ARGUMENTS`.

Arguments that begin with "-c" run Python code instead, as the interpreter would.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from typing import Any

from packaging.requirements import Requirement

from tests.project import PYPROJECT

_EXTRAS = ("serve", "structured", "vision", "audio", "gguf", "compiled", "ray", "bench")
_MODULES = {"pillow": "PIL"}
_REQUIRED = {
    Requirement(text).name for extra in _EXTRAS for text in PYPROJECT["project"]["optional-dependencies"][extra]
} - {"hermes-async"}
HIDDEN = {_MODULES.get(name, name.replace("-", "_")) for name in _REQUIRED}
"""The modules of all extras that users install."""


class Without:
    """A finder that finds what another one finds, but none of the hidden modules."""

    def __init__(self, finder: Any) -> None:
        self._finder = finder

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name.partition(".")[0] in HIDDEN:
            return None
        found: ModuleSpec | None = self._finder.find_spec(name, path, target)
        return found

    def find_distributions(self, context: Any) -> Iterator[Any]:
        for one in getattr(self._finder, "find_distributions", lambda _: ())(context):
            if one.name.lower().replace("_", "-") not in _REQUIRED:
                yield one


def main() -> None:
    if HIDDEN & set(sys.modules):
        sys.exit("extras are imported already")
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
    if sys.argv[1] == "-c":
        exec(compile(sys.argv[2], "<code>", "exec"), {})
        return
    from hermes_async.cli import main

    main()


if __name__ == "__main__":
    main()
