"""Every use of a name of transformers or torch that is private, deprecated, or differs between their versions.

There is one function for each need of the engine. If the installed version lacks the name, the function raises
`IncompatibleVersionError` with the installed and the tested versions. All functions were tested on the versions in
`TESTED_VERSIONS`. Only this module and its neighbours whose names end in `_api` use such names;
`tests/test_architecture.py` checks that.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
"""The lowest and the highest version that passed the tests; `pyproject.toml` declares the same range."""

KV_CACHE_ARGUMENTS = frozenset({"cache", "past_key_values", "past_key_value", "cache_params"})
"""Names of a forward's argument for the KV cache: `past_key_values` up to transformers 5.23, `cache` from 5.24 on."""

ENCODER_OUTPUTS = "encoder_outputs"
"""The input of an encoder-decoder that stands for what its encoder has made."""


def installed_versions() -> dict[str, str]:
    """The versions of the libraries in `TESTED_VERSIONS`."""
    return {"transformers": transformers.__version__, "torch": torch.__version__}


@cache
def warn_of_untested_versions() -> None:
    """Warns, once per process, if a library is older or newer than the tested versions."""
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
def needs(capability: str) -> Iterator[None]:
    """Within the block, a missing name means that an installed version is incompatible."""
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise _incompatible(capability, error) from error


def _incompatible(capability: str, error: Exception) -> IncompatibleVersionError:
    installed = " and ".join(f"{name} {version}" for name, version in installed_versions().items())
    tested = ", ".join(f"{name} {lowest} to {highest}" for name, (lowest, highest) in TESTED_VERSIONS.items())
    return IncompatibleVersionError(
        f"{installed} have no {capability} that hermes_async knows ({error}); install versions that it was tested "
        f"with: {tested}",
        capability=capability,
        installed=installed_versions(),
    )


# --- a model's class and its making ---


def model_class_of(auto_class: Any, config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class of an auto class, such as `AutoModelForCausalLM`, for `config`; None if there is none."""
    with needs("table of an auto class's models"):
        mapping = auto_class._model_mapping
    try:
        found: type[PreTrainedModel] = mapping[type(config)]
    except KeyError:
        return None
    return found


def from_config(
    model_class: type[PreTrainedModel],
    config: PreTrainedConfig,
    dtype: torch.dtype,
    attention: str | None,
    experts: str | None = None,
) -> PreTrainedModel:
    """Makes a model on the current device, with random weights.

    Args:
        attention, experts: The implementations of attention and of experts; None for transformers' defaults.
    """
    with needs("way to make a model from its configuration"):
        make: Callable[..., PreTrainedModel] = model_class._from_config
    return make(config, dtype=dtype, attn_implementation=attention, experts_implementation=experts)


def mark_initialized(tensor: torch.Tensor) -> None:
    """Tells transformers not to initialize a tensor, as `from_pretrained` does for tensors of the checkpoint."""
    tensor._is_hf_initialized = True  # type: ignore[attr-defined]


def initialize_again(modules: Iterable[nn.Module]) -> None:
    """Tells transformers to initialize these modules in the next `initialize_weights`, but for what is marked."""
    for module in modules:
        module._is_hf_initialized = False  # type: ignore[assignment]


def names_kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> list[str]:
    """Substrings of the names of parameters that transformers keeps in float32 whatever the model's dtype is."""
    with needs("plan of a model's dtypes"):
        plan = model._get_dtype_plan
    return list(plan(dtype))


def names_that_may_be_missing(model: PreTrainedModel) -> list[str]:
    """Patterns of the names of tensors that a checkpoint need not hold."""
    with needs("list of the tensors that a checkpoint may lack"):
        return list(model._keys_to_ignore_on_load_missing or ())


def conversion_mapping(model: PreTrainedModel) -> tuple[list[Any], list[Any]]:
    """transformers' renamings (`WeightRenaming`) and converters (`WeightConverter`) for checkpoints of this model."""
    with needs("table of renamings of a checkpoint's tensors"):
        table = import_module("transformers.conversion_mapping").get_model_conversion_mapping
        loading = import_module("transformers.core_model_loading")
        renaming, converter = loading.WeightRenaming, loading.WeightConverter
    entries = list(table(model))
    return [one for one in entries if isinstance(one, renaming)], [one for one in entries if isinstance(one, converter)]


def tensor_renamer() -> Callable[[str, list[Any], list[Any], str, Mapping[str, Any]], tuple[str, str | None]]:
    """The function that finds the parameter of a checkpoint's tensor, and the pattern of its converter, if any.

    It takes the tensor's name, renamings, converters, the base model's prefix, and the model's state dict.
    """
    with needs("renaming of a checkpoint's tensors"):
        rename: Callable[..., tuple[str, str | None]] = import_module(
            "transformers.core_model_loading"
        ).rename_source_key
    return rename


def tensor_order() -> Callable[[str], Any]:
    """The sort key of tensor names that puts layer 10 after layer 9."""
    with needs("order of a checkpoint's tensors"):
        key: Callable[[str], Any] = import_module("transformers.core_model_loading").dot_natural_key
    return key


def operation_of(operation: Any) -> tuple[str, int | None]:
    """The name of a converter's operation, such as "Concatenate", and its dimension."""
    return type(operation).__name__, getattr(operation, "dim", None)


# --- attention and the KV cache ---


def supports_packed_attention(model_class: type[PreTrainedModel]) -> bool:
    """Whether the attention function of the architecture can be chosen."""
    with needs("choice of the attention function"):
        return bool(model_class._supports_attention_backend)


def plain_attention(model: PreTrainedModel) -> str:
    """transformers' default attention implementation for this architecture."""
    with needs("word on a model's attention"):
        return "sdpa" if model._supports_sdpa else "eager"


def attention_implementation(model: PreTrainedModel) -> str | None:
    """The name of the attention implementation that the model uses."""
    with needs("word on a model's attention"):
        name: str | None = model.config._attn_implementation
    return name


class AttentionChoice:
    """The attention implementations that a model and its parts have now; `apply` sets them again in microseconds.

    `PreTrainedModel.set_attn_implementation` is slow: it visits every module and checks every choice. All it changes is
    one attribute of each configuration.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
        found = list(configs.values())
        with needs("word on a model's attention"):
            for config in found:
                for name in config.sub_configs:
                    part = getattr(config, name)
                    if part is not None and id(part) not in configs:
                        configs[id(part)] = part
                        found.append(part)
            self._names = [(config, config._attn_implementation_internal) for config in found]

    def or_plain_for(self, name: str) -> AttentionChoice:
        """transformers' own implementations, if the model uses the implementation `name`; else the same."""
        if attention_implementation(self._model) != name:
            return self
        self._model.set_attn_implementation(plain_attention(self._model))
        plain = AttentionChoice(self._model)
        self.apply()
        return plain

    def apply(self) -> None:
        """Makes them the model's implementations again."""
        for config, name in self._names:
            config._attn_implementation_internal = name


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Makes `function` an attention implementation of this name."""
    AttentionInterface.register(name, function)


def unregister_attention(name: str) -> None:
    """Removes the name from transformers' registry, if it is there."""
    with needs("registry of attention functions"):
        AttentionInterface._global_mapping.pop(name, None)


def kv_cache_argument(model: PreTrainedModel) -> str | None:
    """The name of the forward's argument for the KV cache; None if it takes none."""
    return _kv_cache_argument_of(getattr(model.forward, "__func__", model.forward))


@cache  # called in each sweep, and reading a signature takes tens of microseconds
def _kv_cache_argument_of(forward: Callable[..., Any]) -> str | None:
    accepted = inspect.signature(forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in accepted), None)


