"""The configuration of a model, as transformers reads it."""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig

from hermes_async.errors import CheckpointError, UnsupportedModelError
from hermes_async.modeling.config_limits import check_config
from hermes_async.modeling.gguf_api import gguf_config, gguf_settings
from hermes_async.modeling.transformers_api import model_class_of
from hermes_async.storage.checkpoint import Checkpoint


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """Reads the model's configuration. Code from the checkpoint is never run.

    Raises:
        UnsupportedModelError: transformers does not know the architecture.
        CheckpointError: A number is far too large for the checkpoint's tensors.
    """
    tensors = checkpoint.tensors.values()
    if checkpoint.gguf is not None:
        check_config(checkpoint.path, gguf_settings(checkpoint.gguf), tensors)
        return _named(gguf_config(checkpoint.gguf))
    path = checkpoint.path
    check_config(path / "config.json", checkpoint.config, tensors)
    model_type = checkpoint.config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError(f"{path / 'config.json'} names no model_type", path=path)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        custom = "auto_map" in checkpoint.config
        needs_code = " and would need code from the checkpoint, which is never run" if custom else ""
        raise UnsupportedModelError(
            f"{path / 'config.json'}: transformers cannot read the configuration of model_type {model_type!r}"
            f"{needs_code}: {_first_lines(error)}",
            path=path,
        ) from error
    return config


def _named(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with the class that has a head, as a `config.json` would name it. GGUF names none."""
    if not config.architectures:
        auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        with_head = model_class_of(auto_class, config)
        config.architectures = None if with_head is None else [with_head.__name__]
    return config


def _first_lines(error: BaseException) -> str:
    """The first two lines: the first says which field is wrong, and the second why."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2])[:1000] or type(error).__name__
