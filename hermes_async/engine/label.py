"""What a classifier says, as users get it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Label:
    """One of a classifier's labels.

    Attributes:
        score: Its probability; of a classifier whose labels do not exclude each other, each on its own.
    """

    label: str
    score: float
