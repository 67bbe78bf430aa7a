"""Builds a checkpoint's model without weights, and finds out how it runs: packed, in turns, or forward only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TypeAlias

from transformers import PreTrainedConfig

from hermes_async.config import EngineConfig
from hermes_async.engine.image_prompt import example_with_image, takes_images
from hermes_async.engine.kernel_choice import choose_products
from hermes_async.errors import CheckpointError, RequestError, UnsupportedModelError
from hermes_async.modeling.activations import WorkspaceBounds
from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.checkpoint_tensors import stored_tensors
from hermes_async.modeling.model_config import load_config
from hermes_async.modeling.pooling import PoolingConfig, pooling_config, with_dense
from hermes_async.modeling.probe import Probe, probe_forward, probe_packed
from hermes_async.modeling.probe_images import with_images, with_turns
from hermes_async.modeling.probe_turns import probe_turns
from hermes_async.modeling.selfcheck import check_packing
from hermes_async.modeling.selfcheck_turns import check_turns
from hermes_async.modeling.skeleton import Skeleton, build_skeleton, with_context_length
from hermes_async.modeling.transformers_api import AttentionChoice, warn_of_untested_versions
from hermes_async.modeling.turns import TurnTraits
from hermes_async.quantization.bfloat16_products import Bfloat16Products
from hermes_async.serving.processor import SharedProcessor
from hermes_async.serving.tokenizer import SharedTokenizer
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.opening_watch import waits_for_others
from hermes_async.storage.threads import check_cancelled

Preparation: TypeAlias = tuple[SharedTokenizer | None, str | None, SharedProcessor]
"""What turns texts and images into inputs: the tokenizer, or the reason why there is none, and the processor."""

_BUILDING = threading.Lock()
"""Held while a model is built: transformers changes torch's default dtype for the whole process meanwhile."""
_SECONDS_BETWEEN_TRIES = 0.1


@dataclass(frozen=True, slots=True)
class ProbedModel:
    """A model without weights, and how it runs.

    Attributes:
        refusal: Why it runs in turns; None if it does not, or was asked to.
        products: How inputs are multiplied with bfloat16 weights.
        images_refusal: Why prompts with images are refused; empty where they are not.
    """

    skeleton: Skeleton
    attention: PackedAttention
    probe: Probe
    products: Bfloat16Products
    refusal: UnsupportedModelError | None = None
    images_refusal: str = ""

    @property
    def turns_reason(self) -> str:
        """One line for the plan; empty if no request runs in turns."""
        if self.probe.turns is None:
            return ""
        if self.probe.packs:
            return "packed; requests with images in turns"
        traits = self.probe.turns.traits
        why = "as batching='turns' asks for" if self.refusal is None else f"a packed row does not work: {self.refusal}"
        if self.skeleton.is_encoder_decoder:
            why = "as encoder-decoders do"
        cannot = [] if traits.chunks else ["a prompt is not divided"]
        cannot += [] if traits.keeps else ["no cache: each token computes the whole sequence"]
        cannot += [] if traits.crops else ["prompt lookup is off, because drafted tokens cannot be removed"]
        return "; ".join([f"in turns, {why}", *cannot])

    def bounds(self) -> WorkspaceBounds:
        return WorkspaceBounds(self.skeleton, self.probe, self.attention, self.products)


@dataclass(frozen=True, slots=True)
class _Unopened:
    """What the preparation of images needs."""

    skeleton: Skeleton
    tokenizer: SharedTokenizer | None
    tokenizer_error: str | None
    processor: SharedProcessor


@contextmanager
def _building() -> Iterator[None]:
    """A block in which a model is built. Another one may take long, because its disk hangs."""
    with waits_for_others():
        while not _BUILDING.acquire(timeout=_SECONDS_BETWEEN_TRIES):
            check_cancelled()
    try:
        yield
    finally:
        _BUILDING.release()


