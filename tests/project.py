"""The project's own files, for tests of what they declare."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
