"""A small language model that ships with the package, for examples and tests without a download."""

from pathlib import Path

MODEL_PATH: Path = Path(__file__).parent / "model"
