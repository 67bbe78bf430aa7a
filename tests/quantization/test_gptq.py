"""GPTQ's layout, and AutoRound's: numbers are those of the format, and models give a plain model's answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from hermes_async import Engine
from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.quantization.gptq import GptqEncoding
from hermes_async.quantization.methods import quantized_matrices
from hermes_async.storage.checkpoint import Checkpoint
from tests.quantization.float_formats import SMALL, check_engine, save
from tests.quantization.integer_formats import (
    check,
    check_scratch,
    each_column,
    found_in,
    pack,
    some_numbers,
    some_scales,
)

I32, F16 = torch.int32, torch.float16
SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}


def stored(
    bits: int, rows: int, columns: int, size: int, *, less_one: bool = True, order: bool = False
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of a matrix [rows, columns], and what they stand for."""
    groups = columns // size
    numbers, zero = some_numbers(bits, rows, columns), some_numbers(bits, rows, groups).clamp(min=1)
    scale = some_scales(F16, rows, groups)
    g_idx = torch.arange(columns) // size
    if order:
        g_idx = g_idx[torch.randperm(columns)]
    tensors = {
        "qweight": pack(numbers, bits).t().contiguous(),
        "qzeros": pack((zero - int(less_one)).t(), bits),
        "scales": scale.t().contiguous(),
        "g_idx": g_idx.to(I32),
    }
    return tensors, (numbers - zero[:, g_idx]).float() * scale.float()[:, g_idx]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("less_one", [True, False], ids=["v1", "v2"])
@pytest.mark.parametrize("order", [True, False], ids=["ordered", "plain"])
def test_numbers(bits: int, less_one: bool, order: bool) -> None:
    tensors, expected = stored(bits, 96, 128, 32, less_one=less_one, order=order)
    parts = {"packed": "qweight", "zero_point": "qzeros", "scale": "scales", "g_idx": "g_idx"}
    if not order:
        del parts["g_idx"]
    encoding, stored_parts = (
        GptqEncoding(bits, 32, less_one, order),
        {part: tensors[name] for part, name in parts.items()},
    )
    check(encoding, stored_parts, expected)
    check_scratch(encoding, stored_parts)


def test_one_group_a_row_without_an_order() -> None:
    tensors, expected = stored(4, 64, 96, 96)
    parts = {"packed": tensors["qweight"], "zero_point": tensors["qzeros"], "scale": tensors["scales"]}
    check(GptqEncoding(4, None, True, False), parts, expected)


def test_zero_points_of_zero_have_borrowed_from_their_neighbours() -> None:
    """Words are subtracted as a whole where zero points are stored less one."""
    zero = torch.tensor([[0, 3, 0, 0, 15, 1, 0, 7]])
    words = pack(zero, 4) - 0x11111111
    numbers = torch.full((8, 32), 9)
    parts = {"packed": pack(numbers, 4).t().contiguous(), "zero_point": words, "scale": torch.ones(1, 8)}
    check(GptqEncoding(4, None, True, False), parts, each_column((9 - zero).t().float(), 32))


def quantize(settings: dict[str, Any], *, less_one: bool = True, order: bool = True) -> Any:
    def one(name: str, weight: torch.Tensor) -> Any:
        if "_proj" not in name:
            return None
        tensors, values = stored(settings["bits"], *weight.shape, 32, less_one=less_one, order=order)
        return {name.removesuffix("weight") + leaf: tensor for leaf, tensor in tensors.items()}, values

    return one


LLAMA = LlamaConfig(**SMALL)
MIXTURE = Qwen3MoeConfig(
    **SMALL, head_dim=16, num_experts=16, num_experts_per_tok=2, moe_intermediate_size=32, decoder_sparse_step=1
)
V2 = {**SETTINGS, "bits": 3, "checkpoint_format": "gptq_v2"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 8, "group_size": 32, "packing_format": "auto_round"}


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("config", "settings", "less_one", "batching", "budget"),
    [
        (LLAMA, SETTINGS, True, "packed", None),
        (LLAMA, V2, False, "turns", 64 << 20),
        (LLAMA, AUTO_ROUND, False, "packed", 64 << 20),
        (MIXTURE, SETTINGS, True, "packed", None),
        (MIXTURE, SETTINGS, True, "turns", None),
    ],
    ids=["llama", "v2 in 3 bits", "auto-round in 8 bits", "mixture", "mixture in turns"],
)
async def test_a_model(
    tmp_path: Path,
    config: PreTrainedConfig,
    settings: dict[str, Any],
    less_one: bool,
    batching: str,
    budget: int | None,
) -> None:
    plain = save(tmp_path, config, settings, quantize(settings, less_one=less_one))
    await check_engine(tmp_path, plain, batching, budget)


