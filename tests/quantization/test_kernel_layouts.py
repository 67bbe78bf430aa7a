"""Weights of whole numbers in the layout of a kernel are the same weights, and are multiplied to nearly the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from hermes_async import Engine, EngineConfig, SamplingParams
from hermes_async.modeling.laying_out import lay_out, layout_bytes
from hermes_async.modeling.partition import Partition
from hermes_async.quantization.awq import AwqEncoding
from hermes_async.quantization.block_scales import BlockSize
from hermes_async.quantization.encoded_weight import EncodedParameter, EncodedWeight
from hermes_async.quantization.encoding import Encoding, StoredMatrix
from hermes_async.quantization.gguf_blocks import GgufEncoding
from hermes_async.quantization.gptq import GptqEncoding
from hermes_async.quantization.kernel_layouts import Int4Layout, Int8Layout
from hermes_async.quantization.packed_integers import PackedEncoding
from hermes_async.quantization.scaled_numbers import ScaledEncoding
from hermes_async.storage.tensor_spec import TensorSpec

ROWS, COLUMNS, GROUP = 128, 256, 64
Parts = dict[str, torch.Tensor]


def random_parts(encoding: Encoding) -> Parts:
    """Stored tensors of a matrix. Scales are powers of two, so each weight is a bfloat16."""
    if isinstance(encoding, GgufEncoding):
        blocks = torch.randint(0, 256, (ROWS, COLUMNS // 32, 18), dtype=torch.uint8)
        blocks[..., :2] = torch.tensor([2.0**-6], dtype=torch.float16).view(torch.uint8)
        return {"weight": blocks.view(ROWS, -1)}
    generator = torch.Generator().manual_seed(0)
    parts: Parts = {}
    for part, shape in encoding.shapes(ROWS, COLUMNS).items():
        if part == "scale":
            parts[part] = torch.exp2(torch.randint(-8, -4, shape, generator=generator)).bfloat16()
        elif part == "packed" or (part == "zero_point" and not isinstance(encoding, PackedEncoding)):
            octets = torch.randint(0, 256, (*shape, 4), dtype=torch.uint8, generator=generator)
            parts[part] = octets.view(torch.int32).view(shape)
        elif part == "weight":
            parts[part] = torch.randint(-128, 128, shape, dtype=torch.int8, generator=generator)
        else:
            parts[part] = torch.randint(-8, 8, shape, dtype=torch.int8, generator=generator)
    return parts


def encoded(encoding: Encoding, parts: Parts, dtype: torch.dtype = torch.bfloat16) -> EncodedParameter:
    specs = {
        part: TensorSpec(part, Path("model.safetensors"), 0, tensor.nbytes, tensor.dtype, tuple(tensor.shape))
        for part, tensor in parts.items()
    }
    matrix = StoredMatrix(encoding, (ROWS, COLUMNS), specs)
    return EncodedParameter("w", (ROWS, COLUMNS), dtype, (matrix,))


LAID_OUT = [
    (PackedEncoding(4, GROUP), Int4Layout),
    (PackedEncoding(4, None), Int4Layout),
    (PackedEncoding(4, GROUP, "plain"), Int4Layout),
    (GptqEncoding(4, GROUP, less_one=True, ordered=False), Int4Layout),
    (AwqEncoding(GROUP), Int4Layout),
    (GgufEncoding("Q4_0"), Int4Layout),
    (PackedEncoding(8, None), Int8Layout),
    (ScaledEncoding("int8", BlockSize(1, None)), Int8Layout),
    (ScaledEncoding("int8", BlockSize(None, None)), Int8Layout),
]


@pytest.mark.parametrize(("encoding", "layout"), LAID_OUT)
@torch.inference_mode()
def test_a_laid_out_weight_has_the_same_values(encoding: Encoding, layout: type[Encoding]) -> None:
    parts = random_parts(encoding)
    stored = encoded(encoding, parts)
    weight = EncodedWeight.of(stored, lambda name: parts[name.rpartition("/")[2]])
    expected = weight.dequantized()
    few, many = torch.randn(2, COLUMNS).bfloat16(), torch.randn(80, COLUMNS).bfloat16()
    bias = torch.randn(ROWS).bfloat16()
    of_many = weight.product(many, bias)

    laid_out = lay_out(stored, lambda name: parts[name.rpartition("/")[2]])
    assert laid_out is not None
    in_memory, tensors = laid_out
    assert isinstance(in_memory.matrices[0].encoding, layout)
    weight = EncodedWeight.of(in_memory, tensors.__getitem__)
    assert torch.equal(weight.dequantized(), expected)
    assert torch.equal(weight.product(many, bias), of_many)
    exact = few.double() @ expected.double().t() + bias
    torch.testing.assert_close(weight.product(few, bias).double(), exact, rtol=1e-2, atol=2e-2)

    codes = parts["packed" if "packed" in parts else "weight"]
    added = [tensor for tensor in tensors.values() if tensor.untyped_storage().data_ptr() != codes.data_ptr()]
    assert sum(tensor.nbytes for tensor in added) == layout_bytes(stored)  # the numbers lie where they lay


@pytest.mark.parametrize(("type_name", "nbytes", "elements"), [("Q4_1", 20, 32), ("Q4_K", 144, 256)])
@torch.inference_mode()
def test_blocks_with_minimums_are_laid_out(type_name: str, nbytes: int, elements: int) -> None:
    """Scales and minimums are rounded to bfloat16: to a hundredth of what four bits round weights to."""
    rows, columns = ROWS, 512
    blocks = torch.randint(0, 256, (rows * columns // elements, nbytes), dtype=torch.uint8)
    blocks[:, :4] = torch.tensor([2.0**-6, 2.0**-5], dtype=torch.float16).view(torch.uint8)
    if type_name == "Q4_K":
        blocks[3, 4:16] = torch.tensor([0] * 4 + [63] * 4 + [240] * 4, dtype=torch.uint8)  # no scale, but minimums
    weight = blocks.view(rows, -1)
    encoding = GgufEncoding(type_name)
    spec = TensorSpec("weight", Path("model.gguf"), 0, weight.nbytes, weight.dtype, tuple(weight.shape))
    matrix = StoredMatrix(encoding, (rows, columns), {"weight": spec})
    stored = EncodedParameter("w", (rows, columns), torch.bfloat16, (matrix,))
    exact, integers = torch.empty(rows, columns), encoding.integer_rows({"weight": weight}, 0, rows)
    encoding.dequantize({"weight": weight}, 0, rows, exact)
    step = integers.scales.float().repeat_interleave(32, dim=1)
    assert integers.minimums is not None
    least = integers.minimums.float().repeat_interleave(32, dim=1)
    assert torch.equal(integers.numbers * step - least, exact)

    laid_out = lay_out(stored, lambda name: weight)
    assert laid_out is not None
    in_memory, tensors = laid_out
    own = EncodedWeight.of(in_memory, tensors.__getitem__)
    values = own.dequantized().float()
    assert bool(((values - exact).abs() <= (step * 16 + least.abs()) * 2**-8 + exact.abs() * 2**-8).all())
    inputs = torch.randn(2, columns).bfloat16()
    torch.testing.assert_close(own.product(inputs, None).float(), inputs.float() @ values.t(), rtol=2e-2, atol=1.0)


@pytest.mark.parametrize(
    ("encoding", "dtype"),
    [
        (PackedEncoding(4, GROUP), torch.float32),
        (PackedEncoding(2, GROUP), torch.bfloat16),
        (PackedEncoding(8, GROUP), torch.bfloat16),
        (PackedEncoding(8, None, "plain"), torch.bfloat16),
        (PackedEncoding(4, GROUP, ordered=True), torch.bfloat16),
        (ScaledEncoding("fp8", BlockSize(1, None)), torch.bfloat16),
    ],
)
def test_a_weight_that_no_kernel_takes_stays_as_it_is(encoding: Encoding, dtype: torch.dtype) -> None:
    stored = encoded(encoding, random_parts(PackedEncoding(4, GROUP)), dtype)
    assert layout_bytes(stored) == 0

    def part_of(name: str) -> torch.Tensor:
        raise AssertionError(f"{name} was looked at")

    assert lay_out(stored, part_of) is None


@pytest.mark.parametrize("offset", range(0, 20, 4))
@torch.inference_mode()
def test_numbers_of_eight_bits_may_lie_anywhere_in_memory(offset: int) -> None:
    encoding = ScaledEncoding("int8", BlockSize(1, None))
    parts = random_parts(encoding)
    room = torch.empty(parts["weight"].numel() + 64, dtype=torch.int8)
    start = -room.data_ptr() % 64 + offset
    place = room[start : start + parts["weight"].numel()].view(parts["weight"].shape)
    parts["weight"] = place.copy_(parts["weight"])
    stored = encoded(encoding, parts)
    laid_out = lay_out(stored, lambda name: parts[name.rpartition("/")[2]])
    assert (laid_out is None) == (offset % 16 != 0)  # the kernel would end the process
    if laid_out is not None:
        in_memory, tensors = laid_out
        weight = EncodedWeight.of(in_memory, tensors.__getitem__)
        for num_tokens in (1, 2, 3, 5, 8, 20):
            inputs = torch.randn(num_tokens, COLUMNS).bfloat16()
            exact = inputs.double() @ weight.dequantized().double().t()
            torch.testing.assert_close(weight.product(inputs, None).double(), exact, rtol=1e-2, atol=2e-2)


def test_no_kernel_for_eight_bits_takes_rows_that_lie_at_any_address() -> None:
    encoding, columns = ScaledEncoding("int8", BlockSize(1, None)), COLUMNS + 8
    parts = {part: torch.ones(shape, dtype=torch.int8) for part, shape in encoding.shapes(ROWS, columns).items()}
    spec = {
        part: TensorSpec(part, Path(), 0, tensor.nbytes, tensor.dtype, tensor.shape) for part, tensor in parts.items()
    }
    parameter = EncodedParameter("w", (ROWS, columns), torch.bfloat16, (StoredMatrix(encoding, (ROWS, columns), spec),))
    assert layout_bytes(parameter) == 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in bfloat16, whose layers have 4-bit numbers in groups of 64."""
    path = tmp_path_factory.mktemp("int4")
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=300,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        (rows, columns), module = tensors.pop(name).shape, name.removesuffix(".weight")
        octets = torch.randint(0, 256, (rows, columns // 8, 4), dtype=torch.uint8)
        tensors[f"{module}.weight_packed"] = octets.view(torch.int32).view(rows, columns // 8)
        tensors[f"{module}.weight_scale"] = torch.full((rows, columns // GROUP), 0.01, dtype=torch.bfloat16)
        tensors[f"{module}.weight_shape"] = torch.tensor([rows, columns])
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    described = json.loads((path / "config.json").read_text()) | {"quantization_config": settings}
    (path / "config.json").write_text(json.dumps(described))
    return path


@pytest.mark.anyio
async def test_an_engine_lays_out_weights_that_stay_only_if_asked_to(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products, product = [], Int4Layout.product

    def counted(layout: Int4Layout, parts: Parts, inputs: torch.Tensor) -> torch.Tensor | None:
        products.append(len(inputs))
        return product(layout, parts, inputs)

    monkeypatch.setattr(Int4Layout, "product", counted)
    prompt, params = [5, 9, 2, 33], SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    input_ids = torch.tensor([[7]])
    async with Engine(checkpoint, memory_budget="64MiB") as engine:
        assert engine.plan.layout_bytes == 0
        assert any("kernels='fastest'" in line for line in engine.plan.explanation)
        expected = (await engine.complete(prompt, params)).token_ids
        logits = (await engine.forward(input_ids=input_ids)).logits
    assert not products
    fastest = EngineConfig(kernels="fastest")
    async with Engine(checkpoint, memory_budget="64MiB", config=fastest) as engine:
        partition = engine.plan.partition
        assert isinstance(partition, Partition)
        added = sum(map(layout_bytes, partition.encoded.values()))
        assert 0 < added <= engine.plan.layout_bytes <= engine.plan.workspace_bytes
        assert any("laid out" in line for line in engine.plan.explanation)
        assert any("int4 (groups of 64)" in line and "as stored" in line for line in engine.plan.explanation)
        assert (await engine.complete(prompt, params)).token_ids == expected
        torch.testing.assert_close((await engine.forward(input_ids=input_ids)).logits, logits, rtol=2e-2, atol=2e-2)
        assert {1, len(prompt)} <= set(products)
        await engine.resize(engine.plan.memory_budget // 2)
        least = engine.plan.minimum_budget
        await engine.resize(engine.plan.memory_budget * 2)
        assert (await engine.complete(prompt, params)).token_ids == expected
    async with Engine(checkpoint, memory_budget=least, config=fastest) as engine:
        products.clear()
        assert engine.plan.num_buffers and engine.plan.layout_bytes == 0
        assert (await engine.complete(prompt, params)).token_ids == expected
    assert not products
