"""Every use of transformers' code for GGUF files, which has no public names for what the engine needs.

transformers reads some architectures with a reader of its own and a table of conversions (`integrations.gguf`), and
all others with the `gguf` package and a class for each architecture that undoes what llama.cpp's converter did to a
tensor (`modeling_gguf_pytorch_utils`). All functions were tested on the versions in `TESTED_VERSIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, TOKENIZER_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from hermes_async.errors import CorruptShardError, UnsupportedModelError
from hermes_async.foreign_errors import is_foreign, reason_of
from hermes_async.modeling.transformers_api import needs
from hermes_async.storage.gguf import GgufHeader
from hermes_async.storage.own_file import scratch_folder

_NEW = "transformers.integrations.gguf"
_OLD = "transformers.modeling_gguf_pytorch_utils"
_TOKENS = "tokenizer.ggml.tokens"
_MOST_TOKENS = 2**18
"""The package `gguf` takes about a KiB for a text of a list."""
_FILE = "model.gguf"


def has_conversions(header: GgufHeader) -> bool:
    """Whether transformers has a table of conversions for the architecture."""
    with needs("reader of GGUF files"):
        return bool(import_module(_NEW).is_gguf_arch_supported(header.architecture))


@contextmanager
def _refused(header: GgufHeader, what: str) -> Iterator[None]:
    """Within the block, an error of transformers means that it does not know such a model."""
    try:
        yield
    except BaseException as error:
        if not is_foreign(error):
            raise
        path = header.files[0]
        raise UnsupportedModelError(
            f"{path}: transformers cannot read {what} of GGUF's architecture {header.architecture!r}: "
            f"{reason_of(error)}. Use the model's safetensors",
            path=path,
        ) from error


def _check_package(header: GgufHeader) -> None:
    with needs("check for the package gguf"):
        available = import_module("transformers.utils").is_gguf_available
    if not available():
        path = header.files[0]
        raise UnsupportedModelError(
            f"{path}: GGUF's architecture {header.architecture!r} needs the package gguf; install it with: "
            "pip install 'hermes-async[gguf]'",
            path=path,
        )


@lru_cache(maxsize=1)  # the tokenizer, the configuration and the names of a model each need them
def gguf_settings(header: GgufHeader) -> Mapping[str, Any]:
    """The fields of the model's configuration, as transformers takes them from the metadata.

    transformers reads all lists of a vocabulary for this, which can take ten seconds. So it gets an outline of the file
    without them.

    Raises:
        UnsupportedModelError: transformers does not know the architecture, or the package `gguf` is missing.
        CorruptShardError: The file claims more layers than it has tensors.
    """
    num_layers = header.metadata.get(f"{header.architecture}.block_count")
    if isinstance(num_layers, int) and num_layers > len(header.tensor_names):
        path = header.files[0]
        raise CorruptShardError(
            f"{path}: claims {num_layers} layers ({header.architecture}.block_count), and has "
            f"{len(header.tensor_names)} tensors",
            path=path,
        )
    if has_conversions(header):
        with needs("reader of GGUF files"):
            read = import_module(_NEW).get_gguf_config
        with _refused(header, "the configuration"):
            return dict(read(dict(header.metadata), header.tensor_names))
    _check_package(header)
    with needs("reader of GGUF files"):
        load = import_module(_OLD).load_gguf_checkpoint
        fields = import_module("transformers.integrations").GGUF_CONFIG_MAPPING
    num_tokens, key = header.metadata.get(_TOKENS), f"{header.architecture}.vocab_size"
    known = [names for model_type, names in fields.items() if _same(model_type, header.architecture)]
    numbers = {}
    if isinstance(num_tokens, int) and key not in header.metadata and known and "vocab_size" in known[0]:
        numbers[key] = num_tokens
    keep: tuple[str, ...] = ()
    if isinstance(num_tokens, int) and num_tokens <= _MOST_TOKENS and not numbers and key not in header.metadata:
        keep = (_TOKENS,)
    with scratch_folder() as folder, _refused(header, "the configuration"):
        outline = Path(folder, _FILE)
        header.write_outline(outline, numbers, keep)
        return dict(load(str(outline), return_tensors=False)["config"])


def _same(model_type: str, architecture: str) -> bool:
    """Whether both are the same architecture: transformers writes `qwen2_moe`, and GGUF `qwen2moe`."""
    first, second = (name.replace("_", "").replace("-", "") for name in (model_type, architecture))
    return first == second


def gguf_config(header: GgufHeader) -> PreTrainedConfig:
    """The model's configuration, as `AutoConfig.from_pretrained(folder, gguf_file=...)` makes it.

    Raises:
        UnsupportedModelError: transformers does not know the architecture, or the package `gguf` is missing.
    """
    settings = gguf_settings(header)
    with _refused(header, "the configuration"):
        config_class: Any = CONFIG_MAPPING[settings["model_type"]]
        config: PreTrainedConfig = config_class.from_dict(deepcopy(settings))
    return config


def gguf_tokenizer(header: GgufHeader, config: PreTrainedConfig) -> Any:
    """The tokenizer of the file, with its chat template, as `AutoTokenizer` makes it with `gguf_file=...`.

    `AutoTokenizer` would read the configuration once more, with all lists. Other files of the directory are not used.
    """
    mapping: Any = TOKENIZER_MAPPING
    tokenizer_class: Any = mapping.get(type(config), PreTrainedTokenizerFast)
    if tokenizer_class.__name__ == "MistralCommonBackend":  # reads files of Mistral's own format
        tokenizer_class = PreTrainedTokenizerFast
    with scratch_folder() as folder:
        Path(folder, _FILE).symlink_to(header.files[0])
        return tokenizer_class.from_pretrained(folder, gguf_file=_FILE, local_files_only=True)


def gguf_dtype(header: GgufHeader, dtypes: set[torch.dtype | None]) -> torch.dtype:
    """The dtype in which transformers computes if the user names none.

    Args:
        dtypes: Of all tensors of the file; None for those in blocks.
    """
    if None in dtypes or not has_conversions(header):
        return torch.float32
    return next((dtype for dtype in (torch.bfloat16, torch.float16) if dtype in dtypes), torch.float32)


def gguf_conversions(header: GgufHeader, config: PreTrainedConfig) -> tuple[list[Any], list[Any]]:
    """The renamings and converters from GGUF's tensors to the model's, of an architecture that `has_conversions`."""
    with needs("conversions of GGUF's tensors"):
        entries = import_module(_NEW).get_gguf_conversion_mapping(header.architecture, config)
    converters = [one for one in entries if hasattr(one, "operations")]
    return [one for one in entries if not hasattr(one, "operations")], converters


def gguf_names(header: GgufHeader, model: PreTrainedModel) -> tuple[Mapping[str, str], Callable[..., Any]]:
    """The parameters' names by GGUF's names, and the function that undoes what the converter did to a tensor.

    For architectures without conversions. The function takes `weights` (a NumPy array), `name`, `tensor_key_mapping`
    (the names) and `parsed_parameters` (where some results go), and returns an object with `weights` and `name`.
    """
    _check_package(header)
    settings = gguf_settings(header)
    with needs("reader of GGUF files"):
        old = import_module(_OLD)
        processor = old.TENSOR_PROCESSORS.get(header.architecture, old.TensorProcessor)(config=deepcopy(settings))
        find = old.get_gguf_hf_weights_map
    with _refused(header, "the tensors' names"):
        names: Mapping[str, str] = find(_WithoutLayers(model, model.config), processor)
    process: Callable[..., Any] = processor.process
    return names, process


class _WithoutLayers:
    """A model whose layers seem to have no children.

    transformers looks for names in each module of a model, with the names that its parameters have within it, and makes
    a table of all names each time. Within a layer it finds none, and for a large model this would take a minute.
    """

    def __init__(self, module: nn.Module, config: PreTrainedConfig) -> None:
        self._module = module
        self.config = config

    def state_dict(self) -> dict[str, Any]:
        return self._module.state_dict()

    def named_children(self) -> list[tuple[str, _WithoutLayers]]:
        if isinstance(self._module, nn.ModuleList):
            return []
        return [(name, _WithoutLayers(child, self.config)) for name, child in self._module.named_children()]
