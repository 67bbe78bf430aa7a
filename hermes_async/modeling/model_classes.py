"""Which of transformers' classes a checkpoint is opened with."""

from __future__ import annotations

from collections.abc import Iterable

import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
)

from hermes_async.modeling.transformers_api import model_class_of
from hermes_async.storage.checkpoint import Checkpoint
from hermes_async.storage.file_kinds import is_file


def encoder_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that `config` names, if it is no causal language model: an encoder, or a model with another head.

    Models such as EmbeddingGemma, whose tokens attend to later tokens, are encoders. A decoder without a head
    (`LlamaModel`) counts as the causal language model that it is part of; `build_skeleton` finds out whether the
    checkpoint has a head for it.
    """
    is_decoder = model_class_of(AutoModelForCausalLM, config) and not model_class_of(AutoModelForMaskedLM, config)
    if not config.architectures:
        return None if is_decoder else model_class_of(AutoModel, config)
    model_class = getattr(transformers, config.architectures[0], None)
    if not isinstance(model_class, type) or not issubclass(model_class, PreTrainedModel):
        return None
    if model_class is causal_class(config):
        return None
    if config.is_encoder_decoder or getattr(config, "use_bidirectional_attention", None) is True:
        return model_class
    return None if is_decoder and model_class is model_class_of(AutoModel, config) else model_class


def causal_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that generates text one token after another; None if there is none for `config`.

    It is that of `AutoModelForCausalLM`, unless `config` names an encoder-decoder, or the class that also takes images.
    Some checkpoints with images have both (Qwen3.5).
    """
    encoder_decoder = encoder_decoder_class(config)
    if encoder_decoder is not None:
        return encoder_decoder
    with_images = model_class_of(AutoModelForImageTextToText, config)
    if with_images is not None and not config.is_encoder_decoder:
        named = with_images.__name__ in (config.architectures or ())
        if named and with_images.can_generate():
            return with_images
    return model_class_of(AutoModelForCausalLM, config)


def encoder_decoder_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The encoder-decoder with a head, if `config` names one."""
    if not config.is_encoder_decoder:
        return None
    classes = [model_class_of(AutoModelForSeq2SeqLM, config)]
    if config.model_type == "whisper":
        classes.append(model_class_of(AutoModelForSpeechSeq2Seq, config))
    named = (one for one in classes if one is not None and one.__name__ in (config.architectures or ()))
    return next((one for one in named if one.can_generate()), None)


def headless_class(
    config: PreTrainedConfig, model: PreTrainedModel, missing: Iterable[str], checkpoint: Checkpoint
) -> type[PreTrainedModel] | None:
    """The decoder without a head, if only the head of `model` is missing in the checkpoint.

    Embedding models are such decoders; their configuration still names the causal language model.
    """
    prefix = f"{model.base_model_prefix}."
    if any(name.startswith(prefix) for name in missing):
        return None
    bare = not any(name.startswith(prefix) for name in checkpoint.tensors)
    if bare and model_class_of(AutoModelForMaskedLM, config) is None:
        return model_class_of(AutoModel, config)
    embeds = is_file((checkpoint.root or checkpoint.path) / "modules.json")
    return model_class_of(AutoModel, config) if embeds else named_base(config)


def named_base(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class without a head, if `config` names that class."""
    base = model_class_of(AutoModel, config)
    return base if base is not None and base.__name__ in (config.architectures or ()) else None
