"""The real transformers model without its weights, and which tensor of the checkpoint each parameter is."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from hermes_async.errors import CheckpointError, MissingTensorError, UnsupportedModelError
from hermes_async.storage.checkpoint import Checkpoint, TensorSpec


@dataclass(frozen=True, slots=True)
class Skeleton:
    """A model on the meta device; only its non-persistent buffers (rotary frequencies and such) are real.

    Attributes:
        tensors: The checkpoint's tensor for each parameter and persistent buffer, tied names included.
        dtype: What the model computes in.
        dtypes: Those of single parameters and persistent buffers; some are kept in float32 whatever `dtype` is.
        generates: It is a causal language model, which the engine generates with; others only run forward.
        eos_token_ids: The model's end-of-sequence tokens.
        context_length: Most tokens of a sequence; None where the model names no limit.
    """

    model: PreTrainedModel
    tensors: dict[str, TensorSpec]
    dtype: torch.dtype
    dtypes: dict[str, torch.dtype]
    generates: bool
    eos_token_ids: frozenset[int]
    context_length: int | None

    @property
    def embedding(self) -> nn.Embedding | None:
        """The input embedding of token ids; None where the input is something else."""
        return token_embedding(self.model)

    @property
    def base_model(self) -> PreTrainedModel:
        """The model without its head."""
        base = self.model.base_model
        assert isinstance(base, PreTrainedModel)
        return base

    @property
    def vocab_size(self) -> int:
        """Of a model with an input embedding."""
        embedding = self.embedding
        assert embedding is not None
        return embedding.num_embeddings

    @property
    def embedding_name(self) -> str:
        """The parameter that is the input embedding; there must be one."""
        embedding = self.embedding
        return next(f"{name}.weight" for name, module in self.model.named_modules() if module is embedding)

    def __repr__(self) -> str:
        return f"<Skeleton {type(self.model).__name__} {self.dtype}: {len(self.tensors)} tensors>"


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Reads the model's configuration; code from the checkpoint is never run.

    Raises:
        UnsupportedModelError: transformers does not know the architecture, or the checkpoint is quantized.
    """
    path = checkpoint.path
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path / 'config.json'} names no model_type", path=path)
    if checkpoint.config.get("quantization_config"):
        method = checkpoint.config["quantization_config"]
        method = method.get("quant_method", "?") if isinstance(method, dict) else "?"
        raise UnsupportedModelError(
            f"{path} is quantized ({method}); fp32, bf16 and fp16 checkpoints are supported", path=path
        )
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        custom = "auto_map" in checkpoint.config
        needs_code = " and would need code from the checkpoint, which is never run" if custom else ""
        raise UnsupportedModelError(
            f"{path}: transformers cannot read the configuration of model_type {model_type!r}{needs_code}: "
            f"{_first_line(error)}",
            path=path,
        ) from error
    return config


def build_skeleton(checkpoint: Checkpoint, config: PreTrainedConfig, attention: str) -> Skeleton:
    """Builds the model that `config` names on the meta device and finds its tensors.

    Args:
        attention: The name of the attention function for causal language models that let it be chosen.

    Raises:
        UnsupportedModelError: A model that transformers does not know, or weights that would have to be converted.
        MissingTensorError: A parameter has no tensor.
        CheckpointError: A tensor has another shape than its parameter.
    """
    dtype = _resolve_dtype(checkpoint, config)
    where = str(checkpoint.path)
    encoder = encoder_class(config)
    if encoder is None:
        model = build_model(config, dtype, attention, where=where)
        try:
            tensors = resolve_tensors(model, checkpoint)
        except MissingTensorError as error:
            encoder = _headless_class(config, model, error.names)
            if encoder is None:
                raise
    if encoder is not None:
        model = _build(encoder, config, dtype, None, where)
        tensors = resolve_tensors(model, checkpoint)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict(keep_vars=True).items()}
    eos_token_ids = frozenset[int]() if encoder else _eos_token_ids(checkpoint, config)
    return Skeleton(model, tensors, dtype, dtypes, encoder is None, eos_token_ids, _context_length(model))


def encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that `config` names, if that is no causal language model: an encoder, or a model with another head.

    A decoder without a head (`LlamaModel`) counts as the causal language model that it is part of. Whether the
    checkpoint has a head for it, `build_skeleton` finds out.
    """
    name = (config.architectures or [""])[0]
    model_class = getattr(transformers, name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        return None
    if model_class is _class_for(AutoModelForCausalLM, config):
        return None
    if config.is_encoder_decoder:
        return model_class
    is_decoder = _class_for(AutoModelForCausalLM, config) and not _class_for(AutoModelForMaskedLM, config)
    return None if is_decoder and model_class is _class_for(AutoModel, config) else model_class


def _headless_class(
    config: PreTrainedConfig, model: PreTrainedModel, missing: Iterable[str]
) -> type[PreTrainedModel] | None:
    """The decoder that `config` names, where it is `model` but for the head, and only the head is missing."""
    base = _class_for(AutoModel, config)
    if base is None or base.__name__ not in (config.architectures or ()):
        return None
    return None if any(name.startswith(f"{model.base_model_prefix}.") for name in missing) else base


def _class_for(auto_class: Any, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    try:
        found: type[PreTrainedModel] = auto_class._model_mapping[type(config)]
    except KeyError:
        return None
    return found


def build_model(config: PreTrainedConfig, dtype: torch.dtype, attention: str | None, *, where: str) -> PreTrainedModel:
    """Makes the causal language model of `config` on the meta device, in eval mode, with real non-persistent buffers.

    Args:
        attention: The attention function for models that let it be chosen; None, and all others, use transformers'
            plain one.
        where: Begins the error messages.

    Raises:
        UnsupportedModelError: `config` is no causal language model's, or transformers cannot build it.
    """
    model_class = _class_for(AutoModelForCausalLM, config)
    if model_class is None:
        architectures = ", ".join(config.architectures or ()) or config.model_type
        raise UnsupportedModelError(f"{where}: {architectures} is no model that transformers knows by this name")
    implementation = attention if attention and supports_packed_attention(model_class) else "eager"
    model = _build(model_class, config, dtype, implementation, where)
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[no-untyped-call]
    if None in embeddings:
        raise UnsupportedModelError(f"{where}: {model_class.__name__} has no input embedding or no output head")
    return model


def _build(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, attention: str | None, where: str
) -> PreTrainedModel:
    """`attention`: the implementation; None for transformers' choice."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = model_class._from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation=attention
            )
    except Exception as error:
        raise UnsupportedModelError(
            f"{where}: transformers cannot build {model_class.__name__} from config.json: {_first_line(error)}"
        ) from error
    model.eval()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    _cast_kept_in_float32(model, dtype)
    persistent = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name not in persistent:
            module, leaf = _owner(model, name)
            module.register_buffer(leaf, torch.empty_like(buffer, device="cpu"), persistent=False)
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # comes from the checkpoint, as `from_pretrained` marks it; it is slow on meta
    model.initialize_weights()  # type: ignore[no-untyped-call]
    return model


def resolve_tensors(model: PreTrainedModel, checkpoint: Checkpoint) -> dict[str, TensorSpec]:
    """Finds the tensor of every parameter and persistent buffer, by transformers' own renamings.

    Raises:
        UnsupportedModelError: A tensor would have to be converted, not only renamed.
        MissingTensorError: A parameter has no tensor and is not tied to one that has.
        CheckpointError: A tensor has another shape than its parameter.
    """
    expected = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    found: dict[str, TensorSpec] = {}
    for name in sorted(checkpoint.tensors, key=dot_natural_key):
        renamed, converted = rename_source_key(name, renamings, converters, prefix, expected)
        if renamed not in expected and name in expected:
            renamed, converted = rename_source_key(name, [], [], prefix, expected)
        if renamed not in expected:
            continue
        if converted is None:
            found[renamed] = checkpoint.tensors[name]
            continue
        pieces = _pieces(renamed, checkpoint.tensors[name], converters, converted)
        if not pieces:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {name!r} would have to be converted to {renamed!r}; only tensors that are "
                "renamed, or cut along their first dimension, can be used in place",
                path=checkpoint.path,
            )
        found.update(pieces)
    for name, spec in found.items():
        shape = tuple(expected[name].shape)
        if spec.shape != shape:
            raise CheckpointError(
                f"{spec.file}: tensor {spec.name!r} has shape {list(spec.shape)}, but {type(model).__name__} with this "
                f"config.json needs {list(shape)} for {name!r}",
                path=spec.file,
            )
    for first, second in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        for target, source in ((first, second), (second, first)):
            if target not in found and source in found:
                found[target] = found[source]
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    missing = tuple(
        name for name in expected if name not in found and not any(pattern.search(name) for pattern in ignored)
    )
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise MissingTensorError(
            f"{checkpoint.path} lacks {len(missing)} of the {len(expected)} tensors of {type(model).__name__}: {shown}",
            path=checkpoint.path,
            names=missing,
        )
    return found


def _pieces(renamed: str, spec: TensorSpec, converters: list[WeightConverter], pattern: str) -> dict[str, TensorSpec]:
    """The parameters that lie one after another in a tensor, such as query, key and value; none where it is otherwise.

    Args:
        renamed: The first of them.
        pattern: The source pattern of the converter that the tensor is for.
    """
    converter = next(one for one in converters if pattern in one.source_patterns)
    operation, *others = converter.operations
    targets = converter.target_patterns
    cuts = type(operation) is Chunk and operation.dim == 0 and not others and len(converter.source_patterns) == 1
    plainly = len(targets) > 1 and targets[0] in renamed and not any("\\" in target for target in targets)
    evenly = bool(spec.shape) and spec.shape[0] % len(targets) == 0
    if not (cuts and plainly and evenly):
        return {}
    before, _, behind = renamed.partition(targets[0])
    rows = spec.shape[0] // len(targets)
    return {f"{before}{name}{behind}": spec.rows(rows * idx, rows * (idx + 1)) for idx, name in enumerate(targets)}