def test_columns_in_order_need_no_groups(tmp_path: Path) -> None:
    save(tmp_path, LLAMA, SETTINGS, quantize(SETTINGS, order=False))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    other, none = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"
    tensors[f"{other}.g_idx"] = tensors[f"{other}.g_idx"].flip(0)
    tensors[f"{none}.g_idx"].fill_(-1)
    save_file(tensors, file, metadata={"format": "pt"})
    matrices = quantized_matrices(tmp_path, "gptq", SETTINGS, Checkpoint.open(tmp_path).tensors)
    assert {name for name, matrix in matrices.items() if "g_idx" in matrix.parts} == {f"{other}.weight"}
    assert {matrix.encoding for matrix in matrices.values()} == {
        GptqEncoding(4, 32, True, False),
        GptqEncoding(4, 32, True, True),
    }


@pytest.mark.anyio
async def test_a_group_that_does_not_exist(tmp_path: Path) -> None:
    save(tmp_path, LLAMA, SETTINGS, quantize(SETTINGS))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.mlp.up_proj.g_idx"
    tensors[name][5] = 2
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CorruptShardError, match="has the index 2, where there are 2 groups") as caught:
        async with Engine(tmp_path, memory_budget="64MiB"):
            pass
    assert name in str(caught.value)
    assert caught.value.path == file


GOOD = {
    "m.qweight": (I32, (8, 32)),
    "m.qzeros": (I32, (2, 4)),
    "m.scales": (F16, (2, 32)),
}


def test_other_settings_of_some_modules() -> None:
    other = {"n.qweight": (I32, (16, 32)), "n.qzeros": (I32, (1, 8)), "n.scales": (F16, (1, 32))}
    tensors = [(name, *rest) for name, rest in {**GOOD, **other}.items()]
    dynamic = {"-:lm_head": {}, r"+:^n$": {"bits": 8, "group_size": -1}}
    found = found_in("gptq", {**SETTINGS, "dynamic": dynamic}, tensors)
    assert found["m.weight"].encoding == GptqEncoding(4, 32, True, False)
    assert found["n.weight"].encoding == GptqEncoding(8, None, True, False)
    assert (found["m.weight"].shape, found["n.weight"].shape) == ((32, 64), (32, 64))


BAD = [
    ({"m.qzeros": None}, {}, CorruptShardError, "zero_point is missing: 'm.qzeros'"),
    ({"m.scales": None}, {}, CorruptShardError, "scale is missing: 'm.scales'"),
    ({"m.scales": (F16, (4, 32))}, {}, CorruptShardError, "'m.scales' has shape"),
    ({"m.scales": (torch.int8, (2, 32))}, {}, CorruptShardError, "'m.scales' is in int8"),
    ({"m.qweight": (I32, (7, 32))}, {}, CorruptShardError, "groups of 32 do not divide its 56 columns"),
    ({"m.qweight": (torch.int8, (8, 32))}, {}, CorruptShardError, "'m.qweight' is in int8"),
    ({"m.qweight": (I32, (8,))}, {}, CorruptShardError, "'m.qweight' has shape"),
    ({"m.qzeros": (I32, (2, 3))}, {}, CorruptShardError, "'m.qzeros' has shape"),
    ({"m.g_idx": (I32, (63,))}, {}, CorruptShardError, "63 columns"),
    ({"m.g_idx": (torch.float32, (64,))}, {}, CorruptShardError, "'m.g_idx' is in float32"),
    ({}, {"group_size": 48}, CorruptShardError, "groups of 48 do not divide its 64 columns"),
    ({}, {"group_size": "all"}, CorruptShardError, "groups of 'all' columns"),
    ({}, {"bits": 5}, UnsupportedModelError, "have 5 bits"),
    ({}, {"bits": None}, UnsupportedModelError, "have None bits"),
    ({}, {"checkpoint_format": "marlin"}, UnsupportedModelError, "in the layout 'marlin'"),
    (dict.fromkeys(GOOD), {}, UnsupportedModelError, "has no tensor that is stored so"),
]


@pytest.mark.parametrize(("changed", "settings", "error", "message"), BAD, ids=[str(idx) for idx in range(len(BAD))])
def test_bad_input(changed: Any, settings: Any, error: Any, message: str) -> None:
    tensors = [(name, *rest) for name, rest in {**GOOD, **changed}.items() if rest is not None]
    with pytest.raises(error, match=message) as caught:
        found_in("gptq", {**SETTINGS, **settings}, tensors)
    assert type(caught.value) is error
    assert "folder" in str(caught.value)


@pytest.mark.parametrize(
    "settings", [{"packing_format": "auto_round:llm_compressor"}, {"data_type": "nv_fp"}], ids=["packing", "numbers"]
)
def test_other_packings_of_auto_round(settings: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="AutoRound checkpoint"):
        found_in("auto-round", {**AUTO_ROUND, **settings}, [(name, *rest) for name, rest in GOOD.items()])
