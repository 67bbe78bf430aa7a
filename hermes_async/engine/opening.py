"""From a checkpoint's name to everything an engine needs before it reads weights. Synchronous; for a worker thread."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hermes_async.config import EngineConfig, parse_bytes
from hermes_async.engine.encoding import lower_casing
from hermes_async.errors import CheckpointError, ConfigError
from hermes_async.foreign_errors import is_foreign, reason_of
from hermes_async.memory.available import process_rss_bytes
from hermes_async.memory.claims import Claim
from hermes_async.memory.heap import bound_heap
from hermes_async.modeling.activations import forward_bytes, workspace_bytes
from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.checkpoint_tensors import weight_bytes
from hermes_async.modeling.kv_cache import BLOCK_TOKENS
from hermes_async.modeling.partition import Partition, partition
from hermes_async.modeling.pooling import PoolingConfig, pooling_config, with_dense
from hermes_async.modeling.probe import Probe, probe, probe_forward
from hermes_async.modeling.selfcheck import check_packing
from hermes_async.modeling.sentence import SentenceSettings, sentence_settings
from hermes_async.modeling.skeleton import Skeleton, build_skeleton, load_config, with_context_length
from hermes_async.modeling.transformers_api import warn_of_untested_versions
from hermes_async.planning.model_sizes import ModelSizes
from hermes_async.planning.plan import Plan
from hermes_async.planning.planner import plan
from hermes_async.planning.profile_store import load_profile, profile_file
from hermes_async.planning.speeds import Speeds, estimated
from hermes_async.serving.planned_model import PlannedDraft, PlannedModel
from hermes_async.serving.tokenizer import SharedTokenizer
from hermes_async.storage.checkpoint import Checkpoint, open_checkpoint
from hermes_async.storage.hub import HubOptions
from hermes_async.storage.rows import RowReader
from hermes_async.storage.threads import check_cancelled, only_waiting

_DRAFT_TOKENS = 256
"""Tokens of one pass of a draft model; more are pending only when it sees a prompt for the first time."""

_TEXT_TOKENS = 64
"""A model that does not generate must have room for at least so many tokens of text at once."""

_LONG_TEXT_TOKENS = 512
"""And should have room for so many: the context of most encoders."""

_LOOKING_AT = threading.Lock()
"""Transformers changes torch's default dtype for the whole process while it makes a model: one at a time."""

_SECONDS_FOR_OTHERS = 10.0
_SECONDS_BETWEEN_LOOKS = 0.1

_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model"),
)


@dataclass(slots=True)
class OpenedModel(PlannedModel):
    """A planned model, and what the engine needs to turn its users' texts into its inputs.

    Attributes:
        tokenizer: None where the checkpoint has none, for the reason that `tokenizer_error` gives.
        pooling: How the checkpoint makes sentence vectors, or why it makes none, which only `embed` asks for.
        sentences: How the checkpoint makes tokens of texts for that, or why it does not.
        sentence_tokenizer: The tokenizer for that.
        budgets_for_kv: The smallest `kv_budget` and `memory_budget` that leave so many bytes to KV caches.
    """

    tokenizer: SharedTokenizer | None
    tokenizer_error: str | None
    pooling: PoolingConfig | CheckpointError
    sentences: SentenceSettings | CheckpointError
    sentence_tokenizer: SharedTokenizer | None
    budgets_for_kv: Callable[[int], tuple[int, int]]


