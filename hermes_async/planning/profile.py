"""Measurements of the Layer Profiler, and the machine's speeds from them."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

from hermes_async.config import format_bytes, format_count
from hermes_async.planning.machine_speeds import HANDOVER_SECONDS, DiskRate, MachineSpeeds, without_noise

_FASTER_DTYPE = 1.5  # another dtype gets a note above this gain


@dataclass(frozen=True, slots=True)
class StageProfile:
    """One stage.

    Attributes:
        head: It makes logits, and computes only the wanted positions.
        load_s: One load, while other agents load too.
        compute_s: One computation, by tokens.
    """

    name: str
    nbytes: int
    resident: bool
    head: bool
    load_s: float
    compute_s: dict[int, float]


@dataclass(frozen=True, slots=True)
class KernelProfile:
    """Operations a second by tokens, for the model's widest matrix.

    Attributes:
        kernel: "oneDNN", which stands for what the engine does by default, or "native".
    """

    dtype: str
    kernel: str
    flops: dict[int, float]


@dataclass(frozen=True, slots=True)
class ProductsProfile:
    """How fast this machine multiplies with bfloat16 weights by other functions than `linear`.

    Attributes:
        created_at: Seconds since 1970.
        gains: How many times as fast as `linear`, by tokens: one with `mv`, and more in float32.
        tiled_gains: The same of compiled functions; empty where none may be used.
    """

    created_at: float
    gains: dict[int, float]
    tiled_gains: dict[int, float]


@dataclass(frozen=True, slots=True)
class Profile:
    """Measurements of one model on one machine.

    Attributes:
        memory_budget: Of the engine that the stages ran in, bytes.
        asked_for: The budget as given (perhaps "auto") and the options of that engine.
        created_at: Seconds since 1970.
        layer_s: To compute one byte of a layer's weights, by tokens; fully resident if memory allowed.
        head_s: To compute one byte of the head's weights, by outputs.
        sweep_s: Outside of the stages of a sweep, by outputs.
        handover_s: Extra seconds of a streamed stage or of an expert; None if there was neither.
        disk: Rates of the disk without an engine.
        read_share: The rate of an engine's reads, as a share of those.
        expert_uses: See `MachineSpeeds`.
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
    disk: tuple[DiskRate, ...]
    read_share: float
    kernels: tuple[KernelProfile, ...]
    expert_uses: tuple[float, ...] = ()

    def machine_speeds(self) -> MachineSpeeds:
        """The speeds that the planner expects of this machine."""
        age_days = max(0.0, time.time() - self.created_at) / 86400
        when = "today" if age_days < 1 else f"{age_days:.0f} days ago"
        default, native = (
            next((one.flops for one in self.kernels if (one.dtype, one.kernel) == (self.dtype, kernel)), {})
            for kernel in ("oneDNN", "native")
        )
        notes = []
        for count in sorted({min(default), max(default)}) if default else ():
            flops, dtype = max((one.flops[count], one.dtype) for one in self.kernels if one.kernel == "oneDNN")
            if flops > _FASTER_DTYPE * default[count]:
                faster = f"{flops / default[count]:.1f} times as fast at {format_count(count, 'token')}"
                notes.append(f"dtype: {self.dtype}, as the checkpoint says; {dtype} multiplies {faster}")
        return MachineSpeeds(
            disk=tuple(
                replace(rate, bytes_per_s=rate.bytes_per_s * self.read_share) for rate in without_noise(self.disk)
            ),
            layer_seconds=self.layer_s,
            head_seconds=self.head_s,
            sweep_seconds=self.sweep_s,
            handover_seconds=HANDOVER_SECONDS if self.handover_s is None else self.handover_s,
            source=f"measured here {when}, in a budget of {format_bytes(self.memory_budget)}",
            measured=True,
            notes=tuple(notes),
            expert_uses=self.expert_uses,
            native_gain={count: native[count] / flops for count, flops in default.items() if count in native},
        )
