"""Checkpoints of bitsandbytes: their numbers are those of the format, and an engine computes with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import GPT2Config, LlamaConfig

from hermes_async.errors import CheckpointError, CorruptShardError, UnsupportedModelError
from hermes_async.quantization.methods import quantized_matrices
from hermes_async.storage.checkpoint import read_tensors
from hermes_async.storage.tensor_bytes import read_small_tensor
from tests.modeling.test_activations import allocated
from tests.quantization.float_formats import SMALL, check_engine, save

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
FP4 = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
CODES = {"nf4": NF4, "fp4": (*FP4, *(-number for number in FP4))}
Stored = tuple[dict[str, torch.Tensor], torch.Tensor]


def bits4(name: str, shape: tuple[int, ...], kind: str, *, nested: bool, dtype: Any, block: int = 64) -> Stored:
    """A matrix of random codes as bitsandbytes stores it, and its values in `dtype`."""
    count = prod(shape)
    codes = torch.randint(0, 16, (count + count % 2,))
    blocks = -(-count // block)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "shape": shape}
    state["dtype"] = str(dtype).removeprefix("torch.")
    tensors = {f"{name}.quant_map": torch.tensor(CODES[kind])}
    if nested:
        scale_codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8)
        numbers, outer = torch.linspace(-1, 1, 256), torch.rand(-(-blocks // 256)) / 4
        each = torch.tensor([outer[idx // 256].item() for idx in range(blocks)])
        offset = torch.tensor(0.3)
        scales = numbers[scale_codes.long()] * each + offset
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset.item()}
        tensors |= {f"{name}.absmax": scale_codes, f"{name}.nested_absmax": outer, f"{name}.nested_quant_map": numbers}
    else:
        scales = torch.rand(blocks)
        tensors[f"{name}.absmax"] = scales
    tensors[name] = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None]
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"{name}.quant_state.bitsandbytes__{kind}"] = text
    values = [CODES[kind][code] for code in codes[:count].tolist()]
    return tensors, (torch.tensor(values) * scales.repeat_interleave(block)[:count]).to(dtype).view(shape)


def int8(name: str, shape: tuple[int, ...]) -> Stored:
    numbers, largest = torch.randint(-127, 128, shape, dtype=torch.int8), torch.rand(shape[0])
    tensors = {name: numbers, name.removesuffix("weight") + "SCB": largest}
    tensors[f"{name}_format"] = torch.tensor(0, dtype=torch.uint8)
    return tensors, numbers * largest[:, None] * 7.874015718698502e-3


def write(directory: Path, tensors: dict[str, torch.Tensor]) -> Any:
    """The matrices of a file with these tensors."""
    save_file(tensors, directory / "model.safetensors")
    return quantized_matrices(directory, "bitsandbytes", {}, read_tensors(directory))


def loaded(matrix: Any) -> dict[str, torch.Tensor]:
    return {
        part: torch.frombuffer(bytearray(read_small_tensor(spec, 1 << 30)), dtype=spec.dtype).view(spec.shape)
        for part, spec in matrix.parts.items()
    }


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("shape", "block"), [((64, 128), 64), ((33, 100), 64), ((7, 33), 64), ((40, 192), 128), ((300, 512), 32)]
)
def test_each_number_is_that_of_its_code(
    tmp_path: Path, kind: str, nested: bool, shape: tuple[int, int], block: int
) -> None:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if nested else torch.float32
    tensors, values = bits4("a.weight", shape, kind, nested=nested, dtype=dtype, block=block)
    matrix = write(tmp_path, tensors)["a.weight"]
    encoding, parts = matrix.encoding, loaded(matrix)
    step = min(shape[0], 3 * encoding.row_step)
    for out_dtype in (torch.float32, torch.bfloat16):
        out = torch.empty(shape, dtype=out_dtype)
        for start in range(0, shape[0], step):
            encoding.dequantize(parts, start, min(shape[0], start + step), out[start : start + step])
        assert torch.equal(out, values.to(out_dtype))
    assert matrix.divisible is not nested
    if matrix.divisible and encoding.row_step < shape[0]:
        rows = matrix.rows(encoding.row_step, shape[0])
        rows.check()
        out = torch.empty(rows.shape)
        encoding.dequantize(loaded(rows), 0, len(out), out)
        assert torch.equal(out, values[encoding.row_step :].float())


@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
def test_scratch_is_what_is_taken_at_most(tmp_path: Path, kind: str) -> None:
    shape = (300, 512)
    if kind == "int8":
        tensors, _ = int8("a.weight", shape)
    else:
        tensors, _ = bits4("a.weight", shape, "nf4", nested=kind == "nested", dtype=torch.bfloat16)
    matrix = write(tmp_path, tensors)["a.weight"]
    parts, out = loaded(matrix), torch.empty(shape)
    matrix.encoding.dequantize(parts, 0, 300, out)
    taken = allocated(lambda: matrix.encoding.dequantize(parts, 0, 300, out))
    assert 0 < taken.most_bytes <= matrix.encoding.scratch_bytes(*shape, 4)


def mixed(name: str, weight: torch.Tensor) -> Stored | None:
    """Attention in NF4 with nested scales, half of the MLP in FP4, the rest in 8 bits."""
    if "proj" not in name:
        return None
    shape = tuple(weight.shape)
    if "self_attn" in name:
        return bits4(name, shape, "nf4", nested=True, dtype=torch.float32)
    return int8(name, shape) if "down" in name else bits4(name, shape, "fp4", nested=False, dtype=torch.float32)


@pytest.mark.anyio
@pytest.mark.parametrize("batching", ["packed", "turns"])
async def test_a_model(tmp_path: Path, batching: str) -> None:
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    await check_engine(tmp_path, save(tmp_path, LlamaConfig(**SMALL), settings, mixed), batching)


@pytest.mark.anyio
async def test_weights_that_the_model_has_the_other_way_round(tmp_path: Path) -> None:
    """They are stored as those of an `nn.Linear`. Square ones would be wrong without an error."""

    def quantize(name: str, weight: torch.Tensor) -> Stored | None:
        if not name.endswith(("c_proj.weight", "c_attn.weight", "c_fc.weight")):
            return None
        tensors, values = int8(name, (weight.shape[1], weight.shape[0]))
        return tensors, values.t().contiguous()

    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=64, bos_token_id=0, eos_token_id=1,
        initializer_range=0.2,
    )  # fmt: skip
    settings = {"load_in_8bit": True}  # a file of old names no method
    await check_engine(tmp_path, save(tmp_path, config, settings, quantize), "packed")


def without(name: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


def with_tensor(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], Any]:
    return lambda tensors: tensors.update({name: tensor})


def with_state(**changes: Any) -> Callable[[dict[str, torch.Tensor]], Any]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        name = "a.weight.quant_state.bitsandbytes__nf4"
        state = json.loads(bytes(tensors[name].tolist())) | changes
        kept = {key: value for key, value in state.items() if value is not None}
        tensors[name] = torch.tensor(list(json.dumps(kept).encode()), dtype=torch.uint8)

    return change


STATE = "a.weight.quant_state.bitsandbytes__nf4"
BAD: list[tuple[str, Callable[[dict[str, torch.Tensor]], Any], str]] = [
    ("no description", without(STATE), "description .* is missing"),
    ("no absmax", without("a.weight.absmax"), "needs 'a.weight.absmax', which is missing"),
    ("no nested map", without("a.weight.nested_quant_map"), "needs 'a.weight.nested_quant_map'"),
    ("no weight", without("a.weight"), "needs 'a.weight'"),
    ("a description that is no JSON", with_tensor(STATE, torch.zeros(9, dtype=torch.uint8)), "no JSON"),
    ("a description that is a list", with_tensor(STATE, torch.tensor(list(b"[]"), dtype=torch.uint8)), "it lacks one"),
    ("a huge description", with_tensor(STATE, torch.zeros(70_000, dtype=torch.uint8)), "may have at most 65536"),
    ("another kind", with_state(quant_type="fp4"), "quant_type is 'fp4'"),
    ("no shape", with_state(shape=None), "it lacks one of"),
    ("a huge shape", with_state(shape=[2**60, 2**60]), "shape is"),
    ("a shape of another size", with_state(shape=[32, 128]), "'a.weight' has shape .*32 rows and 128 columns"),
    ("an odd block", with_state(blocksize=48), "a block size is 48"),
    ("a block that is no number", with_state(blocksize="64"), "a block size is '64'"),
    ("an unknown dtype", with_state(dtype="int8"), "dtype is 'int8'"),
    ("an offset that is not a number", with_state(nested_offset=float("nan")), "nested_offset is nan"),
    ("nested scales in another dtype", with_state(nested_dtype="float16"), "nested_dtype is 'float16'"),
    ("scales that are not nested", with_state(nested_blocksize=None), "is in uint8, and .* needs it in float32"),
    ("too few scales", with_tensor("a.weight.absmax", torch.zeros(5, dtype=torch.uint8)), "'a.weight.absmax' has sh"),
    ("a weight too short", with_tensor("a.weight", torch.zeros(9, 1, dtype=torch.uint8)), "'a.weight' has shape .9."),
    ("8 bits, no scales", without("b.SCB"), "needs 'b.SCB'"),
    ("8 bits, scales of another shape", with_tensor("b.SCB", torch.zeros(7)), "'b.SCB' has shape .7."),
]


@pytest.mark.parametrize(("spoil", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_files(tmp_path: Path, spoil: Callable[[dict[str, torch.Tensor]], Any], message: str) -> None:
    tensors = bits4("a.weight", (64, 128), "nf4", nested=True, dtype=torch.bfloat16)[0] | int8("b.weight", (8, 8))[0]
    spoil(tensors)
    with pytest.raises(CorruptShardError, match=message) as caught:
        write(tmp_path, tensors)
    assert str(tmp_path / "model.safetensors") in str(caught.value)


def test_an_order_for_gpus_is_refused(tmp_path: Path) -> None:
    tensors = int8("b.weight", (8, 8))[0] | {"b.weight_format": torch.tensor(2, dtype=torch.uint8)}
    with pytest.raises(UnsupportedModelError, match=r"'b.weight' is in an order for one kind of GPU"):
        write(tmp_path, tensors)


def test_a_file_that_changes_while_it_is_opened(tmp_path: Path) -> None:
    tensors, _ = bits4("a.weight", (64, 128), "nf4", nested=True, dtype=torch.bfloat16)
    save_file(tensors, tmp_path / "model.safetensors")
    specs = read_tensors(tmp_path)
    save_file(tensors | {"b.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="was changed"):
        quantized_matrices(tmp_path, "bitsandbytes", {}, specs)
