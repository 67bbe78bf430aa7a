"""From a checkpoint's name to a planned model, before weights are read. Synchronous: call it on a worker thread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hermes_async.config import EngineConfig, format_bytes, parse_bytes
from hermes_async.engine.encoding import lower_casing
from hermes_async.engine.probing import ProbedModel, build_and_probe, with_pooling
from hermes_async.errors import CheckpointError, ConfigError, MemoryBudgetError
from hermes_async.foreign_errors import is_foreign, reason_of
from hermes_async.memory.available import process_rss_bytes
from hermes_async.memory.claims import Claim
from hermes_async.memory.library_caches import bound_heap
from hermes_async.modeling.activations import QUESTION_TOKENS, TEXT_TOKENS, WorkspaceBounds
from hermes_async.modeling.checkpoint_tensors import weight_bytes
from hermes_async.modeling.encoder_inputs import PROMPT_OF_AUDIO, positions_of_audio
from hermes_async.modeling.kv_cache import BLOCK_TOKENS
from hermes_async.modeling.partition import Partition, partition
from hermes_async.modeling.pooling import PoolingConfig
from hermes_async.modeling.probe import Probe
from hermes_async.modeling.row_tables import row_tables
from hermes_async.modeling.sentence import SentenceSettings, sentence_settings
from hermes_async.modeling.skeleton import Skeleton
from hermes_async.modeling.structured_outputs import GrammarCompiler
from hermes_async.planning.machine_speeds import MachineSpeeds, estimated
from hermes_async.planning.model_sizes import ModelSizes
from hermes_async.planning.plan import Plan
from hermes_async.planning.planner import plan
from hermes_async.planning.profile_store import load_profile, profile_file
from hermes_async.planning.workspace import LEAST_KV_TOKENS
from hermes_async.serving.planned_model import PlannedDraft, PlannedModel
from hermes_async.serving.processor import SharedProcessor
from hermes_async.serving.tokenizer import SharedTokenizer
from hermes_async.storage.checkpoint import Checkpoint, open_checkpoint
from hermes_async.storage.hub import HubOptions
from hermes_async.storage.threads import check_cancelled, only_waiting

_DRAFT_TOKENS = 256
"""The most tokens of one pass of a draft model. Only a new prompt has more."""

_ANSWER_TOKENS = 128
"""There is always KV memory for a prompt with an image and a question, and an answer of this length."""

_LONG_TEXT_TOKENS = 512
"""The context of most encoders. A sweep of a model that does not generate should have room for such a text."""

_SECONDS_FOR_OTHERS = 10.0
_SECONDS_BETWEEN_LOOKS = 0.1

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
)


@dataclass(slots=True)
class OpenedModel(PlannedModel):
    """A planned model, and what the engine needs to turn texts into inputs.

    Attributes:
        tokenizer: None if the checkpoint has none; `tokenizer_error` says why.
        processor: Makes the inputs of prompts with images.
        images_refusal: Why prompts with images are refused; empty where they are not.
        pooling: How the checkpoint makes sentence vectors, or the error that `embed` raises.
        sentences: How the checkpoint tokenizes texts for sentence vectors, or the error that `embed` raises.
        sentence_tokenizer: The tokenizer for sentence vectors.
        grammars: Makes grammars for structured answers.
        budgets_for_kv: From KV bytes to the smallest `kv_budget` and `memory_budget` that leave them to KV caches.
    """

    tokenizer: SharedTokenizer | None
    tokenizer_error: str | None
    processor: SharedProcessor
    images_refusal: str
    pooling: PoolingConfig | CheckpointError
    sentences: SentenceSettings | CheckpointError
    sentence_tokenizer: SharedTokenizer | None
    grammars: GrammarCompiler
    budgets_for_kv: Callable[[int], tuple[int, int]]


def open_model(
    source: str | os.PathLike[str],
    memory_budget: int | str,
    config: EngineConfig,
    draft_source: str | os.PathLike[str] | None = None,
    hub: HubOptions | None = None,
) -> OpenedModel:
    """Finds the checkpoint, builds the model without weights, probes how it runs, and divides the budget.

    Args:
        hub: Options for both models. The revision is not used for the draft model.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError, MemoryBudgetError: As `Engine` on entering.
    """
    fixed_budget = None if memory_budget == "auto" else parse_bytes(memory_budget)
    hub = hub or HubOptions()
    bound_heap()
    with ExitStack() as on_error:
        checkpoint = _find_checkpoint(source, hub)
        claim = Claim(fixed_budget)
        on_error.callback(claim.release)
        tokenizer, tokenizer_error = _load_tokenizer(checkpoint.path)
        shared_tokenizer = None if tokenizer is None else SharedTokenizer(tokenizer)
        processor = SharedProcessor(checkpoint.path)
        check_cancelled()
        model = build_and_probe(checkpoint, config, on_error, (shared_tokenizer, tokenizer_error, processor))
        check_cancelled()
        model, pooling = with_pooling(model, checkpoint)
        sentences, lower_casing_tokenizer = _sentences(checkpoint, tokenizer)
        draft = None
        if draft_source is not None:
            draft_checkpoint = _find_checkpoint(draft_source, replace(hub, revision=None))
            draft = _open_draft(
                draft_checkpoint, target=model.skeleton, target_tokenizer=tokenizer, config=config, exits=on_error
            )
        baseline = process_rss_bytes()
        budget = _claim_budget(claim, fixed_budget)
        planner = _ModelPlanner.of(model, checkpoint, config, draft)
        chosen = planner.plan(budget)
        if draft is not None:
            own_kv_bytes = chosen.kv_bytes * planner.own_kv_bytes_per_token // planner.sizes.kv_bytes_per_token
            draft = replace(draft, kv_bytes=chosen.kv_bytes - own_kv_bytes)
            chosen = replace(chosen, kv_bytes=own_kv_bytes, kv_bytes_per_token=planner.own_kv_bytes_per_token)
        assert isinstance(chosen.partition, Partition)
        on_error.pop_all()
    return OpenedModel(
        checkpoint=checkpoint,
        skeleton=model.skeleton,
        attention=model.attention,
        probe=model.probe,
        bounds=planner.bounds,
        partition=chosen.partition,
        plan=chosen,
        draft=draft,
        baseline_bytes=baseline,
        claim=claim,
        tokenizer=shared_tokenizer,
        tokenizer_error=tokenizer_error,
        processor=processor,
        images_refusal=model.images_refusal,
        pooling=pooling,
        sentences=sentences,
        sentence_tokenizer=lower_casing_tokenizer or shared_tokenizer,
        grammars=GrammarCompiler(tokenizer, model.skeleton.num_choices if model.skeleton.generates else 0),
        budgets_for_kv=planner.budgets_for_kv,
    )


def plans_by_budget(source: str | os.PathLike[str], config: EngineConfig, count: int) -> list[Plan]:
    """Plans for at most `count` budgets, from the smallest that works to one that keeps all weights resident.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: As `Engine` on entering.
    """
    with ExitStack() as exits:
        checkpoint = Checkpoint.open(source)
        tokenizer, error = _load_tokenizer(checkpoint.path)
        shared_tokenizer = None if tokenizer is None else SharedTokenizer(tokenizer)
        preparation = shared_tokenizer, error, SharedProcessor(checkpoint.path)
        model, _ = with_pooling(build_and_probe(checkpoint, config, exits, preparation), checkpoint)
        planner = _ModelPlanner.of(model, checkpoint, config, draft=None)
        largest = planner.sizes.weight_bytes * 2
        smallest = planner.plan(largest).minimum_budget
        steps = max(1, count - 1)
        budgets = [round(smallest * (largest / smallest) ** (step / steps)) for step in range(count)]
        plans: list[Plan] = []
        for budget in sorted({max(smallest, budget) for budget in budgets}):
            if not plans or plans[-1].num_buffers:
                plans.append(planner.plan(budget))
    return plans


# --- the checkpoint, its tokenizer, and its model without weights ---


def _find_checkpoint(source: str | os.PathLike[str], hub: HubOptions) -> Checkpoint:
    with only_waiting():  # this may download
        checkpoint = open_checkpoint(source, hub)
    check_cancelled()
    return checkpoint


def _load_tokenizer(path: Path) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """The checkpoint's tokenizer, or the reason why there is none. Without one, prompts are token ids."""
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None, "the checkpoint has no tokenizer; give the prompt as token ids"
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True), None
    except BaseException as error:
        if not is_foreign(error):
            raise
        return None, f"the checkpoint's tokenizer cannot be loaded ({reason_of(error)}); give the prompt as token ids"


