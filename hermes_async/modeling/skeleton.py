"""The real transformers model without its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hermes_async.errors import (
    ConfigError,
    IncompatibleVersionError,
    MissingTensorError,
    UnsupportedModelError,
)
from hermes_async.foreign_errors import reason_of
from hermes_async.modeling.checkpoint_tensors import ResolvedTensors, Stored, resolve_tensors
from hermes_async.modeling.config_limits import check_tables
from hermes_async.modeling.context_length import context_length_of
from hermes_async.modeling.generation_config import GenerationConfig, read_generation_config
from hermes_async.modeling.gguf_api import gguf_dtype
from hermes_async.modeling.model_classes import (
    causal_class,
    encoder_class,
    encoder_decoder_class,
    headless_class,
    named_base,
)
from hermes_async.modeling.module_tensors import place_of
from hermes_async.modeling.transformers_api import (
    from_config,
    initialize_again,
    mark_initialized,
    names_kept_in_float32,
    supports_packed_attention,
)
from hermes_async.quantization.encoded_weight import EncodedParameter
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.tensor_spec import TensorSpec

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device; only its non-persistent buffers, such as rotary frequencies, have values.

    Attributes:
        tensors: The checkpoint's tensor of each parameter and persistent buffer, tied names included. Those of an
            encoded parameter have names of their own, which begin with the parameter's; see `parameter_of`.
        encoded: The parameters that are computed from stored tensors when they are used, by name.
        dtype: The dtype that the model computes in.
        dtypes: The dtype of each parameter and persistent buffer; some stay in float32 whatever `dtype` is.
        generates: Whether it is a causal language model or an encoder-decoder with a head, with which the engine
            generates; others only run forward.
        names_base: Whether it generates, but `config.json` names the model without its head (`GPT2Model`, whose head is
            tied). A plain forward pass then runs the model without its head.
        token_inputs: The inputs of its forward that may be looked up in the input embedding.
        generation: What the checkpoint says of generation.
        context_length: Most tokens of a sequence, prompt and completion together; of an encoder-decoder, what its
            decoder gets and gives. None without a limit.
    """

    model: PreTrainedModel
    tensors: dict[str, TensorSpec]
    dtype: torch.dtype
    dtypes: dict[str, torch.dtype]
    generates: bool
    names_base: bool
    token_inputs: tuple[str, ...]
    generation: GenerationConfig
    context_length: int | None
    encoded: dict[str, EncodedParameter] = field(default_factory=dict)

    @property
    def embedding(self) -> nn.Embedding | None:
        """The input embedding of token ids; None where the input is something else."""
        return token_embedding(self.model)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The model's end-of-sequence tokens; some may be outside of the vocabulary."""
        return self.generation.eos_token_ids

    @property
    def named_model(self) -> PreTrainedModel:
        """The model that `config.json` names."""
        return self.base_model if self.names_base else self.model

    @property
    def base_model(self) -> PreTrainedModel:
        """The model without its head."""
        base = self.model.base_model
        assert isinstance(base, PreTrainedModel)
        return base

    @property
    def text_encoder(self) -> PreTrainedModel:
        """The part that makes hidden states from texts: the model without its head, or only its encoder."""
        base = self.base_model
        if not base.config.is_encoder_decoder:
            return base
        encoder = base.get_encoder()
        assert isinstance(encoder, PreTrainedModel)
        return encoder

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether it generates from what an encoder makes of the prompt."""
        return self.generates and bool(self.model.config.is_encoder_decoder)

    @property
    def input_length(self) -> int | None:
        """The most tokens of an encoder-decoder's input; None without a limit."""
        own = getattr(self.model.config, "max_encoder_position_embeddings", None)
        return own if isinstance(own, int) else self.context_length

    @property
    def num_choices(self) -> int:
        """The tokens that can be generated. The model must generate."""
        return num_choices(self.model)

    @property
    def vocab_size(self) -> int:
        """The rows of the input embedding; there must be one."""
        embedding = self.embedding
        assert embedding is not None
        return embedding.num_embeddings

    @property
    def embedding_name(self) -> str:
        """The name of the input embedding's parameter; there must be one."""
        embedding = self.embedding
        return next(f"{name}.weight" for name, module in self.model.named_modules() if module is embedding)

    def __repr__(self) -> str:
        return f"<Skeleton {type(self.model).__name__} {self.dtype}: {len(self.tensors)} tensors>"


