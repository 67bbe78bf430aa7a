"""A small language model that ships with the library, for examples and tests that need no download."""

from pathlib import Path

MODEL_PATH: Path = Path(__file__).parent / "model"
