"""Finds models in GGUF among names of files. Some models are in several parts; one is chosen by the end of its name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hermes_async.errors import CheckpointError, UnsupportedModelError

PART = re.compile(r"(?P<name>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL | re.IGNORECASE)
"""The name of a part of a model of several files."""

_ENDING = ".gguf"
_SEPARATORS = "-._/"
_MAX_SHOWN = 20


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A model in a file, or in several parts.

    Attributes:
        name: Of the file with its folder, without what all models and parts have: "Q4_K_M/model".
        files: The names of its files, sorted: part 1 is first.
    """

    name: str
    files: tuple[str, ...]

    def is_called(self, wanted: str) -> bool:
        """Whether `wanted` is the end of its name, as "Q4_K_M" of "model-Q4_K_M", or one of its folders."""
        name, wanted = self.name.lower(), wanted.lower().removesuffix(_ENDING)
        ends = name.endswith(wanted) and name[: -len(wanted)].endswith(tuple(_SEPARATORS))
        return bool(wanted) and (name == wanted or ends or wanted in name.split("/")[:-1])


def gguf_models(names: Iterable[str]) -> list[GgufModel]:
    """The models among some files, sorted by name. Left out is what only an image goes through before the model."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in sorted(names):
        part = PART.fullmatch(name)
        if name.lower().endswith(_ENDING) and not name.rpartition("/")[2].lower().startswith("mmproj"):
            key = (name[: -len(_ENDING)], 1) if part is None else (part["name"], int(part["count"]))
            found.setdefault(key, []).append(name)
    return [GgufModel(name, tuple(files)) for (name, _), files in found.items()]


def chosen_model(repo_id: str, models: Sequence[GgufModel], wanted: str) -> GgufModel:
    """The one model of a repository whose name ends with `wanted`.

    Raises:
        CheckpointError: There is none, or there are several. The message says which names there are.
    """
    path = Path(repo_id)
    if not models:
        raise CheckpointError(
            f"{repo_id} has no model in GGUF; without {':' + wanted!r}, its safetensors are used", path=path
        )
    exact = [model for model in models if model.name.lower() == wanted.lower().removesuffix(_ENDING)]
    called = exact or [model for model in models if model.is_called(wanted)]
    if len(called) == 1:
        return called[0]
    what = f"{len(called)} models in GGUF whose names end with" if called else "no model in GGUF whose name ends with"
    raise CheckpointError(f"{repo_id} has {what} {wanted!r}; it has {listed(called or models)}", path=path)


def listed(models: Sequence[GgufModel]) -> str:
    """Their names, for messages."""
    more = f" and {len(models) - _MAX_SHOWN} more" if len(models) > _MAX_SHOWN else ""
    return ", ".join(model.name for model in models[:_MAX_SHOWN]) + more


def only_gguf_model(directory: Path) -> Path | None:
    """The GGUF model in a directory without safetensors; of several parts, the first. None if there is none.

    Raises:
        UnsupportedModelError: There are several models.
    """
    try:
        names = sorted(entry.name for entry in directory.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be listed: {error.strerror}", path=directory) from error
    if any(name.endswith(".safetensors") for name in names):
        return None
    models = gguf_models(names)
    if len(models) > 1:
        shown = ", ".join(model.files[0] for model in models[:5])
        more = f" and {len(models) - 5} more" if len(models) > 5 else ""
        raise UnsupportedModelError(
            f"{directory} has {len(models)} models in GGUF: {shown}{more}; give the path of one of these files",
            path=directory,
        )
    return directory / models[0].files[0] if models else None
