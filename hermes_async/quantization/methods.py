"""Finds the quantized matrices of a checkpoint, by the method that its configuration names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hermes_async.errors import UnsupportedModelError
from hermes_async.quantization.auto_round import auto_round_matrices
from hermes_async.quantization.awq import awq_matrices
from hermes_async.quantization.bitnet import bitnet_matrices
from hermes_async.quantization.bitsandbytes import bitsandbytes_matrices
from hermes_async.quantization.compressed_tensors import compressed_tensors_matrices
from hermes_async.quantization.encoding import StoredMatrix
from hermes_async.quantization.fp8 import fbgemm_matrices, fp8_matrices
from hermes_async.quantization.gptq import gptq_matrices
from hermes_async.quantization.metal import metal_matrices
from hermes_async.quantization.mxfp4 import mxfp4_matrices
from hermes_async.quantization.nvfp4 import modelopt_matrices
from hermes_async.quantization.processor_layout import METHOD as PROCESSOR_LAYOUT
from hermes_async.quantization.processor_layout import processor_layout_matrices
from hermes_async.quantization.torchao import torchao_matrices
from hermes_async.storage.tensor_spec import TensorSpec

_Finder = Callable[[Mapping[str, Any], Mapping[str, TensorSpec]], dict[str, StoredMatrix]]

_METHODS: dict[str, _Finder] = {
    "auto-round": auto_round_matrices,
    "awq": awq_matrices,
    "bitnet": bitnet_matrices,
    "bitsandbytes": bitsandbytes_matrices,
    "compressed-tensors": compressed_tensors_matrices,
    "fbgemm_fp8": fbgemm_matrices,
    "fp8": fp8_matrices,
    PROCESSOR_LAYOUT: processor_layout_matrices,
    "gptq": gptq_matrices,
    "metal": metal_matrices,
    "modelopt": modelopt_matrices,
    "modelopt_fp4": modelopt_matrices,
    "mxfp4": mxfp4_matrices,
    "mxfp8": fp8_matrices,
    "nvfp4": modelopt_matrices,
    "torchao": torchao_matrices,
}
"""By `quant_method`: from the settings and all tensors of a checkpoint to its quantized matrices."""

_ITS_ORIGINAL = "the model that this one was made from, or a file of it in FP8, int4 (compressed-tensors) or GGUF"
_BY_CODEBOOK = f"whose weights are entries of learned codebooks, for kernels of GPUs; use {_ITS_ORIGINAL}"
_REFUSED = {
    "aqlm": _BY_CODEBOOK,
    "eetq": f"whose int8 weights are in an order for one kind of GPU; use {_ITS_ORIGINAL}",
    "fouroversix": f"whose weights are in NVFP4 of its own; use {_ITS_ORIGINAL}, or one in NVFP4",
    "fp_quant": f"whose inputs are rotated before they are multiplied; use {_ITS_ORIGINAL}",
    "gemma": f"whose layers also round their inputs and outputs to stored ranges; use {_ITS_ORIGINAL}",
    "higgs": f"whose inputs are rotated before they are multiplied; use {_ITS_ORIGINAL}",
    "hqq": f"which transformers 5 makes when it loads a model, and does not load from a file; use {_ITS_ORIGINAL}",
    "MLX": f"which changes some weights and quantizes others; use {_ITS_ORIGINAL}",
    "quanto": f"which transformers makes when it loads a model, and does not save; use {_ITS_ORIGINAL}",
    "quark": f"whose files only AMD Quark reads; use {_ITS_ORIGINAL}",
    "sinq": f"whose files only the sinq library reads; use {_ITS_ORIGINAL}",
    "spqr": f"whose outliers are in sparse matrices, for kernels of GPUs; use {_ITS_ORIGINAL}",
    "vptq": _BY_CODEBOOK,
}
"""Methods that are known and not built: what they are, and what works."""
_DYNAMIC_FP8 = ("fbgemm_fp8", "fp8", "mxfp8")
"""The methods that quantize activations unless their settings say something else."""


def known_methods() -> frozenset[str]:
    """The methods whose checkpoints are read."""
    return frozenset(_METHODS)


def refused_methods() -> frozenset[str]:
    """The methods that are refused with a reason of their own."""
    return frozenset(_REFUSED)


def quantized_matrices(
    path: Path, method: str, settings: Mapping[str, Any], tensors: Mapping[str, TensorSpec]
) -> dict[str, StoredMatrix]:
    """The quantized matrices of a checkpoint, by the names that their weights have in an unquantized one.

    Tensors that take no part in any of them are the others' own. Numbers in the dtype F4 of safetensors are what other
    files have as bytes: two in each, of which the first is in the lower half.

    Args:
        path: The checkpoint, for messages.
        method: The `quant_method`.
        settings: All of the configuration's settings for quantization.

    Raises:
        UnsupportedModelError: The method is not known. The message says which are.
        CorruptShardError: A matrix lacks a part, or has one of another shape.
    """
    tensors = {name: replace(spec, packed=None) if spec.packed == "F4" else spec for name, spec in tensors.items()}
    finder = _METHODS.get(method)
    if method in _REFUSED:
        raise UnsupportedModelError(f"{path} is quantized by {method}, {_REFUSED[method]}", path=path)
    if finder is None:
        raise UnsupportedModelError(
            f"{path} is quantized ({method}), which hermes_async does not read; it reads "
            f"{', '.join(sorted(_METHODS))}. Use the model that this one was made from, or one of these",
            path=path,
        )
    found = finder(settings, tensors)
    if not found:
        raise UnsupportedModelError(
            f"{path} is quantized ({method}), as its configuration says, but has no tensor that is stored so; if its "
            "weights are plain numbers, remove the settings of the quantization",
            path=path,
        )
    for matrix in found.values():
        matrix.check()
    return found


def notes_of(method: str, settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What the configuration of a quantized checkpoint asks for beside its weights, and is not done: for a plan.

    Args:
        method, settings: As for `quantized_matrices`.
    """
    activations = _activation_quantization(method, settings)
    notes = []
    if activations:
        notes.append(
            f"activations keep the model's dtype: the configuration's quantization of them ({activations}) "
            "is not applied"
        )
    cache = settings.get("kv_cache_scheme") or settings.get("kv_cache_quant_algo")
    if cache:
        notes.append("keys and values keep the model's dtype: the configuration's quantization of them is not applied")
    return tuple(notes)


def _activation_quantization(method: str, settings: Mapping[str, Any]) -> str:
    """How activations are quantized, as its configuration says it; empty if they are not."""
    match settings:
        case {"config_groups": dict(groups)}:  # compressed-tensors, and ModelOpt
            found = [group.get("input_activations") for group in groups.values() if isinstance(group, dict)]
            return ", ".join(dict.fromkeys(_scheme(one) for one in found if isinstance(one, dict)))
        case {"activation_scheme": str(scheme)}:
            return f"{scheme} fp8"
        case {"quant_algo": str(algorithm)} if "A16" not in algorithm:
            return algorithm
        case {"quant_type": {"default": {"_type": str(kind)}}} if "Activation" in kind:  # torchao's
            return kind
        case {"load_in_8bit": True}:
            return "dynamic int8"
    if method == "bitnet":
        return "dynamic int8"
    return "dynamic fp8" if method in _DYNAMIC_FP8 else ""


def _scheme(activations: Mapping[str, Any]) -> str:
    kind = "fp" if activations.get("type") == "float" else "int"
    return f"{'dynamic' if activations.get('dynamic') else 'static'} {kind}{activations.get('num_bits', 8)}"
