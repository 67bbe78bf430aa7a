"""Refuses configurations of models that are far larger than their tensors, before anything of that size is made.

transformers makes lists, names of labels and modules by the numbers of a `config.json`, and tables of positions. So a
configuration of a few bytes could take all memory, or hours. Here its numbers are compared with the tensors that the
checkpoint has: opening must cost in proportion to the files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hermes_async.config import format_bytes
from hermes_async.errors import CheckpointError, UnsupportedModelError
from hermes_async.storage.tensor_spec import TensorSpec

MAX_LAYERS = 256
"""Layers that a model may have, even if its checkpoint has fewer tensors."""
MAX_EXPERTS = 2**14
"""As `MAX_LAYERS`, for experts. Some configurations of models without experts have so many by default."""
MAX_COUNT = 1024
"""As `MAX_LAYERS`, for heads and what else is counted."""
MAX_WIDTH = 2**20
"""As `MAX_LAYERS`, for widths and labels; they are compared with the largest dimension of a tensor."""
MAX_POSITIONS = 2**24
"""The longest contexts of models are of ten million tokens."""
MAX_TABLE_BYTES = 64 * 2**20
"""Bytes of tables that transformers computes, such as rotary frequencies, even if a checkpoint has fewer bytes."""

MAX_VALUES = 2**17
"""Values of a configuration, all its lists and objects counted. It is copied several times when a model is opened."""

_PACKED = 16
"""A dimension of a quantized tensor is smaller than the matrix's by at most this factor."""
_MAX_DEPTH = 16
_MAX_KEY_CHARS = 100

_LAYERS = re.compile(r"(\w+_)?(layers?|blocks|depths?|stages)")
_EXPERTS = re.compile(r"(num|n)_(\w+_)?experts?")
_COUNTS = re.compile(r"(num|n)_(\w+_)?(heads?|groups?|codebooks|quantizers|queries|streams)")
_LABELS = re.compile(r"(num|n)_(labels|classes)")
_WIDTHS = re.compile(
    r"(\w+_)?(hidden|intermediate|embedding|embed|vocab|ffn|head|expert|state|conv|kernel|inner|latent|projection|rope"
    r"|nope|qk|v|key|value)(_\w+)?_(size|dim|width|rank|channels)s?|d_(model|ff|kv|inner|state)|n_(embd|inner)|ffn_dim"
)
_POSITIONS = re.compile(r"max_(\w+_)?(positions?|position_embeddings|seq_len|sequence_length)|n_positions|n_ctx")
_NOT_OF_THE_MODEL = ("id2label", "label2id", "quantization_config", "task_specific_params")
"""Keys of `config.json` whose values have keys of their own."""


def check_config(path: Path, config: Mapping[str, Any], tensors: Collection[TensorSpec]) -> None:
    """Compares the numbers of a configuration with the tensors.

    Args:
        path: Of `config.json`, for messages.
        config: Its content.

    Raises:
        CheckpointError: A number is too large. The message has its name, its value and the limit.
    """
    largest = max((max(spec.shape, default=1) for spec in tensors), default=1)
    num_values, most_values = _num_values(config), max(MAX_VALUES, 4 * largest)  # a label is two of them
    if num_values > most_values:
        raise CheckpointError(f"{path}: it has {num_values} values, of at most {most_values}", path=path)
    few, of_tensors = f"it has {len(tensors)} tensors", f"the largest dimension of its tensors is {largest}"
    limits = (
        (_LAYERS, max(MAX_LAYERS, len(tensors)), few),
        (_EXPERTS, max(MAX_EXPERTS, len(tensors), largest), f"{few}, and {of_tensors}"),
        (_COUNTS, max(MAX_COUNT, len(tensors), largest), f"{few}, and {of_tensors}"),
        (_LABELS, max(MAX_COUNT, largest), of_tensors),
        (_WIDTHS, max(MAX_WIDTH, _PACKED * largest), of_tensors),
        (_POSITIONS, MAX_POSITIONS, "no model has a longer context"),
    )
    for name, values in _numbers(path, config):
        key = name.rpartition(".")[2]
        most, why = next(((most, why) for pattern, most, why in limits if pattern.fullmatch(key)), (math.inf, ""))
        for value in (value for value in values if value > most):
            raise CheckpointError(f"{path}: {name} is {value!s:.40}, of at most {most}, because {why}", path=path)


def _num_values(tree: Any) -> int:
    """The values in a JSON value, however deep."""
    left, count = [tree], 0
    while left:
        one = left.pop()
        several = one.values() if isinstance(one, Mapping) else one if isinstance(one, list) else ()
        count += len(several)
        left += (value for value in several if isinstance(value, (Mapping, list)))
    return count


def _numbers(
    path: Path, config: Mapping[str, Any], prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, Sequence[float]]]:
    """The numbers of a configuration and of those in it, by their keys; those in a list together, by the list's key.

    Keys that are longer than any setting's name are left out: to compare one with patterns takes time.
    """
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"{path}: configurations are nested more than {_MAX_DEPTH} deep", path=path)
    for key, value in config.items():
        if key in _NOT_OF_THE_MODEL or len(str(key)) > _MAX_KEY_CHARS:
            continue
        several = value if isinstance(value, list) else [value]
        for one in several:
            if isinstance(one, Mapping):
                yield from _numbers(path, one, f"{prefix}{key}.", depth + 1)
        numbers = [one for one in several if isinstance(one, (int, float)) and not isinstance(one, bool)]
        if numbers:
            yield f"{prefix}{key}", numbers


def check_tables(tables: Mapping[str, torch.Tensor], file_bytes: int, where: str) -> None:
    """Checks the size of the tables that are computed when the engine opens.

    Args:
        tables: The buffers of a model that no file has, by name, on the meta device.
        file_bytes: Of all tensors of the checkpoint.
        where: The beginning of the message.

    Raises:
        UnsupportedModelError: They are too large.
    """
    most, total = max(MAX_TABLE_BYTES, file_bytes), sum(table.nbytes for table in tables.values())
    if total > most:
        name, largest = max(tables.items(), key=lambda item: item[1].nbytes)
        raise UnsupportedModelError(
            f"{where}: config.json asks for tables of {format_bytes(total)}, of at most {format_bytes(most)}, as its "
            f"tensors take; the largest is {name} with the shape {list(largest.shape)}"
        )