def open_model(
    source: str | os.PathLike[str],
    memory_budget: int | str,
    config: EngineConfig,
    draft_source: str | os.PathLike[str] | None = None,
    hub: HubOptions | None = None,
) -> OpenedModel:
    """Finds the checkpoint, builds the model without weights, looks at how it runs, and divides the budget.

    Args:
        source: A directory, or an id on the Hugging Face hub, which is downloaded first.
        memory_budget: Bytes, a text such as "3GiB", or "auto".
        draft_source: A draft model's, as `source`.
        hub: How a model on the hub is found; the revision is the model's alone.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError, MemoryBudgetError: Each as its class says.
    """
    fixed_budget = None if memory_budget == "auto" else parse_bytes(memory_budget)
    hub = hub or HubOptions()
    bound_heap()
    with ExitStack() as on_error:
        with only_waiting():  # for a download, perhaps
            checkpoint = open_checkpoint(source, hub)
        check_cancelled()
        claim = Claim(fixed_budget)
        on_error.callback(claim.release)
        tokenizer, tokenizer_error = _load_tokenizer(checkpoint.path)
        check_cancelled()
        skeleton, attention, seen = _look_at(checkpoint, config, on_error)
        check_cancelled()
        skeleton, pooling = _with_pooling(skeleton, checkpoint)
        sentences, sentence_tokenizer = _sentences(checkpoint, tokenizer)
        shared = None if tokenizer is None else SharedTokenizer(tokenizer)
        shared_for_sentences = shared
        if sentence_tokenizer is not None and sentence_tokenizer is not tokenizer:
            shared_for_sentences = SharedTokenizer(sentence_tokenizer)
        draft = None
        if draft_source is not None:
            draft = _open_draft(draft_source, skeleton, tokenizer, config, on_error, replace(hub, revision=None))
        baseline = process_rss_bytes()
        budget = _claimed(claim, fixed_budget)
        of_pass = forward_bytes(skeleton, seen)
        sizes = _sizes(skeleton, attention, seen, of_pass, draft)
        cuts, speeds = _cuts(skeleton, seen), _speeds(checkpoint)
        chosen = plan(budget, cuts, sizes, config, speeds)
        own_kv_bytes_per_token = seen.kv.bytes_per_token

        def budgets_for_kv(kv_bytes: int) -> tuple[int, int]:
            kv_budget = -(-kv_bytes * sizes.kv_bytes_per_token // own_kv_bytes_per_token)
            plenty = 2 * (sizes.weight_bytes + kv_budget + sizes.workspace_bytes(1, 1, kv_budget))
            return kv_budget, plan(plenty, cuts, sizes, replace(config, kv_budget=kv_budget), speeds).minimum_budget

        if draft is not None:
            own = chosen.kv_bytes * seen.kv.bytes_per_token // sizes.kv_bytes_per_token
            draft = replace(draft, kv_bytes=chosen.kv_bytes - own)
            chosen = replace(chosen, kv_bytes=own, kv_bytes_per_token=seen.kv.bytes_per_token)
        assert isinstance(chosen.partition, Partition)
        on_error.pop_all()
    return OpenedModel(
        checkpoint=checkpoint,
        skeleton=skeleton,
        attention=attention,
        seen=seen,
        partition=chosen.partition,
        plan=chosen,
        forward_bytes=of_pass,
        draft=draft,
        baseline_bytes=baseline,
        claim=claim,
        tokenizer=shared,
        tokenizer_error=tokenizer_error,
        pooling=pooling,
        sentences=sentences,
        sentence_tokenizer=shared_for_sentences,
        budgets_for_kv=budgets_for_kv,
    )


def _claimed(claim: Claim, fixed_budget: int | None) -> int:
    """The budget, when other engines of the user that follow the machine have made room for it.

    They look once a second, and answer between two sweeps. An automatic budget is what is there in the end; a process
    that does not answer, as it may be stopped, keeps what it holds.
    """
    budget = claim.take() if fixed_budget is None else fixed_budget
    if claim.others_follow():
        ends_at = time.monotonic() + _SECONDS_FOR_OTHERS
        while claim.left_over() < budget and time.monotonic() < ends_at:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
            check_cancelled()
        if fixed_budget is None:
            budget = min(budget, max(claim.left_over(), claim.left_over(whatever_is_claimed=True)))
            claim.change(budget)
    return budget


def _speeds(checkpoint: Checkpoint) -> Speeds:
    """As the Layer Profiler measured them on this machine, or estimated."""
    profile = load_profile(profile_file(checkpoint))
    return estimated() if profile is None else profile.speeds()


def plans_by_budget(source: str | os.PathLike[str], config: EngineConfig, count: int) -> list[Plan]:
    """Plans for `count` budgets or fewer, from the smallest that works to the one in which everything stays.

    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: Each as its class says.
    """
    with ExitStack() as always:
        checkpoint = Checkpoint.open(source)
        skeleton, attention, seen = _look_at(checkpoint, config, always)
        skeleton, _ = _with_pooling(skeleton, checkpoint)
        sizes = _sizes(skeleton, attention, seen, forward_bytes(skeleton, seen), None)
        cut, speeds = _cuts(skeleton, seen), _speeds(checkpoint)
        most = sizes.weight_bytes * 2
        minimum = plan(most, cut, sizes, config, speeds).minimum_budget
        steps = max(1, count - 1)
        budgets = [round(minimum * (most / minimum) ** (step / steps)) for step in range(count)]
        plans: list[Plan] = []
        for budget in sorted({max(minimum, budget) for budget in budgets}):
            if not plans or plans[-1].num_buffers:
                plans.append(plan(budget, cut, sizes, config, speeds))
    return plans


def _cuts(skeleton: Skeleton, seen: Probe) -> Callable[[int | None], Partition]:
    return lru_cache(maxsize=None)(lambda limit: partition(skeleton, seen, limit))


def _look_at(
    checkpoint: Checkpoint, config: EngineConfig, on_error: ExitStack
) -> tuple[Skeleton, PackedAttention, Probe]:
    warn_of_untested_versions()
    attention = PackedAttention()
    on_error.callback(attention.close)
    with _LOOKING_AT:
        model_config = load_config(checkpoint)
        skeleton = build_skeleton(checkpoint, model_config, attention.name)
        skeleton = with_context_length(skeleton, config.context_length)
        if not skeleton.generates:
            return skeleton, attention, probe_forward(skeleton)
        if config.self_check == "require":
            check_packing(model_config, attention)
        return skeleton, attention, probe(skeleton, attention)


def _open_draft(
    source: str | os.PathLike[str],
    target: Skeleton,
    target_tokenizer: PreTrainedTokenizerBase | None,
    config: EngineConfig,
    on_error: ExitStack,
    hub: HubOptions,
) -> PlannedDraft:
    with only_waiting():
        checkpoint = open_checkpoint(source, hub)
    check_cancelled()
    tokenizer, _ = _load_tokenizer(checkpoint.path)
    skeleton, attention, seen = _look_at(checkpoint, replace(config, context_length=None), on_error)
    for which, looked_at in (("draft model", skeleton), ("model", target)):
        if not looked_at.generates:
            raise ConfigError(
                f"draft_model: the {which} is a {type(looked_at.model).__name__}, which does not generate"
            )
    if tokenizer is not None and target_tokenizer is not None:
        same = tokenizer.get_vocab() == target_tokenizer.get_vocab()
    else:
        same = skeleton.vocab_size == target.vocab_size
    if not same:
        raise ConfigError(
            f"the draft model in {checkpoint.path} has another tokenizer than the model; it must be the same"
        )
    whole = partition(skeleton, seen, None)
    weights = whole.base.slot_bytes + sum(stage.slot_bytes for stage in whole.stages) + whole.cast_bytes
    workspace = workspace_bytes(skeleton, seen, attention)(_DRAFT_TOKENS, config.max_sequences, 0)
    return PlannedDraft(skeleton, attention, seen, whole, weights + workspace, _DRAFT_TOKENS)


def _sizes(
    skeleton: Skeleton,
    attention: PackedAttention,
    seen: Probe,
    of_pass: Callable[[int, int], int],
    draft: PlannedDraft | None,
) -> ModelSizes:
    embedding = skeleton.tensors[skeleton.embedding_name] if seen.embeds_input_ids else None
    if skeleton.generates:
        activations = workspace_bytes(skeleton, seen, attention)
    else:
        activations = _forward_activations(skeleton, seen, of_pass)

    def workspace(tokens: int, outputs: int, kv_bytes: int) -> int:
        rows = 0
        if embedding is not None:
            rows = RowReader.buffer_bytes(embedding, tokens) + tokens * embedding.nbytes // embedding.shape[0]
        return activations(tokens, outputs, kv_bytes) + rows

    kv_bytes_per_token = seen.kv.bytes_per_token if skeleton.generates else 0
    sizes = ModelSizes(
        largest_layer_bytes=max(_layer_bytes(skeleton), default=weight_bytes(skeleton.tensors, skeleton.tensors)),
        weight_bytes=weight_bytes(skeleton.tensors, skeleton.tensors),
        kv_bytes_per_token=kv_bytes_per_token + (0 if draft is None else draft.seen.kv.bytes_per_token),
        context_length=skeleton.context_length,
        workspace_bytes=workspace,
        kv_block_tokens=BLOCK_TOKENS,
        draft_bytes=0 if draft is None else draft.fixed_bytes,
        head_name=_head_name(skeleton),
        embedding_name="" if skeleton.embedding is None else skeleton.embedding_name.rpartition(".")[0],
    )
    if skeleton.generates:
        return sizes
    long_text = min(_LONG_TEXT_TOKENS, skeleton.context_length or _LONG_TEXT_TOKENS)
    return replace(
        sizes,
        least_sweep_tokens=seen.tokens_per_image or _TEXT_TOKENS,
        long_text_tokens=0 if seen.tokens_per_image else long_text,
    )


def _head_name(skeleton: Skeleton) -> str:
    """The module that makes logits of chosen positions; none where every position's output is wanted."""
    if not skeleton.generates:
        return ""
    head = skeleton.model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return next((path for path, module in skeleton.model.named_modules() if module is head), "")


def _forward_activations(
    skeleton: Skeleton, seen: Probe, of_pass: Callable[[int, int], int]
) -> Callable[[int, int, int], int]:
    """Of a model that does not generate, by tokens: as many images, or texts as long as they may be."""
    longest = seen.tokens_per_image or skeleton.context_length or max(_TEXT_TOKENS, 1)

    def activations(tokens: int, outputs: int, kv_bytes: int) -> int:
        return of_pass(-(-tokens // longest), min(tokens, longest))

    return activations


def _layer_bytes(skeleton: Skeleton) -> Sequence[int]:
    """Bytes of each module that stands in a list: the transformer layers."""
    sizes = []
    for path, module in skeleton.model.named_modules():
        if isinstance(module, nn.ModuleList):
            for name, layer in module.named_children():
                names = [f"{path}.{name}.{tensor}" for tensor in layer.state_dict()]
                sizes.append(weight_bytes((tensor for tensor in names if tensor in skeleton.tensors), skeleton.tensors))
    return sizes


def _with_pooling(skeleton: Skeleton, checkpoint: Checkpoint) -> tuple[Skeleton, PoolingConfig | CheckpointError]:
    """The model with the checkpoint's Dense layers, if it makes sentence vectors in a way that is built."""
    try:
        pooling = pooling_config(
            checkpoint.root or checkpoint.path,
            skeleton.model.config.architectures or (),
            is_causal=getattr(skeleton.model.config, "is_causal", True) is not False,
        )
        return with_dense(skeleton, pooling), pooling
    except CheckpointError as error:
        return skeleton, error


def _sentences(
    checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[SentenceSettings | CheckpointError, PreTrainedTokenizerBase | None]:
    try:
        settings = sentence_settings(checkpoint.root or checkpoint.path, checkpoint.path)
    except CheckpointError as error:
        return error, tokenizer
    return settings, lower_casing(tokenizer) if settings.lower_case and tokenizer is not None else tokenizer


def _load_tokenizer(path: Path) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """The checkpoint's tokenizer, or why there is none: such a model runs on token ids."""
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None, f"{path} has no tokenizer; give the prompt as token ids"
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True), None
    except BaseException as error:
        if not is_foreign(error):
            raise
        return None, f"the tokenizer in {path} cannot be loaded ({reason_of(error)}); give the prompt as token ids"
