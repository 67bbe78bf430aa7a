"""Every name of transformers and torch that is private, deprecated, or changes between their versions.

One function for each thing that the engine needs. Where the installed version does not have it, the function raises
`IncompatibleVersionError`, which names the installed and the tested versions. All were tried on the versions in
`TESTED_VERSIONS`; nothing outside of this module uses such a name (`tests/test_architecture.py` holds that).
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import (
    AttentionInterface,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from hermes_async.errors import IncompatibleVersionError

TESTED_VERSIONS: Mapping[str, tuple[str, str]] = {"transformers": ("5.21.0", "5.24.0"), "torch": ("2.13.0", "2.14.1")}
"""The lowest and the highest version that the tests passed on; `pyproject.toml` declares the same range."""

KV_CACHE_ARGUMENTS = frozenset({"cache", "past_key_values", "past_key_value", "cache_params"})
"""What a model's forward calls its KV cache: `past_key_values` up to transformers 5.23, `cache` from 5.24 on."""


def installed_versions() -> dict[str, str]:
    """The versions of the libraries in `TESTED_VERSIONS`."""
    return {"transformers": transformers.__version__, "torch": torch.__version__}


@cache
def warn_of_untested_versions() -> None:
    """Warns, once a process, where a library is older or newer than what was tested."""
    untested = []
    for name, version in installed_versions().items():
        lowest, highest = TESTED_VERSIONS[name]
        release = Version(Version(version).base_version)  # "2.14.1+cu130" is 2.14.1
        if not Version(lowest) <= release <= Version(highest):
            untested.append(f"{name} {version} (tested: {lowest} to {highest})")
    if untested:
        warnings.warn(
            f"hermes_async was not tested with {' and '.join(untested)}; if a model is refused or fails, install a "
            "tested version",
            UserWarning,
            stacklevel=2,
        )


@contextmanager
def _needs(capability: str) -> Iterator[None]:
    """Within the block, a name that is missing is the fault of an installed version."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        installed = " and ".join(f"{name} {version}" for name, version in installed_versions().items())
        tested = ", ".join(f"{name} {lowest} to {highest}" for name, (lowest, highest) in TESTED_VERSIONS.items())
        raise IncompatibleVersionError(
            f"{installed} have no {capability} that hermes_async knows ({error}); install versions that it was tested "
            f"with: {tested}",
            capability=capability,
            installed=installed_versions(),
        ) from error


# --- a model's class and its making ---


def model_class_of(auto_class: Any, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that an auto class, such as `AutoModelForCausalLM`, has for `config`; None where it has none."""
    with _needs("table of an auto class's models"):
        mapping = auto_class._model_mapping
    try:
        found: type[PreTrainedModel] = mapping[type(config)]
    except KeyError:
        return None
    return found


def from_config(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, attention: str | None
) -> PreTrainedModel:
    """Makes a model on the current device, with random weights.

    Args:
        attention: The attention implementation; None takes transformers' choice.
    """
    with _needs("way to make a model from its configuration"):
        make: Callable[..., PreTrainedModel] = model_class._from_config
    return make(config, dtype=dtype, attn_implementation=attention)


def mark_initialized(tensor: torch.Tensor) -> None:
    """Tells transformers not to initialize a tensor that comes from the checkpoint, as `from_pretrained` does."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def names_kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Parts of the names of parameters that transformers keeps in float32 whatever the model's dtype is."""
    with _needs("plan of a model's dtypes"):
        plan = model._get_dtype_plan
    return list(plan(dtype))


def names_that_may_be_missing(model: PreTrainedModel) -> list[str]:
    """Patterns of the names of tensors that a checkpoint need not hold."""
    with _needs("list of the tensors that a checkpoint may lack"):
        return list(model._keys_to_ignore_on_load_missing or ())


