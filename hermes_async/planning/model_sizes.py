"""What the planner has to know of a model: bytes, and bounds by tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hermes_async.pipeload.stage import StageLayout


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What the planner has to know of a model.

    Attributes:
        largest_layer_bytes: Of its transformer layers.
        weight_bytes: All its weights.
        kv_bytes_per_token: Of one sequence; 0 for a model that does not generate.
        kv_block_tokens: KV memory is given out for so many tokens at a time.
        draft_bytes: Of a draft model, which is in memory beside the model.
        context_length: Most tokens of a sequence, None without a limit.
        workspace_bytes: What a sweep's activations take at the most, by its tokens, its outputs and the KV bytes.
        least_sweep_tokens: A sweep must have room for so many.
        long_text_tokens: And for so many if it can, even where that takes much of the budget; 0 where texts are cut.
        head_name: The module that makes logits; what is under it computes only the positions that are wanted.
        embedding_name: The module whose rows are looked up; a stage of its own where all of the model is in memory.
    """

    largest_layer_bytes: int
    weight_bytes: int
    kv_bytes_per_token: int
    context_length: int | None
    workspace_bytes: Callable[[int, int, int], int]
    kv_block_tokens: int = 1
    draft_bytes: int = 0
    least_sweep_tokens: int = 8
    long_text_tokens: int = 0
    head_name: str = ""
    embedding_name: str = ""

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Of texts, or of an image, that a plan is chosen by where the model does not generate, in tokens.

        From the shortest a sweep has room for, each twice as long as the one before, to a long one.
        """
        lengths = [self.least_sweep_tokens]
        while lengths[-1] < self.long_text_tokens:
            lengths.append(min(2 * lengths[-1], self.long_text_tokens))
        return tuple(lengths)

    def is_head(self, stage: StageLayout) -> bool:
        if bool(self.head_name) and stage.name == self.embedding_name:
            return stage.is_shared  # tied: the head multiplies by it
        return bool(self.head_name) and (stage.name + ".").startswith(self.head_name + ".")

    def is_looked_up(self, stage: StageLayout) -> bool:
        """Whether nothing multiplies by it."""
        return stage.name == self.embedding_name and not self.is_head(stage) and bool(stage.name)