def build_skeleton(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    stored: Mapping[str, Stored],
    attention: str | None,
    dtype: str = "auto",
) -> Skeleton:
    """Builds the model that `config` names on the meta device and finds its tensors.

    Args:
        stored: See `stored_tensors`.
        attention: The name of the attention function for causal language models that let it be chosen; None for
            transformers' default.
        dtype: As `EngineConfig.dtype`.

    Raises:
        UnsupportedModelError: transformers does not know the model, or its weights would have to be converted.
        MissingTensorError: A parameter has no tensor.
        CheckpointError: A tensor's shape is not its parameter's.
    """
    computed_in = _resolve_dtype(checkpoint, config) if dtype == "auto" else _DTYPES[dtype]
    where = str(checkpoint.path)
    # Other implementations take the weights of all experts at once, which would have to be dequantized for them.
    in_blocks = checkpoint.gguf is not None or any(not isinstance(one, TensorSpec) for one in stored.values())
    experts = "eager" if in_blocks else None
    encoder = encoder_class(config)
    if encoder is None:
        model = build_model(config, computed_in, attention, experts, where=where, file_bytes=checkpoint.total_bytes)
        try:
            tensors = resolve_tensors(model, checkpoint, stored)
        except MissingTensorError as error:
            encoder = headless_class(config, model, error.names, checkpoint)
            if encoder is None:
                raise
    if encoder is not None:
        model = _build(encoder, config, computed_in, (None, experts), where=where, file_bytes=checkpoint.total_bytes)
        tensors = resolve_tensors(model, checkpoint, stored)
    _compute_missing(model, tensors)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict(keep_vars=True).items()}
    generates = encoder is None
    names_base = generates and named_base(config) is not None
    generation = GenerationConfig()
    if generates:
        generation = _generation(checkpoint, model)
    return Skeleton(
        model=model,
        tensors=tensors.all,
        dtype=computed_in,
        dtypes=dtypes,
        generates=generates,
        names_base=names_base,
        token_inputs=_token_inputs(model),
        generation=generation,
        context_length=context_length_of(model),
        encoded=tensors.encoded,
    )


def _generation(checkpoint: Checkpoint, model: PreTrainedModel) -> GenerationConfig:
    text = model.config.get_text_config()
    start = getattr(text, "decoder_start_token_id", None)
    return read_generation_config(
        checkpoint,
        eos_token_id=getattr(text, "eos_token_id", None),
        decoder_start_token_id=getattr(text, "bos_token_id", None) if start is None else start,
        vocab_size=num_choices(model),
    )


def num_choices(model: PreTrainedModel) -> int:
    """The tokens that a model can generate. An encoder-decoder may have another vocabulary for its input."""
    if model.config.is_encoder_decoder:
        head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        return int(head.get_parameter("weight").shape[0])
    embedding = token_embedding(model)
    assert embedding is not None  # `build_model` has checked it
    return embedding.num_embeddings


def with_context_length(skeleton: Skeleton, context_length: int | None) -> Skeleton:
    """The same model for shorter sequences; None for the model's own context length.

    Raises:
        ConfigError: The model's own context is shorter.
    """
    own = skeleton.context_length
    if context_length is None:
        return skeleton
    if own is not None and context_length > own:
        raise ConfigError(
            f"context_length is {context_length}; the context of this {type(skeleton.model).__name__} is {own}, by its "
            "config.json and the RoPE scaling in that. Give at most as much, or None"
        )
    return replace(skeleton, context_length=context_length)


