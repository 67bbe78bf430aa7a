"""The sizes of a model, for the planner: bytes, and bounds by tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hermes_async.config import format_bytes
from hermes_async.pipeload.stage import StageLayout
from hermes_async.planning.machine_speeds import MachineSpeeds, estimated

_SHORT_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """The weights of a model that are stored in one way.

    Attributes:
        name: The format, such as "fp8 (e4m3, blocks of 128x128)".
        stored_bytes: Of the checkpoint.
        num_elements: Numbers that these weights are.
        dequantizing_s: An estimate of the seconds in which one core dequantizes all of them.
    """

    name: str
    stored_bytes: int
    num_elements: int
    dequantizing_s: float


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """The sizes of a model.

    Attributes:
        kv_bytes_per_token: What each token of a sequence adds to its KV cache; 0 for a model that does not generate.
        context_length: The most tokens of a sequence; None without a limit.
        workspace_bytes: The most activation bytes of a sweep, by its tokens, its outputs and the KV bytes.
        kv_bytes_per_sequence: What a KV cache takes whatever its length is, such as recurrent states.
        in_turns: As `Plan.in_turns`.
        kv_block_tokens: Tokens of a KV block.
        least_kv_bytes: KV memory that there is always room for, if it is more than that of a text.
        draft_bytes: Weights and workspace of a draft model.
        least_sweep_tokens: Tokens that every sweep has room for.
        long_text_tokens: Tokens of a text that a sweep should have room for, even if that takes much of the budget; 0
            if long texts are divided.
        head_name: The module that makes logits. It and its submodules compute only the wanted positions.
        embedding_names: The modules whose rows are looked up. Each is a stage of its own if all weights are resident.
        formats: The weights that are dequantized when they are used, by how they are stored.
        dtype: That the model computes with.
        scratch_bytes: The part of the workspace in which blocks of rows are dequantized.
        num_experts_per_token: Experts of a layer that each token is routed to; 0 if there are none.
    """

    largest_layer_bytes: int
    weight_bytes: int
    kv_bytes_per_token: int
    context_length: int | None
    workspace_bytes: Callable[[int, int, int], int]
    kv_bytes_per_sequence: int = 0
    in_turns: bool = False
    kv_block_tokens: int = 1
    least_kv_bytes: int = 0
    draft_bytes: int = 0
    least_sweep_tokens: int = 8
    long_text_tokens: int = 0
    head_name: str = ""
    embedding_names: frozenset[str] = frozenset()
    formats: tuple[WeightFormat, ...] = ()
    dtype: str = "bfloat16"
    scratch_bytes: int = 0
    num_experts_per_token: int = 0

    @property
    def weights_explanation(self) -> tuple[str, ...]:
        """How weights are stored that are not used as they are stored; empty if there are none."""
        lines = [
            f"weights: {one.name}, {format_bytes(one.stored_bytes)} as stored, "
            f"{format_bytes(one.num_elements * _ITEM_BYTES[self.dtype])} in {_SHORT_NAMES[self.dtype]}"
            for one in self.formats
        ]
        if lines:
            lines[-1] += f"; dequantized a block of rows at a time, {format_bytes(self.scratch_bytes)} of scratch"
        return tuple(lines)

    def estimated_speeds(self, num_threads: int, *, in_head: bool) -> MachineSpeeds:
        """The speeds of a machine that was not measured, with so many threads.

        Args:
            in_head: Whether the weights of the head are dequantized, too.
        """
        stored_bytes = sum(one.stored_bytes for one in self.formats)
        if not stored_bytes:
            return estimated()
        dequantized_bytes = sum(one.num_elements for one in self.formats) * _ITEM_BYTES[self.dtype]
        dequantizing_s = sum(one.dequantizing_s for one in self.formats) / num_threads
        return estimated().with_dequantizing(
            dequantized_bytes / stored_bytes, dequantizing_s / stored_bytes, in_head=in_head
        )

    @property
    def generates(self) -> bool:
        """Whether it has sequences that grow, with KV caches."""
        return self.kv_bytes_per_token + self.kv_bytes_per_sequence > 0

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Tokens of the texts by which the plan of a model that does not generate is chosen, ascending."""
        lengths = [self.least_sweep_tokens]
        while lengths[-1] < self.long_text_tokens:
            lengths.append(min(2 * lengths[-1], self.long_text_tokens))
        return tuple(lengths)

    def head_of(self, stages: Sequence[StageLayout]) -> frozenset[int]:
        """Indices of the stages that are the output head or a part of it."""
        return frozenset(idx for idx, stage in enumerate(stages) if self._is_head(stage))

    def looked_up_of(self, stages: Sequence[StageLayout]) -> frozenset[int]:
        """Indices of the stages that are only an embedding, whose rows are looked up."""
        return frozenset(
            idx for idx, stage in enumerate(stages) if stage.name in self.embedding_names and not self._is_head(stage)
        )

    def _is_head(self, stage: StageLayout) -> bool:
        if not self.head_name:
            return False
        if stage.name in self.embedding_names:
            return stage.is_shared  # tied weights: the head is computed with them
        return (stage.name + ".").startswith(self.head_name + ".")