# --- torch ---


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The table of a module's own parameters. `Module.__setattr__` writes to it too, but is much slower."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The table of a module's own buffers; as `own_parameters`."""
    return module._buffers


def storage_identity(tensor: torch.Tensor) -> int:
    """A number that is the same for tensors that share memory, also on the meta device, which has no addresses."""
    with needs("identity of a tensor's storage"):
        return int(tensor.untyped_storage()._cdata)


def one_dnn_enabled() -> bool:
    """Whether torch computes with oneDNN. `torch.backends.mkldnn.flags` also affects other devices, and warns."""
    torch_c: Any = torch._C
    with needs("switch for oneDNN"):
        enabled: bool = torch_c._get_mkldnn_enabled()
    return enabled


def enable_one_dnn(enabled: bool) -> None:
    """Turns oneDNN on or off, for the whole process."""
    torch_c: Any = torch._C
    with needs("switch for oneDNN"):
        torch_c._set_mkldnn_enabled(enabled)


_overrides: Any = torch.overrides


def function_modes() -> list[Any]:
    """The instances of `TorchFunctionMode` that are active on this thread, the outermost first."""
    try:  # not `needs`, which takes longer: this is asked for at every stage of every call
        return list(_overrides._get_current_function_mode_stack())
    except AttributeError as error:
        raise _incompatible("stack of function modes", error) from error


def exchange_function_modes(modes: Sequence[Any]) -> list[Any]:
    """Makes `modes` the active function modes of this thread, and returns those that were active before."""
    before = function_modes()
    if len(before) != len(modes) or any(one is not other for one, other in zip(before, modes, strict=True)):
        for _ in before:
            _overrides._pop_mode()
        for mode in modes:
            _overrides._push_mode(mode)
    return before


def packs_attention(dtype: torch.dtype) -> bool:
    """Whether torch packs the matrices of attention in this dtype on this CPU."""
    needed = {torch.bfloat16: "amx_bf16", torch.float16: "avx512_fp16"}.get(dtype)
    if needed is None:
        return False
    with needs("table of a CPU's capabilities"):
        return bool(torch.cpu.get_capabilities().get(needed, False))


_TOKENIZER_CALLS = ("__call__", "_encode_plus", "decode", "_decode", "pad", "_pad")


def changes_in_calls(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer may change its own state when it encodes or decodes, even without truncation or padding.

    transformers' class for the Rust library does not. Its subclasses may, if they have their own methods to encode,
    decode or pad, or switch to a text's language before each call.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerFast) or hasattr(tokenizer, "_switch_to_input_mode"):
        return True
    with needs("way to encode and decode"):
        calls = [(getattr(type(tokenizer), name), getattr(PreTrainedTokenizerFast, name)) for name in _TOKENIZER_CALLS]
        return any(own is not plain for own, plain in calls)


def forget_truncation_and_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Switches off truncation and padding of a tokenizer's file, so that no call has to."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        with needs("tokenizer of the Rust library"):
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
