"""torchao's weights in safetensors, which the header's metadata describes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.quantization.methods import quantized_matrices
from hermes_async.storage.checkpoint import read_tensors
from tests.quantization.float_formats import SMALL, check_engine, save

GROUP = 32
ATTRIBUTES = "_" + "data"  # a key of torchao; one word would look like a private name of the package
Stored = tuple[dict[str, torch.Tensor], torch.Tensor]
KINDS = {
    "q_proj": ("Int8Tensor", "row"),
    "k_proj": ("Int8Tensor", "all"),
    "v_proj": ("Int8Tensor", "group"),
    "o_proj": ("IntxUnpackedToInt8Tensor", "group"),
    "gate_proj": ("Float8Tensor", "row"),
    "up_proj": ("Float8Tensor", "group"),
    "down_proj": ("Int4Tensor", "group"),
}
"""The class of each weight, and what has a scale of its own."""


def kind_of(name: str) -> tuple[str, str] | None:
    return next((kind for part, kind in KINDS.items() if part in name), None)


def block_of(by: str, rows: int, columns: int) -> tuple[int, int]:
    return {"row": (1, columns), "all": (rows, columns), "group": (1, GROUP)}[by]


def quantize(name: str, weight: torch.Tensor) -> Stored | None:
    """Random numbers and scales in place of a weight, as torchao stores them, and their values."""
    found = kind_of(name)
    if found is None:
        return None
    kind, by = found
    rows, columns = weight.shape
    height, width = block_of(by, rows, columns)
    scale = torch.rand(rows // height, columns // width) / 100 + 0.001
    each = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)
    module, _, leaf = name.rpartition(".")
    tensors: dict[str, torch.Tensor] = {}
    if kind == "Int4Tensor":
        numbers = torch.randint(-8, 8, (rows, columns))
        zero = torch.rand(scale.shape) / 100
        values = numbers * each + zero.repeat_interleave(width, 1)
        low, high = numbers[:, ::2] & 15, numbers[:, 1::2] & 15
        tensors = {"qdata": (low | high << 4).to(torch.uint8).view(torch.int8), "zero_point": zero.t().contiguous()}
        tensors["scale"] = scale.t().contiguous()
    elif kind == "Float8Tensor":
        numbers = torch.randn(rows, columns).to(torch.float8_e4m3fn)
        tensors, values = {"qdata": numbers, "scale": scale}, numbers.float() * each
    else:
        numbers = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
        zero = torch.randint(-9, 9, scale.shape, dtype=torch.int8)
        values = (numbers.int() - zero.int().repeat_interleave(height, 0).repeat_interleave(width, 1)) * each
        tensors = {"qdata": numbers, "scale": scale, "zero_point": zero}
    return {f"{module}._{leaf}_{part}": tensor for part, tensor in tensors.items()}, values


def describe(name: str, shape: tuple[int, ...], **changes: Any) -> str:
    found = kind_of(name)
    if found is None:
        return json.dumps({"_type": "Tensor"})
    kind, by = found
    parts = ["qdata", "scale"] + (["zero_point"] if "Int" in kind else [])
    data = {"block_size": list(block_of(by, *shape)), "dtype": {"_type": "torch.dtype", ATTRIBUTES: "float32"}}
    return json.dumps({"_type": kind, ATTRIBUTES: data, "_tensor_data_names": parts} | changes)


def test_what_others_say_in_a_header_is_left_alone(tmp_path: Path) -> None:
    described = {NAME: describe(NAME, (8, 64)), "b.bias": describe("b.bias", (8,))}
    metadata = {"tensor_names": json.dumps(list(described)), "modelspec.title": "a model", **described}
    save_file(one_weight() | {"b.bias": torch.ones(8)}, tmp_path / "model.safetensors", metadata=metadata)
    assert list(quantized_matrices(tmp_path, "torchao", {}, read_tensors(tmp_path))) == [NAME]


def save_with_metadata(file: Path, tensors: dict[str, torch.Tensor], described: dict[str, str]) -> None:
    save_file(tensors, file, metadata={"format": "pt", "tensor_names": json.dumps(list(described)), **described})


@pytest.mark.anyio
@pytest.mark.parametrize("batching", ["packed", "turns"])
async def test_a_model(tmp_path: Path, batching: str) -> None:
    plain = save(tmp_path, LlamaConfig(**SMALL), {"quant_method": "torchao"}, quantize)
    described = {name: describe(name, tuple(weight.shape)) for name, weight in plain.state_dict().items()}
    file = tmp_path / "model.safetensors"
    save_with_metadata(file, load_file(file), described)
    await check_engine(tmp_path, plain, batching)


NAME = "a.q_proj.weight"
QDATA, SCALE = "a.q_proj._weight_qdata", "a.q_proj._weight_scale"
BAD: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], dict[str, Any], str]] = [
    ("no scale", lambda tensors: tensors.pop(SCALE), {}, f"lacks its tensor '{SCALE}'"),
    ("a scale of another shape", lambda tensors: tensors.update({SCALE: torch.ones(5, 1)}), {}, f"'{SCALE}' has shape"),
    ("a scale of integers", lambda tensors: tensors.update({SCALE: tensors[SCALE].int()}), {}, f"'{SCALE}' is in int"),
    ("numbers in another dtype", lambda tensors: tensors.update({QDATA: tensors[QDATA].int()}), {}, f"'{QDATA}' is in"),
    ("no numbers", lambda tensors: None, {"_tensor_data_names": ["scale"]}, "needs 'qdata'"),
    (
        "blocks that do not divide",
        lambda tensors: None,
        {ATTRIBUTES: {"block_size": [1, 7]}},
        "do not divide its",
    ),
    ("a block without end", lambda tensors: None, {ATTRIBUTES: {"block_size": [1, 2**62]}}, "block_size is"),
    ("no block", lambda tensors: None, {ATTRIBUTES: {}}, "block_size is None"),
    ("no type", lambda tensors: None, {"_type": 7}, "it lacks one of `_type`"),
]


def write(directory: Path, tensors: dict[str, torch.Tensor], described: dict[str, str]) -> None:
    save_with_metadata(directory / "model.safetensors", tensors, described)
    quantized_matrices(directory, "torchao", {}, read_tensors(directory))


def one_weight() -> dict[str, torch.Tensor]:
    found = quantize(NAME, torch.zeros(8, 64))
    assert found is not None
    return found[0]


@pytest.mark.parametrize(("spoil", "changes", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_files(tmp_path: Path, spoil: Any, changes: dict[str, Any], message: str) -> None:
    tensors = one_weight()
    spoil(tensors)
    with pytest.raises(CorruptShardError, match=message) as caught:
        write(tmp_path, tensors, {NAME: describe(NAME, (8, 64), **changes)})
    assert str(tmp_path / "model.safetensors") in str(caught.value)


@pytest.mark.parametrize("metadata", [{}, {"tensor_names": "7"}, {"tensor_names": "[1]"}, {"tensor_names": "["}])
def test_a_header_that_describes_nothing(tmp_path: Path, metadata: dict[str, str]) -> None:
    save_file(one_weight(), tmp_path / "model.safetensors", metadata={"format": "pt", **metadata})
    with pytest.raises(CorruptShardError, match="'tensor_names' is missing"):
        quantized_matrices(tmp_path, "torchao", {}, read_tensors(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_type": "Int4TilePackedTo4dTensor"}, "Int4TilePackedTo4dTensor; hermes_async reads"),
        ({"_type": "MXTensor"}, "MXTensor; hermes_async reads"),
        ({"_tensor_data_names": ["qdata", "scale", "act_pre_scale"]}, "act_pre_scale"),
    ],
)
def test_what_is_not_built_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    tensors = one_weight() | {"a.q_proj._weight_act_pre_scale": torch.ones(64)}
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        write(tmp_path, tensors, {NAME: describe(NAME, (8, 64), **changes)})
    assert f"{tmp_path / 'model.safetensors'}: the weight '{NAME}'" in str(caught.value)
