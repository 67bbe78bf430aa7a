"""The checkpoint's own processor, which makes a model's inputs of texts and images."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers

from hermes_async.errors import CheckpointError
from hermes_async.foreign_errors import is_foreign, reason_of
from hermes_async.storage.file_kinds import is_file

_LOADERS = {
    "image_processor": "AutoImageProcessor",
    "feature_extractor": "AutoFeatureExtractor",
    "tokenizer": "AutoTokenizer",
}
"""Names in transformers, which imports what a name needs when it is first asked for."""

_OPTIONS = {"trust_remote_code": False, "local_files_only": True}


class SharedProcessor:
    """A processor for one thread at a time, because its tokenizer and its image processor may change in a call.

    It is loaded when the first image comes: most conversations have none.

    Args:
        path: The checkpoint's directory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        # All mutable state, under the lock: the processor, once it is loaded.
        self._processor: Any = None

    @contextmanager
    def taken(self) -> Iterator[Any]:
        """Within the block no other thread uses the processor.

        Raises:
            CheckpointError: The checkpoint does not say how images are prepared, or a package is missing.
        """
        with self._lock:
            if self._processor is None:
                self._processor = self._load()
            yield self._processor

    def _load(self) -> Any:
        try:
            processor = _load_processor(self._path)
        except BaseException as error:
            if not is_foreign(error):
                raise
            raise CheckpointError(
                f"{self._path} does not say how images are prepared, or a package is missing: {reason_of(error)}",
                path=self._path,
            ) from error
        if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
            raise CheckpointError(f"{self._path} does not say how images are prepared", path=self._path)
        return processor


def _load_processor(path: Path) -> Any:
    """The checkpoint's processor; without its part for videos where torchvision, which that needs, is not installed."""
    name = _class_name(path)
    if name is None or find_spec("torchvision") is not None:
        load: Any = transformers.AutoProcessor.from_pretrained
        return load(path, **_OPTIONS)
    processor_class: Any = getattr(transformers, name)
    every: list[str] = processor_class.get_attributes()  # raises an `ImportError` if the class needs torchvision itself
    kept = [part for part in every if "video" not in part]
    if not set(kept) <= set(_LOADERS):
        load = processor_class.from_pretrained
        return load(path, **_OPTIONS)
    without_videos: Any = type(name, (processor_class,), {"get_attributes": classmethod(lambda _: kept)})
    parts = [
        getattr(transformers, _LOADERS[part]).from_pretrained(path, **_OPTIONS) if part in kept else None
        for part in every
    ]
    settings, _ = processor_class.get_processor_dict(path, local_files_only=True)
    return without_videos.from_args_and_dict(parts, settings)


def _class_name(path: Path) -> str | None:
    """The name of transformers' class in the checkpoint's files."""
    for file in ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json"):
        if is_file(path / file):
            name = json.loads((path / file).read_text(encoding="utf-8")).get("processor_class")
            if isinstance(name, str) and hasattr(transformers, name):
                return name
    return None