def token_embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """The model's input embedding, where its input is token ids."""
    try:
        embedding = model.get_input_embeddings()
    except NotImplementedError:  # so transformers says that a model has none
        return None
    return embedding if isinstance(embedding, nn.Embedding) else None


def get_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """The parameter or buffer `name` of `model`."""
    module, leaf = _owner(model, name)
    tensor = getattr(module, leaf)
    assert isinstance(tensor, torch.Tensor)
    return tensor


def set_tensor(model: nn.Module, name: str, value: torch.Tensor) -> None:
    """Makes `value` the parameter or buffer `name` of `model`, without a copy."""
    _put(*_owner(model, name), value)


@contextmanager
def replaced_tensors(model: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Within the block these are the parameters and buffers of `model` with these names; then its own are again."""
    modules = dict(model.named_modules(remove_duplicate=False))  # far quicker than to look each up by its path
    places = [(modules[path], leaf) for path, _, leaf in (name.rpartition(".") for name in values)]
    own = [getattr(*place) for place in places]
    try:
        for place, value in zip(places, values.values(), strict=True):
            _put(*place, value)
        yield
    finally:
        for place, tensor in zip(places, own, strict=True):
            _put(*place, tensor)


def weight_bytes(module_names: Iterable[str], tensors: Mapping[str, TensorSpec]) -> int:
    """Bytes of the tensors of these parameters, shared ones counted once."""
    return sum({(tensors[name].file, tensors[name].offset): tensors[name].nbytes for name in module_names}.values())


def supports_packed_attention(model_class: type[PreTrainedModel]) -> bool:
    """Whether the architecture lets its attention function be chosen."""
    return bool(model_class._supports_attention_backend)


def plain_attention(model: PreTrainedModel) -> str:
    """The attention that transformers itself takes for this architecture where nothing else is asked for."""
    return "sdpa" if model._supports_sdpa else "eager"


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The modules that stand in lists: transformer layers, and whatever else there is several of."""
    return [layer for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module]


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _put(module: nn.Module, leaf: str, value: torch.Tensor) -> None:
    if leaf in module._parameters:
        value = nn.Parameter(value, requires_grad=False)
    setattr(module, leaf, value)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _resolve_dtype(checkpoint: Checkpoint, config: PreTrainedConfig) -> torch.dtype:
    """As transformers does: what config.json says, else the first floating tensor's."""
    dtype = getattr(config, "dtype", None)
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, None)
    if dtype is None:
        dtype = next((spec.dtype for spec in checkpoint.tensors.values() if spec.dtype.is_floating_point), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UnsupportedModelError(
            f"{checkpoint.path} is in {dtype}; fp32, bf16 and fp16 checkpoints are supported", path=checkpoint.path
        )
    assert isinstance(dtype, torch.dtype)
    return dtype


def _cast_kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Parameters that transformers keeps in float32 whatever the model's dtype."""
    kept = model._get_dtype_plan(dtype)
    if kept:
        pattern = re.compile("|".join(re.escape(name) for name in kept))
        for name, parameter in model.named_parameters():
            if pattern.search(name):
                set_tensor(model, name, parameter.float())


def _eos_token_ids(checkpoint: Checkpoint, config: PreTrainedConfig) -> frozenset[int]:
    """From generation_config.json where there is one, else from config.json."""
    eos: Any = None
    path = checkpoint.path / "generation_config.json"
    if path.is_file():
        try:
            eos = GenerationConfig.from_pretrained(checkpoint.path, local_files_only=True).eos_token_id
        except (OSError, ValueError, TypeError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{path} cannot be read: {_first_line(error)}", path=path) from error
    if eos is None:
        eos = getattr(config.get_text_config(), "eos_token_id", None)
    if eos is None:
        return frozenset()
    return frozenset(eos) if isinstance(eos, (list, tuple)) else frozenset({int(eos)})


def _context_length(model: PreTrainedModel) -> int | None:
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        # Past this, transformers changes the frequencies of all positions at once, of neighbours in a packed row too.
        names = ("original_max_position_embeddings", "max_position_embeddings")
        limits = [rope.get(names[0]), *(getattr(text, name, None) for name in names)]
        return min((limit for limit in limits if isinstance(limit, int)), default=None)
    for name in ("max_position_embeddings", "seq_length", "max_seq_len", "n_positions"):
        length = getattr(text, name, None)
        if isinstance(length, int) and length > 0:
            return length - _first_position(model)
    return None


def _first_position(model: PreTrainedModel) -> int:
    """Of a sequence's tokens: models that descend from RoBERTa begin to count behind their padding token."""
    for module in model.modules():
        positions = getattr(module, "position_embeddings", None)
        if isinstance(positions, nn.Embedding) and positions.padding_idx is not None:
            return positions.padding_idx + 1
    return 0
