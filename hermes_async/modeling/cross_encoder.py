"""What sentence-transformers' files say about a cross-encoder: its activation, and the length of its pairs.

Source: `CrossEncoder` of sentence-transformers, which reads `config_sentence_transformers.json`,
`sentence_bert_config.json` and two entries of `config.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from hermes_async.errors import RequestError
from hermes_async.modeling.pooling import ACTIVATIONS
from hermes_async.storage.checkpoint import read_config
from hermes_async.storage.file_kinds import is_file

_HARMLESS = {"transformer_task": "sequence-classification", "module_output_name": "scores", "do_lower_case": False}
_MODALITIES = {"text": {"method": "forward", "method_output_name": "logits"}}


@dataclass(frozen=True, slots=True)
class CrossEncoderSettings:
    """How pairs of texts are scored.

    Attributes:
        activation: Turns logits into scores.
        max_tokens: Longer pairs are truncated to so many tokens. None: the tokenizer and the model set the limit.
    """

    activation: nn.Module
    max_tokens: int | None


def cross_encoder_settings(root: Path, transformer: Path, config: PreTrainedConfig) -> CrossEncoderSettings:
    """Reads the settings of a checkpoint; for a worker thread.

    Args:
        root: Where `modules.json` is, if there is one.
        transformer: Where the model's `config.json` is.
        config: The model's.

    Raises:
        RequestError: The model is not a cross-encoder with one label, or its files ask for what is not supported.
        CheckpointError: A file cannot be read.
    """
    name = (config.architectures or ["the model"])[0]
    if not name.endswith("ForSequenceClassification") or config.num_labels != 1:
        raise RequestError(f"{name} does not rank documents; a cross-encoder with one label does")
    _check_modules(root / "modules.json")
    general = _read(root / "config_sentence_transformers.json")
    if general.get("default_prompt_name") is not None:
        raise RequestError("the cross-encoder puts a prompt before its pairs, which is not supported")
    if general.get("keep_in_fp32_modules"):
        raise RequestError("the cross-encoder computes some modules in fp32, which is not supported")
    sentence = _read(transformer / "sentence_bert_config.json")
    max_tokens = sentence.pop("max_seq_length", None)
    for key in ("processor_kwargs", "tokenizer_args"):
        max_tokens = (sentence.pop(key, None) or {}).get("model_max_length", max_tokens)
    if sentence.pop("modality_config", _MODALITIES) != _MODALITIES:
        raise RequestError("the cross-encoder's modality_config is not supported")
    for key, value in sentence.items():
        if value and value != _HARMLESS.get(key):
            raise RequestError(f"the cross-encoder's setting {key} is not supported")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise RequestError("the cross-encoder's max_seq_length is not a whole number above 0")
    return CrossEncoderSettings(_activation(general, config), max_tokens)


def _check_modules(file: Path) -> None:
    modules = read_config(file, list) if is_file(file) else []
    kinds = [str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else "?" for module in modules]
    if kinds not in ([], ["Transformer"]):
        raise RequestError("the cross-encoder has modules behind its Transformer, which are not supported")


def _read(file: Path) -> dict[str, Any]:
    return dict(read_config(file, dict)) if is_file(file) else {}


def _activation(general: Mapping[str, Any], config: PreTrainedConfig) -> nn.Module:
    named = getattr(config, "sentence_transformers", None)
    asked = general.get("activation_fn")
    if asked is None and isinstance(named, Mapping) and "activation_fn" in named:
        asked = named["activation_fn"]
    elif asked is None:
        asked = getattr(config, "sbert_ce_default_activation_function", None)
    if asked is None or not str(asked).startswith("torch."):  # sentence-transformers does not load other code
        return nn.Sigmoid()
    kind = str(asked).rpartition(".")[2]
    if kind not in ACTIVATIONS:
        raise RequestError(f"the cross-encoder's activation {kind!r:.80} is not supported")
    return ACTIVATIONS[kind]()
