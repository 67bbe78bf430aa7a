"""Finds the method by which a checkpoint was quantized, and its settings: in config.json, or in a file beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hermes_async.storage.checkpoint import read_config
from hermes_async.storage.file_kinds import is_file

_IN_CONFIG = (("quantization_config", "?"), ("quantization", "MLX"), ("compression_config", "?"))
"""The keys of config.json that have the settings, and the method where those name none."""
_FILES = {
    "hf_quant_config.json": ("modelopt", "quantization"),
    "quantize_config.json": ("gptq", None),
    "quant_config.json": ("awq", None),
}
"""The files that a method's own tools write: the method, and the key of the settings where they are not all of it."""


def quantization(directory: Path, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]] | None:
    """The method by which a checkpoint was quantized, and its settings; None if it was not quantized.

    Args:
        directory: Its own, or its GGUF file.
        config: The content of its config.json.

    Raises:
        CheckpointError: A file with the settings is no JSON object, or cannot be read.
    """
    for key, writer in _IN_CONFIG:
        settings = config.get(key)
        if settings:
            settings = settings if isinstance(settings, dict) else {}
            if settings.get("load_in_4bit") or settings.get("load_in_8bit"):  # old files name no method
                writer = "bitsandbytes"
            return str(settings.get("quant_method") or writer), settings
    for name, (method, key_of_settings) in _FILES.items():
        file = directory / name
        if is_file(file):
            entries = read_config(file, dict)
            settings = entries if key_of_settings is None else entries.get(key_of_settings)
            settings = settings if isinstance(settings, dict) else {}
            return str(settings.get("quant_method") or method), settings
    return None
