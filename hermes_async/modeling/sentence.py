"""What sentence-transformers' files say about texts: their length in tokens, their case and their prompt.

Source: `sentence_bert_config.json` and `config_sentence_transformers.json`, as sentence-transformers reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hermes_async.errors import CheckpointError, RequestError
from hermes_async.storage.checkpoint import read_config
from hermes_async.storage.file_kinds import is_file

_TRANSFORMER_FILES = (
    *("sentence_bert_config.json", "sentence_roberta_config.json", "sentence_distilbert_config.json"),
    *("sentence_camembert_config.json", "sentence_albert_config.json", "sentence_xlm-roberta_config.json"),
    "sentence_xlnet_config.json",
)
# Arguments of transformers that do not change the vectors, or are read elsewhere.
_HARMLESS = frozenset(
    {
        *("model_max_length", "padding_side", "use_fast", "trust_remote_code", "add_pooling_layer", "dtype"),
        *("torch_dtype", "attn_implementation", "use_safetensors", "low_cpu_mem_usage", "use_cache"),
    }
)
_ARGUMENTS = ("processor_kwargs", "tokenizer_args", "model_kwargs", "model_args", "config_kwargs", "config_args")


@dataclass(frozen=True, slots=True)
class SentenceSettings:
    """How texts become tokens.

    Attributes:
        named: Whether the checkpoint has sentence-transformers' files.
        max_tokens: Longer texts are truncated to so many tokens. None: the tokenizer and the model set the limit.
        lower_case: Whether texts are put into lower case first.
        prompts: Texts that are put before a text, by name.
        default_prompt_name: The prompt of texts for which none is named.
        truncate_dim: Vectors are truncated to so many numbers.
    """

    named: bool = False
    max_tokens: int | None = None
    lower_case: bool = False
    prompts: Mapping[str, str] = field(default_factory=lambda: {"query": "", "document": ""})
    default_prompt_name: str | None = None
    truncate_dim: int | None = None

    def prompt(self, name: str | None) -> str:
        """The prompt with this name, or the default prompt, or "" where there is none.

        Raises:
            RequestError: No prompt has this name.
        """
        name = self.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in self.prompts:
            raise RequestError(f"prompt_name {name!r} is none of the checkpoint's prompts: {', '.join(self.prompts)}")
        return self.prompts[name]


def sentence_settings(root: Path, transformer: Path) -> SentenceSettings:
    """Reads the settings of a checkpoint.

    Args:
        root: Where `modules.json` is.
        transformer: Where the model's `config.json` is.

    Raises:
        CheckpointError: A file cannot be read, or asks for something that is not supported.
    """
    if not is_file(root / "modules.json"):
        return SentenceSettings()
    file = next((transformer / name for name in _TRANSFORMER_FILES if is_file(transformer / name)), None)
    config = {} if file is None else read_config(file, dict)
    if file is not None:
        _check_transformer(file, config)
    max_tokens = config.get("max_seq_length")
    for key in ("tokenizer_args", "processor_kwargs"):
        max_tokens = (config.get(key) or {}).get("model_max_length", max_tokens)
    file = root / "config_sentence_transformers.json"
    general = read_config(file, dict) if is_file(file) else {}
    if general.get("model_type", "SentenceTransformer") != "SentenceTransformer":
        raise CheckpointError(
            f"{file} describes a {general['model_type']}; only a SentenceTransformer makes sentence vectors", path=file
        )
    prompts = general.get("prompts") or {}
    if not isinstance(prompts, dict) or not all(isinstance(prompt, (str, type(None))) for prompt in prompts.values()):
        raise CheckpointError(f"{file}: prompts must be an object of texts, not {prompts!r:.200}", path=file)
    prompts = {"query": "", "document": ""} | {name: prompt or "" for name, prompt in prompts.items()}
    default = general.get("default_prompt_name")
    if default is not None and default not in prompts:
        raise CheckpointError(f"{file}: default_prompt_name {default!r} is none of {', '.join(prompts)}", path=file)
    for name, value in (("max_seq_length", max_tokens), ("truncate_dim", general.get("truncate_dim"))):
        if value is not None and (type(value) is not int or value < 1):
            raise CheckpointError(f"{root}: {name} must be a whole number above 0, not {value!r}", path=root)
    return SentenceSettings(
        named=True,
        max_tokens=max_tokens,
        lower_case=bool(config.get("do_lower_case")),
        prompts=prompts,
        default_prompt_name=default,
        truncate_dim=general.get("truncate_dim"),
    )


def _check_transformer(file: Path, config: Mapping[str, Any]) -> None:
    """Refuses settings that would change the vectors and are not supported."""
    refused = []
    if config.get("transformer_task", "feature-extraction") != "feature-extraction":
        refused.append("transformer_task")
    if config.get("module_output_name", "token_embeddings") != "token_embeddings":
        refused.append("module_output_name")
    modalities = config.get("modality_config")
    if modalities is not None and (
        "message" in modalities
        or modalities.get("text") != {"method": "forward", "method_output_name": "last_hidden_state"}
    ):
        refused.append("modality_config")
    if config.get("processing_kwargs"):
        refused.append("processing_kwargs")
    for key in _ARGUMENTS:
        arguments = config.get(key) or {}
        if not isinstance(arguments, dict) or set(arguments) - _HARMLESS:
            refused.append(key)
    if refused:
        raise CheckpointError(f"{file} has {refused[0]}={config[refused[0]]!r:.200}, which is not supported", path=file)
