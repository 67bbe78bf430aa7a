"""What the Layer Profiler has measured, and what the planner makes of it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from hermes_async.config import format_bytes, format_count
from hermes_async.planning.speeds import HANDOVER_SECONDS, DiskSpeed, Speeds, without_noise


@dataclass(frozen=True, slots=True)
class StageProfile:
    """One stage.

    Attributes:
        nbytes: What is read.
        resident: It was loaded once, and stayed.
        head: It makes logits, and computes only the positions that are wanted.
        load_s: One load, beside those of the other agents.
        compute_s: One computation, by the tokens that it computes.
    """

    name: str
    nbytes: int
    resident: bool
    head: bool
    load_s: float
    compute_s: dict[int, float]


@dataclass(frozen=True, slots=True)
class KernelProfile:
    """How fast the model's widest matrix is multiplied: operations a second, by tokens.

    Attributes:
        kernel: "oneDNN", which torch takes by itself, or "native", without it.
    """

    dtype: str
    kernel: str
    flops: dict[int, float]


@dataclass(frozen=True, slots=True)
class Profile:
    """What was measured.

    Attributes:
        memory_budget: Of the engine that the stages ran in, bytes.
        asked_for: What the engine was asked for: a budget, perhaps "auto", and options.
        dtype: What the model computes in.
        created_at: Seconds since 1970.
        layer_s: What computing one byte of a layer's weights takes, by tokens; with all of the model in memory, where
            there is memory for that.
        head_s: The same of the head, by outputs.
        sweep_s: What a sweep takes outside of its stages, by its outputs.
        disk: What it gives, read alone.
        read_share: How fast an engine reads, as a share of that without its noise.
        handover_s: What a streamed stage takes beside its computation; None where none was streamed.
    """

    memory_budget: int
    asked_for: str
    dtype: str
    created_at: float
    stages: tuple[StageProfile, ...]
    layer_s: dict[int, float]
    head_s: dict[int, float]
    sweep_s: dict[int, float]
    handover_s: float | None
    disk: tuple[DiskSpeed, ...]
    read_share: float
    kernels: tuple[KernelProfile, ...]

    def speeds(self) -> Speeds:
        """What the planner makes of it."""
        age_days = max(0.0, time.time() - self.created_at) / 86400
        when = "today" if age_days < 1 else f"{age_days:.0f} days ago"
        return Speeds(
            disk=tuple(
                replace(speed, bytes_per_s=speed.bytes_per_s * self.read_share) for speed in without_noise(self.disk)
            ),
            layer_seconds=self.layer_s,
            head_seconds=self.head_s,
            sweep_seconds=self.sweep_s,
            handover_seconds=HANDOVER_SECONDS if self.handover_s is None else self.handover_s,
            source=f"measured here {when}, in a budget of {format_bytes(self.memory_budget)}",
            measured=True,
            notes=tuple(self._dtype_notes()),
            native_gain=self._native_gain(),
        )

    def _native_gain(self) -> dict[int, float]:
        """How many times as fast torch's own kernels are as oneDNN's, in the model's dtype, by tokens."""
        own = {kernel.kernel: kernel.flops for kernel in self.kernels if kernel.dtype == self.dtype}
        if "oneDNN" not in own or "native" not in own:
            return {}
        return {count: own["native"][count] / flops for count, flops in own["oneDNN"].items() if count in own["native"]}

    def _dtype_notes(self) -> Iterator[str]:
        """Which other dtype would be faster."""
        ours = next((one.flops for one in self.kernels if (one.dtype, one.kernel) == (self.dtype, "oneDNN")), None)
        if not ours:
            return
        others = {kernel.dtype: kernel.flops for kernel in self.kernels if kernel.kernel == "oneDNN"}
        for count in sorted({min(ours), max(ours)}):
            best = max(others, key=lambda dtype: others[dtype][count])
            if others[best][count] > 1.5 * ours[count]:
                tokens = format_count(count, "token")
                yield (
                    f"dtype: {self.dtype}, as the checkpoint says; {best} multiplies "
                    f"{others[best][count] / ours[count]:.1f} times as fast at {tokens}"
                )
