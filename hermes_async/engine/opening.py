"""From a checkpoint's name to everything an engine needs before it reads weights. Synchronous; for a worker thread."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hermes_async.config import EngineConfig, parse_bytes
from hermes_async.modeling.activations import workspace_bytes
from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.kv_cache import BLOCK_TOKENS
from hermes_async.modeling.partition import Partition, partition
from hermes_async.modeling.probe import Probe, probe
from hermes_async.modeling.selfcheck import check_packing
from hermes_async.modeling.skeleton import Skeleton, build_skeleton, load_config, weight_bytes
from hermes_async.pipeload.memory import automatic_budget, process_rss_bytes
from hermes_async.pipeload.planner import ModelSizes, Plan, plan
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.rows import RowReader

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
)


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that is planned and not yet loaded.

    Attributes:
        attention: Registered with transformers until `close`.
        partition: The plan's.
        baseline_bytes: Resident memory of the process, libraries and tokenizer included, before any weight was read.
    """

    checkpoint: Checkpoint
    skeleton: Skeleton
    attention: PackedAttention
    seen: Probe
    partition: Partition
    plan: Plan
    tokenizer: PreTrainedTokenizerBase | None
    tokenizer_error: str | None
    baseline_bytes: int

    def close(self) -> None:
        self.attention.close()


def open_model(source: str | os.PathLike[str], memory_budget: int | str, config: EngineConfig) -> OpenedModel:
    """Finds the checkpoint, builds the model without weights, looks at how it runs, and divides the budget.

    Args:
        source: A directory, or an id on the Hugging Face hub, which is downloaded first.
        memory_budget: Bytes, a text such as "3GiB", or "auto".

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError, MemoryBudgetError: Each as its class says.
    """
    fixed_budget = None if memory_budget == "auto" else parse_bytes(memory_budget)
    checkpoint = Checkpoint.open(source)
    tokenizer, tokenizer_error = _load_tokenizer(checkpoint.path)
    attention = PackedAttention()
    try:
        model_config = load_config(checkpoint)
        skeleton = build_skeleton(checkpoint, model_config, attention.name)
        check_packing(model_config, attention)
        seen = probe(skeleton, attention)
        baseline = process_rss_bytes()
        budget = automatic_budget() if fixed_budget is None else fixed_budget
        cut = lru_cache(maxsize=None)(lambda limit: partition(skeleton, seen, limit))
        chosen = plan(budget, cut, _sizes(skeleton, seen), config)
        assert isinstance(chosen.partition, Partition)
    except BaseException:
        attention.close()
        raise
    return OpenedModel(
        checkpoint, skeleton, attention, seen, chosen.partition, chosen, tokenizer, tokenizer_error, baseline
    )


def _sizes(skeleton: Skeleton, seen: Probe) -> ModelSizes:
    activations = workspace_bytes(skeleton, seen)
    embedding = skeleton.tensors[skeleton.embedding_name]

    def workspace(tokens: int, outputs: int, kv_bytes: int) -> int:
        rows = RowReader.buffer_bytes(embedding, tokens) + tokens * embedding.nbytes // embedding.shape[0]
        return activations(tokens, outputs, kv_bytes) + rows

    return ModelSizes(
        largest_layer_bytes=max(_layer_bytes(skeleton), default=weight_bytes(skeleton.tensors, skeleton.tensors)),
        weight_bytes=weight_bytes(skeleton.tensors, skeleton.tensors),
        kv_bytes_per_token=seen.kv.bytes_per_token,
        context_length=skeleton.context_length,
        workspace_bytes=workspace,
        kv_block_tokens=BLOCK_TOKENS,
    )


def _layer_bytes(skeleton: Skeleton) -> Sequence[int]:
    """Bytes of each module that stands in a list: the transformer layers."""
    sizes = []
    for path, module in skeleton.model.named_modules():
        if isinstance(module, nn.ModuleList):
            for name, layer in module.named_children():
                names = [f"{path}.{name}.{tensor}" for tensor in layer.state_dict()]
                sizes.append(weight_bytes((tensor for tensor in names if tensor in skeleton.tensors), skeleton.tensors))
    return sizes


def _load_tokenizer(path: Path) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """The checkpoint's tokenizer, or why there is none: such a model runs on token ids."""
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None, f"{path} has no tokenizer; give the prompt as token ids"
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True), None
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None, f"the tokenizer in {path} cannot be loaded ({reason}); give the prompt as token ids"
