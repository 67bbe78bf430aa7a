"""Makes the plans of one model: its sizes, the machine's speeds, and what a plan says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import nn

from hermes_async.config import EngineConfig, format_bytes
from hermes_async.engine.probing import ProbedModel
from hermes_async.errors import MemoryBudgetError
from hermes_async.modeling.activations import QUESTION_TOKENS, TEXT_TOKENS, WorkspaceBounds, experts_per_token
from hermes_async.modeling.checkpoint_tensors import weight_bytes
from hermes_async.modeling.encoder_inputs import PROMPT_OF_AUDIO, positions_of_audio
from hermes_async.modeling.experts import expert_layers
from hermes_async.modeling.kv_cache import BLOCK_TOKENS
from hermes_async.modeling.partition import Partition, partition
from hermes_async.modeling.probe import Probe
from hermes_async.modeling.row_tables import row_tables
from hermes_async.modeling.skeleton import Skeleton
from hermes_async.planning.machine_speeds import MachineSpeeds
from hermes_async.planning.model_sizes import ModelSizes
from hermes_async.planning.plan import Plan
from hermes_async.planning.planner import plan
from hermes_async.planning.profile_store import load_profile, profile_file
from hermes_async.planning.workspace import LEAST_KV_TOKENS
from hermes_async.quantization.encoded_weight import parameter_of
from hermes_async.quantization.formats import weight_formats
from hermes_async.quantization.methods import notes_of
from hermes_async.serving.planned_model import PlannedDraft
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.quantization_settings import quantization

_ANSWER_TOKENS = 128
"""There is always KV memory for a prompt with an image and a question, and an answer of this length."""

_LONG_TEXT_TOKENS = 512
"""The context of most encoders. A sweep of a model that does not generate should have room for such a text."""


@dataclass(frozen=True, slots=True)
class ModelPlanner:
    """Makes plans for one model.

    Attributes:
        partition: From the most bytes of a stage to a cached partition.
        text_sizes: The sizes without room for images; the same as `sizes` where none are taken.
        own_kv_bytes_per_token: The model's; `sizes` counts those of a draft model too.
        notes: What a plan says first: which requests run in turns and why, and what of the configuration is not done.
    """

    partition: Callable[[int | None], Partition]
    bounds: WorkspaceBounds
    sizes: ModelSizes
    text_sizes: ModelSizes
    config: EngineConfig
    speeds: MachineSpeeds
    own_kv_bytes_per_token: int
    notes: tuple[str, ...]

    @classmethod
    def of(
        cls, model: ProbedModel, checkpoint: Checkpoint, config: EngineConfig, draft: PlannedDraft | None
    ) -> ModelPlanner:
        bounds = model.bounds()
        sizes = _sizes(model, bounds, draft)
        return cls(
            partition=cache(
                partial(partition, model.skeleton, model.probe, experts=expert_layers(model.skeleton, model.probe))
            ),
            bounds=bounds,
            sizes=_with_room_for_images(sizes, model, bounds, config),
            text_sizes=sizes,
            config=config,
            speeds=_speeds(checkpoint, model.skeleton, sizes),
            own_kv_bytes_per_token=_kv_bytes_per_token(model.probe),
            notes=(*filter(None, [model.turns_reason]), *_notes_on_quantization(checkpoint)),
        )

    def plan(self, budget: int) -> Plan:
        try:
            chosen = plan(budget, self.partition, self.sizes, self.config, self.speeds)
        except MemoryBudgetError as error:
            if self.sizes is self.text_sizes or error.minimum_bytes is None:
                raise
            chosen = plan(budget, self.partition, self.text_sizes, self.config, self.speeds)
            refused = f"no room for images: they need a budget of {format_bytes(error.minimum_bytes)} or more"
            chosen = replace(chosen, explanation=(refused, *chosen.explanation))
        return replace(chosen, explanation=(*self.notes, *chosen.explanation))

    def budgets_for_kv(self, kv_bytes: int) -> tuple[int, int]:
        """The smallest `kv_budget` and `memory_budget` that leave `kv_bytes` to the model's own KV caches."""
        kv_budget = kv_bytes
        if self.own_kv_bytes_per_token:
            kv_budget = -(-kv_bytes * self.sizes.kv_bytes_per_token // self.own_kv_bytes_per_token)
        plenty = 2 * (self.sizes.weight_bytes + kv_budget + self.sizes.workspace_bytes(1, 1, kv_budget))
        planner = replace(self, config=replace(self.config, kv_budget=kv_budget))
        return kv_budget, planner.plan(plenty).minimum_budget


def _notes_on_quantization(checkpoint: Checkpoint) -> tuple[str, ...]:
    found = quantization(checkpoint.path, checkpoint.config)
    return () if found is None else notes_of(*found)


def _speeds(checkpoint: Checkpoint, skeleton: Skeleton, sizes: ModelSizes) -> MachineSpeeds:
    """The Layer Profiler's measurements on this machine, or estimates."""
    profile = load_profile(profile_file(checkpoint))
    if profile is not None:
        return profile.machine_speeds()
    in_head = f"{sizes.head_name}.weight" in skeleton.encoded
    return sizes.estimated_speeds(torch.get_num_threads(), in_head=in_head)


def _sizes(model: ProbedModel, bounds: WorkspaceBounds, draft: PlannedDraft | None) -> ModelSizes:
    """The sizes of the model and a draft model, for the planner."""
    skeleton, probe = model.skeleton, model.probe
    all_weights_bytes = weight_bytes(skeleton.tensors, skeleton.tensors)
    sizes = ModelSizes(
        largest_layer_bytes=max(_layer_bytes(skeleton), default=all_weights_bytes),
        weight_bytes=all_weights_bytes,
        kv_bytes_per_sequence=probe.cache.sequence_bytes,
        in_turns=probe.turns is not None and not probe.packs,
        kv_bytes_per_token=(_kv_bytes_per_token(probe) if skeleton.generates else 0)
        + (0 if draft is None else draft.probe.kv.bytes_per_token),
        context_length=skeleton.context_length,
        workspace_bytes=bounds.sweep,
        kv_block_tokens=BLOCK_TOKENS if probe.packs or not skeleton.generates else 1,
        draft_bytes=0 if draft is None else draft.fixed_bytes,
        head_name=_head_name(skeleton),
        embedding_names=_embedding_names(model),
        formats=weight_formats(skeleton.encoded.values()),
        dtype=str(skeleton.dtype).removeprefix("torch."),
        scratch_bytes=max((one.scratch_bytes for one in skeleton.encoded.values()), default=0),
        num_experts_per_token=experts_per_token(skeleton.model.config.get_text_config()),
    )
    if positions := positions_of_audio(skeleton.model):
        return replace(sizes, least_sweep_tokens=positions + PROMPT_OF_AUDIO)
    divides = probe.packs or probe.turns is None or (probe.turns.traits.chunks and not skeleton.is_encoder_decoder)
    if not divides:  # a prompt is one call
        return replace(sizes, least_sweep_tokens=min(LEAST_KV_TOKENS, skeleton.context_length or LEAST_KV_TOKENS))
    if skeleton.generates:
        return sizes
    long_text = min(_LONG_TEXT_TOKENS, skeleton.context_length or _LONG_TEXT_TOKENS)
    return replace(
        sizes,
        least_sweep_tokens=probe.tokens_per_image or TEXT_TOKENS,
        long_text_tokens=0 if probe.tokens_per_image else long_text,
    )


def _with_room_for_images(
    sizes: ModelSizes, model: ProbedModel, bounds: WorkspaceBounds, config: EngineConfig
) -> ModelSizes:
    """The sizes with room for a prompt with an image, alone in a sweep."""
    layout, images = model.probe.turns, model.probe.images
    if layout is None or images is None:
        return sizes
    prompt_tokens = config.max_tokens_per_sweep or 0

    def workspace_bytes(tokens: int, outputs: int, kv_bytes: int) -> int:
        with_image = bounds.prompt_with_image(prompt_tokens, kv_bytes=kv_bytes)
        return max(with_image, sizes.workspace_bytes(tokens, outputs, kv_bytes))

    num_tokens = images.num_tokens + QUESTION_TOKENS + _ANSWER_TOKENS
    least_kv = layout.nbytes(min(num_tokens, model.skeleton.context_length or num_tokens))
    return replace(sizes, workspace_bytes=workspace_bytes, least_kv_bytes=least_kv)


def _kv_bytes_per_token(probe: Probe) -> int:
    """Of an encoder-decoder, a sequence of n tokens has n tokens of input, too."""
    input_bytes = 0 if probe.turns is None else probe.turns.input_token_bytes
    return probe.cache.bytes_per_token + input_bytes


def _embedding_names(model: ProbedModel) -> frozenset[str]:
    """The input embedding, and others that are looked up as it is."""
    skeleton = model.skeleton
    names = {table.name for table in row_tables(skeleton, model.probe)}
    if skeleton.embedding is not None:
        names.add(skeleton.embedding_name.rpartition(".")[0])
    return frozenset(names)


def _head_name(skeleton: Skeleton) -> str:
    """The module that makes logits of chosen positions; empty if the model does not generate."""
    if not skeleton.generates:
        return ""
    head = skeleton.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return next((path for path, module in skeleton.model.named_modules() if module is head), "")


def _layer_bytes(skeleton: Skeleton) -> Iterator[int]:
    """Bytes of each module in a `ModuleList`: the transformer layers."""
    by_parameter: dict[str, list[str]] = {}
    for name in skeleton.tensors:
        by_parameter.setdefault(parameter_of(name), []).append(name)
    for path, module in skeleton.model.named_modules():
        if isinstance(module, nn.ModuleList):
            for name, layer in module.named_children():
                names = {f"{path}.{name}.{tensor}" for tensor in layer.state_dict()}
                stored = by_parameter.keys() & names
                yield weight_bytes((one for name in stored for one in by_parameter[name]), skeleton.tensors)