def _sentences(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[SentenceSettings | CheckpointError, SharedTokenizer | None]:
    """The checkpoint's settings for sentence vectors, and a lower-casing tokenizer if they need one."""
    try:
        settings = sentence_settings(checkpoint.root or checkpoint.path, checkpoint.path)
    except CheckpointError as error:
        return error, None
    if tokenizer is None or not settings.lower_case:
        return settings, None
    lower = lower_casing(tokenizer)
    return settings, None if lower is tokenizer else SharedTokenizer(lower)


# --- the draft model ---


def _open_draft(
    checkpoint: Checkpoint,
    *,
    target: Skeleton,
    target_tokenizer: PreTrainedTokenizerBase | None,
    config: EngineConfig,
    exits: ExitStack,
) -> PlannedDraft:
    tokenizer, _ = _load_tokenizer(checkpoint.path)
    model = build_and_probe(checkpoint, replace(config, context_length=None, batching="packed"), exits)
    for which, skeleton in (("draft model", model.skeleton), ("model", target)):
        name = type(skeleton.model).__name__
        if not skeleton.generates:
            raise ConfigError(f"draft_model: the {which} is a {name}, which does not generate")
        if skeleton.is_encoder_decoder:
            raise ConfigError(f"draft_model: the {which} is a {name}, an encoder-decoder; it takes no part in drafts")
    if tokenizer is not None and target_tokenizer is not None:
        same_tokens = tokenizer.get_vocab() == target_tokenizer.get_vocab()
    else:
        same_tokens = model.skeleton.vocab_size == target.vocab_size
    if not same_tokens:
        raise ConfigError(
            f"the draft model in {checkpoint.path} must have the model's tokenizer, but has a different one"
        )
    whole = partition(model.skeleton, model.probe, None)
    weights = whole.base.slot_bytes + sum(stage.slot_bytes for stage in whole.stages) + whole.cast_bytes
    workspace = model.bounds().packed(tokens=_DRAFT_TOKENS, outputs=config.max_sequences, kv_bytes=0)
    return PlannedDraft(
        skeleton=model.skeleton,
        attention=model.attention,
        probe=model.probe,
        partition=whole,
        fixed_bytes=weights + workspace,
        max_tokens=_DRAFT_TOKENS,
    )


# --- the budget and the plan ---


def _claim_budget(claim: Claim, fixed_budget: int | None) -> int:
    """The budget, after the user's other engines with automatic budgets have made room for it.

    They look once a second, and give memory back between two sweeps. An automatic budget takes what is free then. A
    process that does not answer, for example because it is stopped, keeps its memory.
    """
    budget = claim.take() if fixed_budget is None else fixed_budget
    if claim.others_follow():
        ends_at = time.monotonic() + _SECONDS_FOR_OTHERS
        while claim.left_over() < budget and time.monotonic() < ends_at:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            check_cancelled()
        if fixed_budget is None:
            budget = min(budget, max(claim.left_over(), claim.left_over(ignore_claims=True)))
            claim.change(budget)
    return budget


@dataclass(frozen=True, slots=True)
class _ModelPlanner:
    """Makes plans for one model.

    Attributes:
        partition: From the most bytes of a stage to a cached partition.
        text_sizes: The sizes without room for images; the same as `sizes` where none are taken.
        own_kv_bytes_per_token: The model's; `sizes` counts those of a draft model too.
        turns_reason: Which requests run in turns, and why; empty if none does.
    """

    partition: Callable[[int | None], Partition]
    bounds: WorkspaceBounds
    sizes: ModelSizes
    text_sizes: ModelSizes
    config: EngineConfig
    speeds: MachineSpeeds
    own_kv_bytes_per_token: int
    turns_reason: str

    @classmethod
    def of(
        cls, model: ProbedModel, checkpoint: Checkpoint, config: EngineConfig, draft: PlannedDraft | None
    ) -> _ModelPlanner:
        bounds = model.bounds()
        sizes = _sizes(model, bounds, draft)
        return cls(
            partition=cache(partial(partition, model.skeleton, model.probe)),
            bounds=bounds,
            sizes=_with_room_for_images(sizes, model, bounds, config),
            text_sizes=sizes,
            config=config,
            speeds=_speeds(checkpoint),
            own_kv_bytes_per_token=_kv_bytes_per_token(model.probe),
            turns_reason=model.turns_reason,
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
        if not self.turns_reason:
            return chosen
        return replace(chosen, explanation=(self.turns_reason, *chosen.explanation))

    def budgets_for_kv(self, kv_bytes: int) -> tuple[int, int]:
        """The smallest `kv_budget` and `memory_budget` that leave `kv_bytes` to the model's own KV caches."""
        kv_budget = kv_bytes
        if self.own_kv_bytes_per_token:
            kv_budget = -(-kv_bytes * self.sizes.kv_bytes_per_token // self.own_kv_bytes_per_token)
        plenty = 2 * (self.sizes.weight_bytes + kv_budget + self.sizes.workspace_bytes(1, 1, kv_budget))
        planner = replace(self, config=replace(self.config, kv_budget=kv_budget))
        return kv_budget, planner.plan(plenty).minimum_budget


def _speeds(checkpoint: Checkpoint) -> MachineSpeeds:
    """The Layer Profiler's measurements on this machine, or estimates."""
    profile = load_profile(profile_file(checkpoint))
    return estimated() if profile is None else profile.machine_speeds()


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
    for path, module in skeleton.model.named_modules():
        if isinstance(module, nn.ModuleList):
            for name, layer in module.named_children():
                names = [f"{path}.{name}.{tensor}" for tensor in layer.state_dict()]
                yield weight_bytes((tensor for tensor in names if tensor in skeleton.tensors), skeleton.tensors)
