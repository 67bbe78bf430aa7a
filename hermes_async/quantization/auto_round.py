"""Checkpoints of AutoRound, which have the layout of another method.

Source: AutoRound (intel/auto-round), `auto_round.inference.backend`: which packing has which layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hermes_async.errors import UnsupportedModelError
from hermes_async.quantization.awq import awq_matrices
from hermes_async.quantization.encoding import StoredMatrix
from hermes_async.quantization.gptq import folder_of, matrices_in_gptq_layout
from hermes_async.storage.tensor_spec import TensorSpec

_GPTQ = {
    "auto_round:gptq": True,
    "auto_round:auto_gptq": True,
    "auto_round:gptqmodel": False,
    "auto_round": False,
}
"""By the name of a packing in GPTQ's layout: whether zero points are stored less one."""
_AWQ = ("auto_round:awq", "auto_round:auto_awq")


def auto_round_matrices(settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]) -> dict[str, StoredMatrix]:
    """The quantized matrices among the tensors of a checkpoint, by the names that their weights have unquantized.

    Raises:
        UnsupportedModelError: The packing is another one, or its numbers have other bits.
        CorruptShardError: A matrix lacks a part, or has one of another shape or dtype.
    """
    packing = str(settings.get("packing_format") or settings.get("backend") or "auto_round:gptq").lower()
    integers = str(settings.get("data_type") or "int").startswith("int")
    if integers and packing in _AWQ:
        return awq_matrices({"bits": settings.get("bits"), "group_size": settings.get("group_size", 128)}, tensors)
    if not integers or packing not in _GPTQ:
        raise UnsupportedModelError(
            f"{folder_of(tensors)} is an AutoRound checkpoint of {settings.get('data_type') or 'int'} numbers in the "
            f"packing {packing!r}; hermes_async reads whole numbers in {', '.join((*_GPTQ, *_AWQ))}. Use the model "
            "that it was made from, or one of these",
            path=folder_of(tensors),
        )
    extra = settings.get("extra_config")
    overrides = extra if isinstance(extra, dict) else {}
    return matrices_in_gptq_layout(settings, overrides, tensors, less_one=_GPTQ[packing])
