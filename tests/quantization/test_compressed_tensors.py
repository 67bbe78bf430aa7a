"""compressed-tensors: numbers are those of its formats, and models of several of them give a plain model's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.quantization.block_scales import BlockSize
from hermes_async.quantization.derived import Bfloat16Values
from hermes_async.quantization.encoding import StoredMatrix
from hermes_async.quantization.mxfp4 import Mxfp4Encoding
from hermes_async.quantization.packed_integers import PackedEncoding, unpacked
from hermes_async.quantization.scaled_numbers import ScaledEncoding
from tests.quantization.float_formats import SMALL, check_engine, e2m1, save
from tests.quantization.integer_formats import (
    DTYPES,
    check,
    check_scratch,
    each_column,
    found_in,
    pack,
    some_numbers,
    some_scales,
)

I32, BF16, F32 = torch.int32, torch.bfloat16, torch.float32
FP8, U8 = torch.float8_e4m3fn, torch.uint8


def products(differences: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The library computes in the dtype of the scale."""
    return differences.to(scale.dtype) * scale


def packed(
    bits: int,
    rows: int,
    columns: int,
    size: int,
    *,
    zero: str | None = None,
    scale_dtype: Any = BF16,
    order: bool = False,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The parts of a matrix, and what they stand for."""
    groups, middle = columns // size, 1 << (bits - 1)
    numbers, scale = some_numbers(bits, rows, columns), some_scales(scale_dtype, rows, groups)
    zeros = some_numbers(bits, rows, groups) if zero else torch.full((rows, groups), middle)
    g_idx = torch.arange(columns) // size
    g_idx = g_idx[torch.randperm(columns)] if order else g_idx
    parts = {"packed": pack(numbers, bits), "scale": scale}
    if zero:
        parts["zero_point"] = (
            pack(zeros.t(), bits).t().contiguous() if zero == "packed" else (zeros - middle).to(torch.int8)
        )
    if order:
        parts["g_idx"] = g_idx.to(I32)
    return parts, products(numbers - zeros[:, g_idx], scale[:, g_idx])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", [None, "packed", "plain"])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_packed_numbers(bits: int, zero: str | None, scale_dtype: torch.dtype) -> None:
    for columns, size in ((96, 32), (128, 128), (100, 100)):
        parts, expected = packed(bits, 42, columns, size, zero=zero, scale_dtype=scale_dtype)
        encoding = PackedEncoding(bits, None if size == columns else size, zero)
        check(encoding, parts, expected)
        check_scratch(encoding, parts)


@pytest.mark.parametrize("lowest", [-60, 60], ids=["scales of models", "huge scales"])
def test_scales_of_each_size_and_sign(lowest: int) -> None:
    parts, _ = packed(4, 64, 128, 64)
    exponents = torch.arange(lowest, lowest + 64).float()
    parts["scale"] = torch.stack([1.5 * torch.exp2(exponents), -torch.exp2(exponents)], 1).to(torch.bfloat16)
    numbers = unpacked(parts["packed"], 4, 128).float() - 8
    check(PackedEncoding(4, 64), parts, products(numbers, parts["scale"].repeat_interleave(64, 1)))


def test_columns_in_another_order() -> None:
    parts, expected = packed(4, 40, 96, 32, zero="packed", order=True)
    check(PackedEncoding(4, 32, "packed", True), parts, expected)
    check_scratch(PackedEncoding(4, 32, "packed", True), parts)


def test_blocks_of_rows_can_be_read_apart() -> None:
    parts, expected = packed(4, 42, 96, 32, zero="packed", order=True)
    encoding = PackedEncoding(4, 32, "packed", True)
    start, stop = 16, 42
    bounds = {part: (encoding.part_rows(part, start), encoding.part_rows(part, stop)) for part in parts}
    cut = {part: parts[part] if first is None else parts[part][first:last] for part, (first, last) in bounds.items()}
    out = torch.empty(stop - start, 96, dtype=BF16)
    encoding.dequantize(cut, 0, stop - start, out)
    torch.testing.assert_close(out, expected[start:stop], rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("block", [(None, None), (1, None), (1, 32), (16, 64)], ids=["tensor", "row", "group", "block"])
@pytest.mark.parametrize("scale_dtype", DTYPES)
def test_numbers_of_a_byte(kind: str, block: tuple[int | None, int | None], scale_dtype: torch.dtype) -> None:
    rows, columns = 40, 96
    height, width = block[0] or rows, block[1] or columns
    scale = some_scales(scale_dtype, -(-rows // height), -(-columns // width))
    numbers = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    if kind == "fp8":
        numbers = torch.arange(rows * columns).to(U8).view(FP8).view(rows, columns)
        numbers = torch.where(numbers.float().isnan(), 0.0, numbers.float()).to(FP8)
    zero = torch.randint(-20, 20, scale.shape, dtype=torch.int8) if kind == "int8" else torch.zeros_like(scale)
    scales, zeros = (
        grid.repeat_interleave(height, 0).repeat_interleave(width, 1)[:rows, :columns] for grid in (scale, zero)
    )
    expected = products(numbers.to(scale_dtype) - zeros.to(scale_dtype), scales)
    parts = {"weight": numbers, "scale": scale} | ({"zero_point": zero} if kind == "int8" else {})
    check(ScaledEncoding(kind, BlockSize(*block), zero_point=kind == "int8"), parts, expected)
    check_scratch(ScaledEncoding(kind, BlockSize(*block), zero_point=kind == "int8"), parts)


def test_fp8_numbers_that_are_none_and_large_scales() -> None:
    numbers = torch.arange(256).to(U8).view(FP8).view(4, 64)
    for scale in (1.0, 500.0, -3000.0):
        parts = {"weight": numbers, "scale": torch.full((4, 1), scale)}
        out = torch.empty(4, 64)
        ScaledEncoding("fp8", BlockSize(1, None)).dequantize(parts, 0, 4, out)
        torch.testing.assert_close(out, numbers.float() * scale, rtol=0, atol=0, equal_nan=True)


# --- whole models ---


def group(targets: list[str], form: str | None = None, **weights: Any) -> dict[str, Any]:
    entry = {"targets": targets, "weights": {"num_bits": 4, "type": "int", "symmetric": True, **weights}}
    return entry | ({"format": form} if form else {})


def settings_of(form: str, **groups: Any) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": form,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


MIXED = settings_of(
    "mixed-precision",
    of_class=group(["Linear"], "pack-quantized", group_size=32, strategy="group"),
    ordered=group(["re:.*up_proj$"], "pack-quantized", group_size=32, strategy="group", symmetric=False),
    rows=group(["re:.*k_proj"], "pack-quantized", num_bits=8, strategy="channel", symmetric=False),
    integers=group(["re:.*v_proj"], "int-quantized", num_bits=8, strategy="channel"),
    fp8=group(["re:.*o_proj"], "float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 32]),
    fp4=group(["re:.*down_proj"], "nvfp4-pack-quantized", type="float", group_size=16, strategy="tensor_group"),
    one=group(["model.layers.1.mlp.down_proj"], "mxfp4-pack-quantized", type="float", group_size=32, strategy="group"),
)


def mixed(name: str, weight: torch.Tensor) -> Any:
    """Stores each kind of matrix in another format; the first layer's gate is left out."""
    if "_proj" not in name or "0.mlp.gate_proj" in name:
        return None
    rows, columns = weight.shape
    if "k_proj" in name:
        parts, values = packed(8, rows, columns, columns, zero="packed", scale_dtype=F32)
    elif "v_proj" in name or "o_proj" in name:
        is_fp8 = "o_proj" in name
        numbers = (weight * 100).to(FP8) if is_fp8 else (weight * 100).clamp(-127, 127).to(torch.int8)
        scale = some_scales(BF16, *((rows // 16, columns // 32) if is_fp8 else (rows, 1)))
        each = scale.repeat_interleave(rows // scale.shape[0], 0).repeat_interleave(columns // scale.shape[1], 1)
        parts, values = {"": numbers, "scale": scale}, products(numbers.to(BF16), each)
    elif "1.mlp.down_proj" in name:
        octets, scale = (
            torch.randint(0, 256, (rows, columns // 2), dtype=U8),
            torch.full((rows, columns // 32), 121, dtype=U8),
        )
        parts, values = {"packed": octets, "scale": scale}, e2m1(octets) * 2.0**-6
    elif "down_proj" in name:
        octets, of_all = torch.randint(0, 256, (rows, columns // 2), dtype=U8), torch.tensor([900.0])
        scale = (torch.rand(rows, columns // 16) * 20 + 10).to(FP8)
        parts = {"packed": octets, "scale": scale, "global_scale": of_all}
        values = (e2m1(octets) * each_column(scale.float() / of_all, columns)).to(BF16)
    elif "up_proj" in name:
        parts, values = packed(4, rows, columns, 32, zero="packed", order=True)
    else:
        parts, values = packed(4, rows, columns, 32)
    stored = {f"{name}_{part}" if part else name: tensor for part, tensor in parts.items()}
    return {**stored, f"{name}_shape": torch.tensor([rows, columns])}, values.float()


@pytest.mark.anyio
@pytest.mark.parametrize(("batching", "budget"), [("packed", None), ("turns", None), ("packed", 64 << 20)])
async def test_a_model_of_many_formats(tmp_path: Path, batching: str, budget: int | None) -> None:
    plain = save(tmp_path, LlamaConfig(**SMALL), MIXED, mixed)
    await check_engine(tmp_path, plain, batching, budget)


@pytest.mark.anyio
@pytest.mark.parametrize("experts_bits", [8, 4])
async def test_a_mixture_of_experts(tmp_path: Path, experts_bits: int) -> None:
    def quantize(name: str, weight: torch.Tensor) -> Any:
        if "_proj" not in name:
            return None
        rows, columns = weight.shape
        if "experts" in name and experts_bits == 8:
            numbers, scale = (weight * 100).to(FP8), some_scales(BF16, rows, 1)
            return {name: numbers, f"{name}_scale": scale}, numbers.float() * scale.float()  # not in the scale's dtype
        parts, values = packed(4, rows, columns, 32)
        return {f"{name}_{part}": tensor for part, tensor in parts.items()}, values.float()

    config = Qwen3MoeConfig(
        **SMALL, head_dim=16, num_experts=48, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
    )
    settings = settings_of(
        "mixed-precision",
        attention=group(["re:.*self_attn.*"], "pack-quantized", group_size=32, strategy="group"),
        experts=group(["re:.*experts.*"], "float-quantized", num_bits=8, type="float", strategy="channel")
        if experts_bits == 8
        else group(["re:.*experts.*"], "pack-quantized", group_size=32, strategy="group"),
    )
    await check_engine(tmp_path, save(tmp_path, config, settings, quantize), "packed")


# --- configurations, and bad input ---

GOOD = {"m.weight_packed": (I32, (16, 8)), "m.weight_scale": (BF16, (16, 2)), "m.weight_shape": (torch.int64, (2,))}
SETTINGS = settings_of("pack-quantized", a=group(["Linear"], group_size=32, strategy="group"))


def encoding_of(settings: Any, **tensors: Any) -> StoredMatrix:
    named = [(name.replace("m_", "m."), *rest) for name, rest in tensors.items()]
    (matrix,) = found_in(
        "compressed-tensors", settings, named or [(name, *rest) for name, rest in GOOD.items()]
    ).values()
    return matrix


def test_which_group_a_module_belongs_to() -> None:
    def of(*targets: str, **more: Any) -> int:
        groups = {
            str(size): group([target], group_size=size) for size, target in zip((8, 16, 32, 64), targets, strict=False)
        }
        shape = (BF16, (16, 64 // more.pop("size", 32)))
        tensors = {**GOOD, "m.weight_scale": shape}
        found = found_in(
            "compressed-tensors",
            settings_of("pack-quantized", **groups),
            [(name, *rest) for name, rest in tensors.items()],
        )
        return found["m.weight"].encoding.group_size

    assert of("Linear", "re:m$", "m") == 32  # a name comes before a pattern, and a pattern before a class
    assert of("Linear", "re:x", "re:m") == 32
    assert of("Embedding", "re:x", "Linear") == 32
    assert of("LinearBase", size=8) == 8  # the only one
    with pytest.raises(CorruptShardError, match=r"no group of config\.json has 'm' as a target"):
        of("Embedding", "re:n", "x")


def test_forms_of_scales() -> None:
    int8 = (torch.int8, (16, 64))
    for shape, strategy, block in (
        ((), "tensor", (None, None)),
        ((1,), "tensor", (None, None)),
        ((1, 1), None, (None, None)),
        ((16,), "channel", (1, None)),
        ((16, 1), None, (1, None)),
        ((16, 2), "group", (1, 32)),
    ):
        weights = {"strategy": strategy, "num_bits": 8, **({"group_size": 32} if strategy == "group" else {})}
        settings = settings_of("int-quantized", a=group(["Linear"], **weights))
        matrix = encoding_of(settings, **{"m.weight": int8, "m.weight_scale": (F32, shape)})
        assert matrix.encoding == ScaledEncoding("int8", BlockSize(*block))
    settings = settings_of("mxfp8-quantized", a=group(["Linear"], num_bits=8, type="float", group_size=32))
    matrix = encoding_of(settings, **{"m.weight": (FP8, (16, 64)), "m.weight_scale": (U8, (16, 2))})
    assert matrix.encoding == ScaledEncoding("fp8", BlockSize(1, 32))


def test_stacked_matrices_and_fp4() -> None:
    matrix = encoding_of(SETTINGS, **{"m.weight_packed": (I32, (3, 16, 8)), "m.weight_scale": (BF16, (3, 16, 2))})
    assert (matrix.shape, len(matrix.matrices())) == ((3, 16, 64), 3)
    nvfp4 = {"m.weight_packed": (U8, (16, 32)), "m.weight_scale": (FP8, (16, 4)), "m.weight_global_scale": (F32, (1,))}
    settings = settings_of("nvfp4-pack-quantized", a=group(["Linear"], type="float", group_size=16))
    assert isinstance(encoding_of(settings, **nvfp4).encoding, Bfloat16Values)
    mxfp4 = {"m.weight_packed": (U8, (16, 32)), "m.weight_scale": (U8, (16, 2))}
    settings = settings_of("mxfp4-pack-quantized", a=group(["Linear"], type="float", group_size=32))
    assert encoding_of(settings, **mxfp4).encoding == Mxfp4Encoding()


def test_settings_of_older_checkpoints() -> None:
    older = {
        "quantization_config": {**SETTINGS, "quantization_status": "frozen"},
        "sparsity_config": {"format": "dense"},
    }
    assert encoding_of(older).encoding == PackedEncoding(4, 32)
    with pytest.raises(UnsupportedModelError, match="sparse"):
        encoding_of({**older, "sparsity_config": {"format": "sparse-bitmask"}})


GROUP = {"group_size": 32, "strategy": "group"}
BAD = [
    ({"m.weight_scale": None}, {}, {}, CorruptShardError, r"scale \('m.weight_scale'\) is missing"),
    ({"m.weight_scale": (BF16, (16, 3))}, {}, {}, CorruptShardError, "'m.weight_packed' has shape"),
    ({"m.weight_scale": (BF16, (15, 2))}, {}, {}, CorruptShardError, "'m.weight_scale' has shape"),
    ({"m.weight_scale": (BF16, (32,))}, {}, {}, CorruptShardError, "'m.weight_scale' of shape"),
    ({"m.weight_scale": (I32, (16, 2))}, {}, {}, CorruptShardError, "'m.weight_scale' is in int32"),
    ({"m.weight_packed": (I32, (16, 7))}, {}, {}, CorruptShardError, "'m.weight_packed' has shape"),
    ({"m.weight_packed": (torch.int16, (16, 8))}, {}, {}, CorruptShardError, "'m.weight_packed' is in int16"),
    ({}, {"symmetric": False}, {}, CorruptShardError, r"zero_point \('m.weight_zero_point'\) is missing"),
    ({"m.weight_zero_point": (I32, (3, 2))}, {"symmetric": False}, {}, CorruptShardError, "zero_point' has shape"),
    ({"m.weight_zero_point": (F32, (16, 2))}, {}, {}, CorruptShardError, "zero_point' is in float32"),
    ({"m.weight_g_idx": (I32, (63,))}, {}, {}, CorruptShardError, "g_idx' has shape"),
    ({"m.weight_g_idx": (F32, (64,))}, {}, {}, CorruptShardError, "g_idx' is in float32"),
    ({}, {"group_size": 48}, {}, CorruptShardError, "'m.weight_packed' has shape"),
    ({}, {"num_bits": 5}, {}, UnsupportedModelError, "has 5-bit int numbers"),
    ({}, {"type": "float"}, {}, UnsupportedModelError, "has 4-bit float numbers"),
    ({}, {}, {"format": "marlin-24"}, UnsupportedModelError, "is stored as marlin-24"),
    ({}, {}, {"quantization_status": "calibration"}, UnsupportedModelError, "quantization_status 'calibration'"),
    ({}, {}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, UnsupportedModelError, "'sparse-24-bitmask'"),
    ({}, {}, {"transform_config": {"config_groups": {"u": {}}}}, UnsupportedModelError, "transforms activations"),
    ({}, {}, {"config_groups": {"W4A16": ["Linear"]}}, UnsupportedModelError, "'W4A16'"),
    ({}, {}, {"config_groups": {}}, CorruptShardError, "no group of config.json"),
]


@pytest.mark.parametrize(
    ("changed", "weights", "settings", "error", "message"), BAD, ids=[str(idx) for idx in range(len(BAD))]
)
def test_bad_packed_weights(changed: Any, weights: Any, settings: Any, error: Any, message: str) -> None:
    tensors = [(name, *rest) for name, rest in {**GOOD, **changed}.items() if rest is not None]
    config = settings_of("pack-quantized", a=group(["Linear"], **{**GROUP, **weights})) | settings
    with pytest.raises(error, match=message) as caught:
        found_in("compressed-tensors", config, tensors)
    assert type(caught.value) is error
    assert "folder" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"m.weight": (FP8, (16, 64))}, r"scale \('m.weight_scale'\) is missing"),
        ({"m.weight": (FP8, (16, 64)), "m.weight_scale": (F32, (16, 2))}, "'m.weight_scale' has shape"),
        ({"m.weight": (FP8, (16, 64)), "m.weight_scale": (U8, (16, 1))}, "'m.weight_scale' is in uint8"),
        ({"m.weight": (F32, (16, 64)), "m.weight_scale": (F32, (16, 1))}, "'m.weight' is in float32"),
        ({"m.weight": (FP8, (64,)), "m.weight_scale": (F32, (1,))}, "'m.weight' of shape"),
    ],
)
def test_bad_numbers_of_a_byte(tensors: Any, message: str) -> None:
    settings = settings_of("float-quantized", a=group(["Linear"], num_bits=8, type="float", strategy="channel"))
    with pytest.raises(CorruptShardError, match=message):
        found_in("compressed-tensors", settings, [(name, *rest) for name, rest in tensors.items()])
