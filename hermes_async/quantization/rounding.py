"""Rounds weights to few values: finds the scale of each group, and the number that stands for each weight."""

from __future__ import annotations

from collections.abc import Sequence

import torch

_FP8_MAX = float(torch.finfo(torch.float8_e4m3fn).max)
_SHARES = {4: tuple(0.70 + 0.05 * step for step in range(9)), 8: (0.94, 0.96, 0.98, 1.0)}
"""By bits: candidates for a scale, as shares of the one that makes the largest weight the largest integer."""


def round_to_integers(
    groups: torch.Tensor, num_bits: int, scale_dtype: torch.dtype, shares: Sequence[float] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to integers from `-2**(num_bits - 1)` to `2**(num_bits - 1) - 1`.

    Of several scales, each group takes the one with the smallest squared error, which may clip its largest weights.

    Args:
        groups: [rows, groups, size], float32 and finite.
        num_bits: 4 or 8.
        scale_dtype: That of the scales. Integers are chosen for the scales as they are stored.
        shares: The candidates; None takes those of `num_bits`.

    Returns:
        The integers as int8 [rows, groups, size], and the scales [rows, groups]. A group of zeros has the scale 1.
    """
    half = 1 << (num_bits - 1)
    largest = groups.abs().amax(-1, keepdim=True)
    best = _stored(largest / half, scale_dtype)
    error = _squared_error(groups, best, half)
    for share in _SHARES[num_bits] if shares is None else shares:
        candidate = _stored(largest * (share / (half - 1)), scale_dtype)
        other = _squared_error(groups, candidate, half)
        best = torch.where(other < error, candidate, best)
        error = torch.minimum(other, error)
    best = torch.where(largest == 0, 1.0, best)
    return _nearest(groups, best, half).to(torch.int8), best.squeeze(-1).to(scale_dtype)


def round_to_fp8(rows: torch.Tensor, scale_dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to e4m3, with one scale for each row; the largest weight of a row becomes the largest number.

    Args:
        rows: [rows, columns], float32 and finite.

    Returns:
        The numbers in float8_e4m3fn [rows, columns], and the scales [rows, 1]. A row of zeros has the scale 1.
    """
    largest = rows.abs().amax(-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, _stored(largest / _FP8_MAX, scale_dtype))
    numbers = (rows / scale).clamp_(-_FP8_MAX, _FP8_MAX)
    return numbers.to(torch.float8_e4m3fn), scale.to(scale_dtype)


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The scale as it is after it was stored, in float32, and never zero."""
    info = torch.finfo(dtype)
    return scale.clamp(info.smallest_normal * info.eps, info.max).to(dtype).float()


def _nearest(groups: torch.Tensor, scale: torch.Tensor, half: int) -> torch.Tensor:
    return (groups / scale).round_().clamp_(-half, half - 1)


def _squared_error(groups: torch.Tensor, scale: torch.Tensor, half: int) -> torch.Tensor:
    return _nearest(groups, scale, half).mul_(scale).sub_(groups).square_().sum(-1, keepdim=True)