def build_model(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attention: str | None,
    experts: str | None = None,
    *,
    where: str,
    file_bytes: int | None = None,
) -> PreTrainedModel:
    """Makes the causal language model of `config` on the meta device, in eval mode, with real non-persistent buffers.

    Args:
        attention: The attention implementation, for models that support the choice; other models take "eager". None,
            and encoder-decoders, take transformers' default.
        experts: The implementation of experts; None for transformers' default.
        where: The beginning of error messages.
        file_bytes: Of the checkpoint's tensors; None for a small copy of a model that was built before.

    Raises:
        UnsupportedModelError: `config` is not of a causal language model, or transformers cannot build it, or it asks
            for tables that are far larger than the checkpoint.
    """
    model_class = causal_class(config)
    if model_class is None:
        architectures = ", ".join(config.architectures or ()) or config.model_type
        raise UnsupportedModelError(f"{where}: {architectures} is no model that transformers knows by this name")
    implementation = attention if attention is None or supports_packed_attention(model_class) else "eager"
    if model_class is encoder_decoder_class(config):
        implementation = None
    model = _build(model_class, config, dtype, (implementation, experts), where=where, file_bytes=file_bytes)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    if None in embeddings:
        raise UnsupportedModelError(f"{where}: {model_class.__name__} has no input embedding or no output head")
    return model


def _build(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    implementations: tuple[str | None, str | None],
    *,
    where: str,
    file_bytes: int | None,
) -> PreTrainedModel:
    """`implementations`: of attention and experts; None for transformers' default."""
    try:
        with torch.device("meta"):
            model = from_config(model_class, config, dtype, *implementations)
    except IncompatibleVersionError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"{where}: transformers cannot build {model_class.__name__} from config.json: {reason_of(error)}"
        ) from error
    model.eval()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _cast_kept_in_float32(model, dtype)
    persistent = set(model.state_dict())
    computed = {name: buffer for name, buffer in model.named_buffers() if name not in persistent}
    if file_bytes is not None:
        check_tables(computed, file_bytes, where)
    for name, buffer in computed.items():
        place_of(model, name).put(torch.empty_like(buffer, device="cpu"))
    for tensor in model.state_dict(keep_vars=True).values():
        mark_initialized(tensor)  # its values come from the checkpoint, and initialization on the meta device is slow
    model.initialize_weights()  # type: ignore[no-untyped-call]
    return model


def _compute_missing(model: PreTrainedModel, tensors: ResolvedTensors) -> None:
    """Gives parameters that a checkpoint may lack the values that transformers computes, such as positions."""
    missing = [name for name in model.state_dict() if name not in tensors.plain and name not in tensors.encoded]
    for name in missing:
        place = place_of(model, name)
        place.put(torch.empty_like(place.get(), device="cpu"))
    if missing:
        initialize_again({model.get_submodule(name.rpartition(".")[0]) for name in missing})
        model.initialize_weights()  # type: ignore[no-untyped-call]


def token_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """The model's input embedding; None where its input is not token ids."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # transformers raises this for models without one
        return None
    return embedding if isinstance(embedding, nn.Embedding) else None


def _token_inputs(model: PreTrainedModel) -> tuple[str, ...]:
    """Models such as BERT have a table of their own for `token_type_ids`; models such as GPT-2 embed them as tokens."""
    if model.config.is_encoder_decoder:
        return ("input_ids", "decoder_input_ids")
    own_table = any(name.endswith("token_type_embeddings") for name, _ in model.named_modules())
    return ("input_ids",) if own_table else ("input_ids", "token_type_ids")


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The modules in module lists: the transformer layers, and other repeated modules."""
    return [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]


def _resolve_dtype(checkpoint: Checkpoint, config: PreTrainedConfig) -> torch.dtype:
    """As transformers does: the dtype in config.json, or else that of the first floating-point tensor."""
    if checkpoint.gguf is not None:
        dtypes = {None if spec.packed else spec.dtype for spec in checkpoint.tensors.values()}
        return gguf_dtype(checkpoint.gguf, dtypes)
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype is None:
        dtype = next((spec.dtype for spec in checkpoint.tensors.values() if spec.dtype.is_floating_point), None)
    if dtype not in _DTYPES.values():
        raise UnsupportedModelError(
            f"{checkpoint.path} is in {dtype}; fp32, bf16 and fp16 checkpoints are supported", path=checkpoint.path
        )
    assert isinstance(dtype, torch.dtype)
    return dtype


def _cast_kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Casts the parameters that transformers keeps in float32 whatever the model's dtype is."""
    kept = names_kept_in_float32(model, dtype)
    if kept:
        pattern = re.compile("|".join(re.escape(name) for name in kept))
        for name, parameter in model.named_parameters():
            if pattern.search(name):
                place_of(model, name).put(parameter.float())