def build_and_probe(
    checkpoint: Checkpoint,
    config: EngineConfig,
    exits: ExitStack,
    preparation: Preparation | None = None,
    *,
    compiles: bool = False,
) -> ProbedModel:
    """Builds a model without weights and probes it. `exits` unregisters its attention from transformers.

    Args:
        compiles: As for `choose_products`.
        preparation: Makes a prompt with an image to try the model with; None for a model that is given none.
    """
    warn_of_untested_versions()
    attention = PackedAttention()
    exits.callback(attention.close)
    with _building():
        model_config = load_config(checkpoint)
        # In turns, with transformers' default attention, which some architectures choose when they are built.
        named_attention = None if config.batching == "turns" else attention.name
        stored = stored_tensors(checkpoint)
        skeleton = build_skeleton(checkpoint, model_config, stored, named_attention, config.dtype)
        skeleton = with_context_length(skeleton, config.context_length)
        products = choose_products(skeleton.model, config, compiles=compiles)
        if not skeleton.generates:
            return ProbedModel(skeleton, attention, probe_forward(skeleton), products)
        if skeleton.is_encoder_decoder and config.batching == "packed":
            raise UnsupportedModelError(
                f"{type(skeleton.model).__name__} is an encoder-decoder, and those run in turns; leave out "
                "batching='packed'"
            )
        refusal: UnsupportedModelError | None = None
        if config.batching != "turns" and not skeleton.is_encoder_decoder:
            try:
                if config.self_check == "require":
                    check_packing(model_config, attention)
                model = ProbedModel(skeleton, attention, probe_packed(skeleton, attention), products)
                return _with_images(model, model_config, config, preparation)
            except UnsupportedModelError as error:
                if config.batching == "packed":
                    raise
                refusal = error
                skeleton = build_skeleton(checkpoint, model_config, stored, None, config.dtype)
                skeleton = with_context_length(skeleton, config.context_length)
        traits = _traits(model_config, config)
        model = ProbedModel(skeleton, attention, probe_turns(skeleton, traits), products, refusal)
        return _with_images(model, model_config, config, preparation)


def _with_images(
    model: ProbedModel, model_config: PreTrainedConfig, config: EngineConfig, preparation: Preparation | None
) -> ProbedModel:
    """The model as it runs with images too, if it takes some; otherwise the model, and the reason.

    Requests with images run in turns. Texts that are packed stay so.
    """
    skeleton, probe = model.skeleton, model.probe
    if preparation is None or not takes_images(skeleton):
        return model
    if config.batching == "packed":
        return replace(model, images_refusal="requests with images run in turns, and batching='packed' allows none")
    try:
        example = example_with_image(_Unopened(skeleton, *preparation))
        packed_attention = AttentionChoice(skeleton.model)
        packed_attention.or_plain_for(model.attention.name).apply()
        try:
            if probe.turns is None:
                probe = with_turns(probe, probe_turns(skeleton, _traits(model_config, config)))
            return replace(model, probe=with_images(skeleton, probe, example.token_ids, example.model_inputs))
        finally:
            packed_attention.apply()
    except (RequestError, CheckpointError) as error:
        return replace(model, images_refusal=str(error))


def _traits(model_config: PreTrainedConfig, config: EngineConfig) -> TurnTraits:
    return check_turns(model_config) if config.self_check == "require" else TurnTraits()


def with_pooling(model: ProbedModel, checkpoint: Checkpoint) -> tuple[ProbedModel, PoolingConfig | CheckpointError]:
    """The model with the checkpoint's Dense layers, and its pooling; or the model unchanged, and the error."""
    skeleton = model.skeleton
    try:
        pooling = pooling_config(
            checkpoint.root or checkpoint.path,
            skeleton.model.config.architectures or (),
            is_causal=getattr(skeleton.model.config, "is_causal", True) is not False,
        )
        return replace(model, skeleton=with_dense(skeleton, pooling)), pooling
    except CheckpointError as error:
        return model, error
