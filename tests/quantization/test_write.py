"""What a matrix becomes: read back by plain integer arithmetic, and compared with what rounding may lose."""

from __future__ import annotations

import pytest
import torch

from hermes_async.quantization.rounding import round_to_integers
from hermes_async.quantization.write import OutputFormat, PackedIntegers, RowScaledFp8


def matrix(rows: int, columns: int, *, spread: float = 0.02, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * spread


def unpacked(packed: torch.Tensor, num_bits: int, columns: int) -> torch.Tensor:
    """The integers of int32 [rows, packed], one after another, by Python's own arithmetic."""
    per_number, mask, half = 32 // num_bits, (1 << num_bits) - 1, 1 << (num_bits - 1)
    rows = [
        [
            ((row[idx // per_number] & 0xFFFFFFFF) >> (num_bits * (idx % per_number)) & mask) - half
            for idx in range(columns)
        ]
        for row in packed.tolist()
    ]
    return torch.tensor(rows)


@pytest.mark.parametrize(("num_bits", "group_size", "columns"), [(4, 32, 96), (8, None, 50), (8, 64, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_integers_are_read_back(num_bits: int, group_size: int | None, columns: int, dtype: torch.dtype) -> None:
    weights = matrix(6, columns)
    chosen = PackedIntegers(num_bits, group_size)
    parts = chosen.quantize(weights, dtype)
    size = group_size or columns
    assert {name: (part.dtype, tuple(part.shape)) for name, part in parts.items()} == {
        name: (one.dtype, one.shape) for name, one in chosen.parts(6, columns, dtype).items() if not one.whole
    }
    assert chosen.whole_parts(6, columns)["weight_shape"].tolist() == [6, columns]
    scales = parts["weight_scale"].double().repeat_interleave(size, 1)
    read = unpacked(parts["weight_packed"], num_bits, columns) * scales
    # Where nothing is clipped, an integer is within half a step.
    within = read.sub(weights).abs() <= scales * 0.5001
    largest = weights.view(6, -1, size).abs().amax(-1).repeat_interleave(size, 1)
    assert bool((within | (weights.abs() > 0.6 * largest)).all())
    assert float(read.sub(weights).norm() / weights.norm()) < (0.12 if num_bits == 4 else 0.012)


def test_the_scale_with_the_smallest_error_is_taken() -> None:
    groups = matrix(64, 128, seed=1).view(64, -1, 64)
    largest = groups.abs().amax(-1, keepdim=True)

    def error(scale: torch.Tensor) -> torch.Tensor:
        return ((groups / scale).round().clamp(-8, 7) * scale - groups).square().sum(-1)

    _, scales = round_to_integers(groups, 4, torch.float32, shares=(0.8, 1.0))
    for share in (0.8, 1.0):
        assert bool((error(scales[..., None]) <= error(largest * (share / 7))).all())
    _, scales = round_to_integers(groups, 4, torch.float32)
    assert float(error(scales[..., None]).sum()) < 0.85 * float(error(largest / 7.5).sum())


def test_fp8_has_half_a_step_of_error() -> None:
    weights = matrix(5, 40, spread=3.0)
    parts = RowScaledFp8().quantize(weights, torch.bfloat16)
    read = parts["weight"].double() * parts["weight_scale"].double()
    smallest = parts["weight_scale"].double() * 2.0**-6  # of the normal numbers
    assert bool(((read - weights).abs() <= torch.maximum(weights.abs().double(), smallest) / 16).all())


@pytest.mark.parametrize("chosen", [PackedIntegers(4, 32), PackedIntegers(8, None), RowScaledFp8()])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_zeros_and_tiny_weights_have_a_scale(chosen: OutputFormat, dtype: torch.dtype) -> None:
    weights = torch.zeros(3, 32)
    weights[1, 5], weights[2] = 1e-7, 1e-30
    parts = chosen.quantize(weights, dtype)
    scales = parts["weight_scale"].float()
    assert bool((scales > 0).all() and scales.isfinite().all())
    assert float(scales[0]) == 1.0


def test_groups_must_divide() -> None:
    with pytest.raises(ValueError, match="groups of 64 do not divide its 96 columns"):
        PackedIntegers(4, 64).parts(4, 96, torch.float32)


def test_the_configuration_says_that_activations_are_not_quantized() -> None:
    settings = PackedIntegers(4, 64).settings(["lm_head"])
    group = settings["config_groups"]["group_0"]
    assert (group["input_activations"], group["targets"], settings["ignore"]) == (None, ["Linear"], ["lm_head"])
    assert (group["weights"]["num_bits"], group["weights"]["group_size"]) == (4, 64)
