"""From a checkpoint's name to a planned model, before weights are read. Synchronous: call it on a worker thread."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hermes_async.config import EngineConfig, parse_bytes
from hermes_async.engine.encoding import lower_casing
from hermes_async.engine.kernel_choice import compiler_pays
from hermes_async.engine.model_planner import ModelPlanner
from hermes_async.engine.probing import ProbedModel, build_and_probe, with_pooling
from hermes_async.errors import CheckpointError, ConfigError, MemoryBudgetError
from hermes_async.foreign_errors import is_foreign, reason_of
from hermes_async.memory.available import free_bytes, process_rss_bytes
from hermes_async.memory.claims import Claim, refusal
from hermes_async.memory.library_caches import bound_heap
from hermes_async.memory.locking import locking
from hermes_async.modeling.config_limits import check_config
from hermes_async.modeling.gguf_api import gguf_tokenizer
from hermes_async.modeling.model_config import load_config
from hermes_async.modeling.partition import Partition, partition
from hermes_async.modeling.pooling import PoolingConfig
from hermes_async.modeling.sentence import SentenceSettings, sentence_settings
from hermes_async.modeling.skeleton import Skeleton
from hermes_async.modeling.structured_outputs import GrammarCompiler
from hermes_async.modeling.tokenizer_limits import check_tokenizer
from hermes_async.planning.plan import Plan
from hermes_async.quantization.bfloat16_products import Bfloat16Products
from hermes_async.quantization.encoded_weight import EncodedParameter
from hermes_async.quantization.encoding import Encoding, has_compiler
from hermes_async.quantization.scale_check import check_scales
from hermes_async.quantization.tile_products import MOST_LINES, TILED_DTYPES, prepare_tiles
from hermes_async.serving.planned_model import PlannedDraft, PlannedModel, usable_bytes
from hermes_async.serving.processor import SharedProcessor
from hermes_async.serving.tokenizer import SharedTokenizer
from hermes_async.storage.checkpoint import Checkpoint, open_checkpoint
from hermes_async.storage.file_kinds import is_file
from hermes_async.storage.hub import HubOptions
from hermes_async.storage.threads import check_cancelled, only_waiting

_DRAFT_TOKENS = 256
"""The most tokens of one pass of a draft model. Only a new prompt has more."""

_ANY_MODEL_BYTES = 1 << 50  # a budget that every model fits into
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
        claim = Claim(automatic=fixed_budget is None)
        on_error.callback(claim.release)
        tokenizer, tokenizer_error = load_tokenizer(checkpoint)
        shared_tokenizer = None if tokenizer is None else SharedTokenizer(tokenizer)
        processor = SharedProcessor(checkpoint.path)
        check_cancelled()
        compiles = config.kernels == "fastest" and has_compiler()
        compiles = compiles or compiler_pays(checkpoint.total_bytes, fixed_budget or free_bytes())
        preparation = shared_tokenizer, tokenizer_error, processor
        model = build_and_probe(checkpoint, config, on_error, preparation, compiles=compiles)
        check_cancelled()
        check_scales(model.skeleton.encoded.values())
        # Before the budget is divided, as it takes memory.
        for encoding, dtype in _encodings(model.skeleton.encoded.values()):
            encoding.prepare(dtype)
            if encoding.compiles and has_compiler() and dtype in TILED_DTYPES:
                prepare_tiles(torch.float32, dtype)
        model, pooling = with_pooling(model, checkpoint)
        sentences, lower_casing_tokenizer = _sentences(checkpoint, tokenizer)
        draft = None
        if draft_source is not None:
            draft_checkpoint = _find_checkpoint(draft_source, replace(hub, revision=None))
            draft = _open_draft(
                draft_checkpoint, target=model.skeleton, target_tokenizer=tokenizer, config=config, exits=on_error
            )
        baseline = process_rss_bytes()
        planner = ModelPlanner.of(model, checkpoint, config, draft)
        chosen = _automatic_plan(claim, planner) if fixed_budget is None else planner.plan(fixed_budget)
        if draft is not None:
            own_kv_bytes = chosen.kv_bytes * planner.own_kv_bytes_per_token // planner.sizes.kv_bytes_per_token
            draft = replace(draft, kv_bytes=chosen.kv_bytes - own_kv_bytes)
            chosen = replace(chosen, kv_bytes=own_kv_bytes, kv_bytes_per_token=planner.own_kv_bytes_per_token)
        lends = claim.automatic and config.max_resident_layers is None and not chosen.partition.experts
        chosen = replace(chosen, lends=lends)
        usable = usable_bytes(chosen, draft)
        claim.change(usable)
        if not claim.automatic:  # what a user says comes before what others took for themselves
            _wait_for_others(claim, usable)
        lockable = chosen.lockable_bytes + (0 if draft is None else draft.weight_bytes)
        lock = locking(config.lock_memory, lockable)
        chosen = replace(chosen, locked_bytes=lockable if lock.is_on else 0, lock_refusal=lock.refusal)
        products = model.products
        if chosen.native_tokens:  # torch's own kernels multiply few tokens
            products = replace(products, vector_gain=0.0)
        chosen = replace(chosen, explanation=(*chosen.explanation, *_products_explanation(model, products)))
        assert isinstance(chosen.partition, Partition)
        on_error.pop_all()
    return OpenedModel(
        checkpoint=checkpoint,
        skeleton=model.skeleton,
        attention=model.attention,
        probe=model.probe,
        products=products,
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
        tokenizer, error = load_tokenizer(checkpoint)
        shared_tokenizer = None if tokenizer is None else SharedTokenizer(tokenizer)
        preparation = shared_tokenizer, error, SharedProcessor(checkpoint.path)
        model, _ = with_pooling(build_and_probe(checkpoint, config, exits, preparation), checkpoint)
        planner = ModelPlanner.of(model, checkpoint, config, draft=None)
        smallest = planner.plan(_ANY_MODEL_BYTES).minimum_budget
        largest = 2 * max(smallest, planner.sizes.weight_bytes)
        steps = max(1, count - 1)
        budgets = [round(smallest * (largest / smallest) ** (step / steps)) for step in range(count)]
        plans: list[Plan] = []
        for budget in sorted({max(smallest, budget) for budget in budgets}):
            if not plans or plans[-1].reads_weights:
                plans.append(planner.plan(budget))
    return plans


# --- the checkpoint, its tokenizer, and its model without weights ---


def _find_checkpoint(source: str | os.PathLike[str], hub: HubOptions) -> Checkpoint:
    with only_waiting():  # this may download
        checkpoint = open_checkpoint(source, hub)
    check_cancelled()
    return checkpoint


def load_tokenizer(checkpoint: Checkpoint) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """The checkpoint's tokenizer, or the reason why there is none. Without one, prompts are token ids.

    Raises:
        CheckpointError: It is not used, because of what it could do to a text.
    """
    path, gguf = checkpoint.path, checkpoint.gguf
    if gguf is None and not any(is_file(path / name) for name in _TOKENIZER_FILES):
        return None, "the checkpoint has no tokenizer; give the prompt as token ids"
    if gguf is not None and "tokenizer.ggml.tokens" not in gguf.metadata:
        return None, "the GGUF file has no tokenizer; give the prompt as token ids"
    try:
        if gguf is not None:
            tokenizer = gguf_tokenizer(gguf, load_config(checkpoint))
        else:
            # transformers reads the configuration too, so its numbers are checked first.
            check_config(path / "config.json", checkpoint.config, checkpoint.tensors.values())
            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        check_tokenizer(tokenizer)
        return tokenizer, None
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


def _encodings(parameters: Iterable[EncodedParameter]) -> set[tuple[Encoding, torch.dtype]]:
    """How parameters are stored, and in which dtype they are computed."""
    return {(matrix.encoding, one.dtype) for one in parameters for matrix in one.matrices}


def _products_explanation(model: ProbedModel, products: Bfloat16Products) -> Iterator[str]:
    weights = [one for one in model.skeleton.encoded.values() if not one.whole]
    encodings = {encoding for encoding, dtype in _encodings(weights) if dtype == torch.bfloat16}
    compiling = {encoding.name for encoding in encodings if encoding.compiles and not encoding.needs_compiler}
    compiled = compiling and has_compiler()
    yield from products.explanation(scaled=not compiled and any(encoding.scales_inputs for encoding in encodings))
    names = " and ".join(sorted(compiling))
    if compiled and products.scales_inputs:
        yield (
            f"up to {MOST_LINES} tokens: compiled functions multiply with {names} weights; they may round otherwise "
            "than kernels='transformers'"
        )
    elif compiling and not compiled:
        yield f"{names} weights are multiplied several times as fast with: pip install 'hermes-async[compiled]'"


# --- the draft model ---


def _open_draft(
    checkpoint: Checkpoint,
    *,
    target: Skeleton,
    target_tokenizer: PreTrainedTokenizerBase | None,
    config: EngineConfig,
    exits: ExitStack,
) -> PlannedDraft:
    tokenizer, _ = load_tokenizer(checkpoint)
    model = build_and_probe(checkpoint, replace(config, context_length=None, batching="packed"), exits)
    check_scales(model.skeleton.encoded.values())
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
    whole = partition(model.skeleton, model.probe)
    workspace = model.bounds().packed(tokens=_DRAFT_TOKENS, outputs=config.max_sequences, kv_bytes=0)
    planned = PlannedDraft(
        skeleton=model.skeleton,
        attention=model.attention,
        probe=model.probe,
        partition=whole,
        products=model.products,
        fixed_bytes=whole.cast_bytes + workspace,
        max_tokens=_DRAFT_TOKENS,
    )
    return replace(planned, fixed_bytes=planned.fixed_bytes + planned.weight_bytes)


# --- the budget and the plan ---


def _automatic_plan(claim: Claim, planner: ModelPlanner) -> Plan:
    """The plan for what the machine leaves, after the user's other engines have made room.

    A process that does not answer, for example because it is stopped, keeps its memory.

    Raises:
        MemoryBudgetError: That is too little; the error says who has the memory, and how much more would do.
    """
    budget = claim.take()
    _wait_for_others(claim, budget)
    budget = min(budget, max(claim.left_over(), claim.left_over(ignore_claims=True)))
    try:
        return planner.plan(budget)
    except MemoryBudgetError as error:
        raise refusal(claim.look(), budget, error) from None


def _wait_for_others(claim: Claim, nbytes: int) -> None:
    """Waits until the user's other engines with automatic budgets leave so many bytes, but not for long.

    They look once a second, and give memory back between two sweeps.
    """
    ends_at = time.monotonic() + _SECONDS_FOR_OTHERS
    while claim.others_follow() and claim.left_over() < nbytes and time.monotonic() < ends_at:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        check_cancelled()