def conversion_mapping(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """transformers' renamings (`WeightRenaming`) and converters (`WeightConverter`) for checkpoints of this model."""
    with _needs("table of renamings of a checkpoint's tensors"):
        table = import_module("transformers.conversion_mapping").get_model_conversion_mapping
        loading = import_module("transformers.core_model_loading")
        renaming, converter = loading.WeightRenaming, loading.WeightConverter
    entries = list(table(model))
    return [one for one in entries if isinstance(one, renaming)], [one for one in entries if isinstance(one, converter)]


def tensor_renamer() -> Callable[[str, list[Any], list[Any], str, Mapping[str, Any]], tuple[str, str | None]]:
    """The function that finds a parameter's name for a checkpoint's tensor, and the pattern of its converter, if any.

    It takes the tensor's name, renamings, converters, the base model's prefix, and the model's state dict.
    """
    with _needs("renaming of a checkpoint's tensors"):
        rename: Callable[..., tuple[str, str | None]] = import_module(
            "transformers.core_model_loading"
        ).rename_source_key
    return rename


def tensor_order() -> Callable[[str], Any]:
    """The sort key of tensor names by which layer 10 comes behind layer 9."""
    with _needs("order of a checkpoint's tensors"):
        key: Callable[[str], Any] = import_module("transformers.core_model_loading").dot_natural_key
    return key


def operation_of(operation: Any) -> tuple[str, int | None]:
    """What a converter's operation is (such as "Concatenate"), and the dimension that it works along."""
    return type(operation).__name__, getattr(operation, "dim", None)


# --- attention and the KV cache ---


def supports_packed_attention(model_class: type[PreTrainedModel]) -> bool:
    """Whether the architecture lets its attention function be chosen."""
    with _needs("choice of the attention function"):
        return bool(model_class._supports_attention_backend)


def plain_attention(model: PreTrainedModel) -> str:
    """The attention that transformers itself takes for this architecture where nothing else is asked for."""
    with _needs("word on a model's attention"):
        return "sdpa" if model._supports_sdpa else "eager"


def attention_implementation(model: PreTrainedModel) -> str | None:
    """The name of the attention that the model uses."""
    with _needs("word on a model's attention"):
        name: str | None = model.config._attn_implementation
    return name


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Makes `function` an attention implementation of this name."""
    AttentionInterface.register(name, function)


def unregister_attention(name: str) -> None:
    """Takes the name back from transformers' registry, if it is there."""
    with _needs("registry of attention functions"):
        AttentionInterface._global_mapping.pop(name, None)


def kv_cache_argument(model: PreTrainedModel) -> str | None:
    """What the model's forward calls its KV cache; None where it takes none."""
    return _kv_cache_argument_of(getattr(model.forward, "__func__", model.forward))


@cache  # asked for in each sweep, and to read a signature takes tens of microseconds
def _kv_cache_argument_of(forward: Callable[..., Any]) -> str | None:
    accepted = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in accepted), None)


# --- torch ---


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The table of a module's own parameters. Writing to it is what `Module.__setattr__` does, and is much quicker."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The table of a module's own buffers, as `own_parameters`."""
    return module._buffers


def storage_identity(tensor: torch.Tensor) -> int:
    """The same for tensors that share memory, also on the meta device, where there are no addresses."""
    with _needs("identity of a tensor's storage"):
        return int(tensor.untyped_storage()._cdata)


def one_dnn_enabled() -> bool:
    """Whether torch computes with oneDNN. `torch.backends.mkldnn.flags` also touches other devices, and warns."""
    torch_c: Any = torch._C
    with _needs("switch for oneDNN"):
        enabled: bool = torch_c._get_mkldnn_enabled()
    return enabled


def enable_one_dnn(enabled: bool) -> None:
    """Turns oneDNN on or off, for the whole process."""
    torch_c: Any = torch._C
    with _needs("switch for oneDNN"):
        torch_c._set_mkldnn_enabled(enabled)


def packs_attention(dtype: torch.dtype) -> bool:
    """Whether torch multiplies in attention with packed matrices, in this dtype on this CPU."""
    needed = {torch.bfloat16: "amx_bf16", torch.float16: "avx512_fp16"}.get(dtype)
    if needed is None:
        return False
    with _needs("table of a CPU's capabilities"):
        return bool(torch.cpu.get_capabilities().get(needed, False))


_TOKENIZER_CALLS = ("__call__", "_encode_plus", "decode", "_decode", "pad", "_pad")


def changes_in_calls(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer may change itself while it encodes or decodes, even where it need not truncate or pad.

    The class around the Rust library does not. Its subclasses count as if they did where they have their own way to
    encode, decode or pad, or switch to a text's language before each.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or hasattr(tokenizer, "_switch_to_input_mode"):
        return True
    with _needs("way to encode and decode"):
        calls = [(getattr(type(tokenizer), name), getattr(PreTrainedTokenizerFast, name)) for name in _TOKENIZER_CALLS]
        return any(own is not plain for own, plain in calls)


def forget_truncation_and_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Switches off what a tokenizer's file says of it, so that no call has to."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        with _needs("tokenizer of the Rust library"):
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
