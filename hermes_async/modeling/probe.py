"""Looks at how a model runs before any weight is read: one forward pass over weights that are all zero.

The zeros are one anonymous mapping that is never written to, so they take no memory, and none is reserved for them;
every parameter is a view of it. Where not even addresses are to be had, each parameter is one zero, repeated.
"""

from __future__ import annotations

import logging
import math
import mmap
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from hermes_async.errors import UnsupportedModelError
from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.inputs import example_inputs
from hermes_async.modeling.kv_cache import KVLayout, KVPool, KVShape, Segment, SequenceKV
from hermes_async.modeling.module_tensors import replaced_tensors
from hermes_async.modeling.packed import PackedBatch, check_forward_signature, forward_packed
from hermes_async.modeling.skeleton import Skeleton, layers_of, token_embedding
from hermes_async.modeling.transformers_api import own_buffers, own_parameters, storage_identity
from hermes_async.storage.buffers import MAP_NORESERVE

logger = logging.getLogger(__name__)

_NUM_TOKENS = 1
_MORE_TOKENS = (16, 128)


@dataclass(frozen=True, slots=True)
class Probe:
    """What one forward pass showed.

    Attributes:
        visits: The modules with weights in or under them whose forward ran, each with its turn, by name.
        used_outside: Those of whose weights something was also computed while their forward did not run.
        kv: Which layers keep keys and values, and their sizes.
        embeds_input_ids: The input embedding is called once, with the input ids themselves, and not used otherwise.
        unused: Parameters that the pass got along without.
        least_tokens: Of a text that the model was seen to run on; it may run on fewer.
        tokens_per_image: What the layers make of one image of `pixels_per_image`; 0 where the input is text.
        bytes_per_image: Of what was computed of it, as much as was alive at one time.
    """

    visits: Mapping[str, int]
    used_outside: frozenset[str]
    kv: KVLayout
    embeds_input_ids: bool
    unused: frozenset[str]
    least_tokens: int = 1
    tokens_per_image: int = 0
    pixels_per_image: int = 0
    bytes_per_image: int = 0


class _RecordingPool(KVPool):
    """Keeps whatever each layer writes, and with it the shapes."""

    def __init__(self) -> None:
        self.written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(
        self, layer_idx: int, blocks: torch.Tensor, offsets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        self.written[layer_idx] = (keys, values)

    def gather(self, layer_idx: int, blocks: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.written[layer_idx]


def probe(skeleton: Skeleton, attention: PackedAttention) -> Probe:
    """Runs `skeleton` once over zeros; its parameters are on the meta device again afterwards.

    Raises:
        UnsupportedModelError: The model's forward does not run on a packed row.
    """
    names = list(skeleton.model.state_dict())
    attention.windows.clear()
    first = probe_model(skeleton.model, attention, names, skeleton.vocab_size)
    _check_windows(skeleton, attention, first.kv)
    num_layers = getattr(skeleton.model.config.get_text_config(), "num_hidden_layers", None)
    stateless = [] if num_layers is None else [idx for idx in range(num_layers) if idx not in first.kv.layers]
    if stateless:
        raise UnsupportedModelError(
            f"{type(skeleton.model).__name__}: layers {stateless} keep no keys and values in the KV cache; "
            "what they keep instead cannot be told apart by sequence"
        )
    idle = frozenset(name for name in names if name.rpartition(".")[0] not in first.visits)
    if not idle:
        return first
    try:
        # Parameters of a module that was not called may still be used by the module around it.
        needed = [name for name in names if name not in idle]
        second = probe_model(skeleton.model, attention, needed, skeleton.vocab_size)
    except UnsupportedModelError:
        return first
    return replace(second, unused=idle)


def _check_windows(skeleton: Skeleton, attention: PackedAttention, kv: KVLayout) -> None:
    """transformers' own cache forgets what a window has left, also where the attention is not told of the window."""
    for layer_idx, layer in enumerate(DynamicCache(config=skeleton.model.config).layers):
        if layer_idx not in kv.layers or attention.windows.get(layer_idx) is not None:
            continue
        window = getattr(layer, "sliding_window", None)
        if window is not None and (skeleton.context_length is None or window < skeleton.context_length):
            raise UnsupportedModelError(
                f"{type(skeleton.model).__name__} keeps {window} tokens in the cache of layer {layer_idx}, "
                "but gives its attention no such window; the engine would attend to more"
            )


def probe_model(model: PreTrainedModel, attention: PackedAttention, names: list[str], vocab_size: int) -> Probe:
    """Runs a causal language model with zeros for the parameters in `names`; the others stay on the meta device."""
    check_forward_signature(model)
    input_ids = torch.arange(_NUM_TOKENS)[None] % vocab_size
    pool = _RecordingPool()
    batch = PackedBatch(
        input_ids=input_ids,
        position_ids=torch.arange(_NUM_TOKENS)[None],
        segments=[Segment(0, _NUM_TOKENS, SequenceKV(pool, [0]), past=0)],
        logits_positions=torch.tensor([_NUM_TOKENS - 1]),
    )
    run = partial(forward_packed, model, attention, batch)
    visits, used_outside, embeds_input_ids = _watch(model, names, input_ids, run, "on a packed row of sequences")
    shapes = {
        layer_idx: KVShape(*keys.shape[1:], *values.shape[1:])
        for layer_idx, (keys, values) in sorted(pool.written.items())
    }
    if not shapes:
        raise UnsupportedModelError(f"{type(model).__name__} keeps no keys and values in a KV cache")
    dtype = next(iter(pool.written.values()))[0].dtype
    return Probe(visits, used_outside, KVLayout(shapes, dtype), embeds_input_ids, frozenset())


def probe_forward(skeleton: Skeleton) -> Probe:
    """Runs a model that does not generate once over zeros, with the smallest input that it takes.

    Raises:
        UnsupportedModelError: The model's forward takes something else than token ids and images.
    """
    inputs = example_inputs(skeleton.model)
    try:
        return _probe_forward(skeleton, inputs)
    except UnsupportedModelError:
        # A few models make windows or groups of tokens, and do not run on less.
        for num_tokens in _MORE_TOKENS if "input_ids" in inputs else ():
            with suppress(UnsupportedModelError):
                seen = _probe_forward(skeleton, example_inputs(skeleton.model, num_tokens))
                return replace(seen, least_tokens=num_tokens)
        raise


def _probe_forward(skeleton: Skeleton, inputs: dict[str, torch.Tensor]) -> Probe:
    model = skeleton.model
    lengths = [0]

    def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())
        lengths.append(next((item.shape[1] for item in given if isinstance(item, torch.Tensor) and item.dim() == 3), 0))

    hooks = [layer.register_forward_pre_hook(measure, with_kwargs=True) for layer in layers_of(model)]
    alive = _Alive()
    try:
        with alive if "pixel_values" in inputs else nullcontext():
            visits, used_outside, embeds_input_ids = _watch_forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    seen = Probe(visits, used_outside, KVLayout({}, skeleton.dtype), embeds_input_ids, frozenset())
    if "pixel_values" not in inputs:
        return seen
    return replace(
        seen,
        tokens_per_image=max(lengths),
        pixels_per_image=math.prod(inputs["pixel_values"].shape[-2:]),
        bytes_per_image=alive.most_bytes,
    )


def _watch_forward(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> tuple[dict[str, int], frozenset[str], bool]:
    """As `_watch`. An image is as many tokens as it is, so it goes through shapes alone where the model allows that."""
    on_what = "on token ids or images"
    if "input_ids" not in inputs:
        shapes = {name: value.to("meta") for name, value in inputs.items()}
        buffers = {name: buffer.to("meta") for name, buffer in model.named_buffers() if not buffer.is_meta}
        try:
            with replaced_tensors(model, buffers):
                return _watch(model, [], None, partial(model, **shapes), on_what)
        except UnsupportedModelError as error:
            logger.debug("%s does not run on shapes alone: %s", type(model).__name__, error)
    names, input_ids = list(model.state_dict()), inputs.get("input_ids")
    return _watch(model, names, input_ids, partial(model, **inputs), on_what)


class _UsesOutside(TorchFunctionMode):
    """Notices what is computed from a module's weights while its forward does not run.

    Attributes:
        modules: Those whose weights, or weights under them, were used so, by name.
        calls: How many calls of each module are under way; counted from outside.
    """

    def __init__(self, model: nn.Module, names: Collection[str]) -> None:
        super().__init__()
        self.modules: set[str] = set()
        self.calls: Counter[str] = Counter()
        self._owners = {
            id(value): path
            for path, module in model.named_modules()
            for leaf, value in (*own_parameters(module).items(), *own_buffers(module).items())
            if (f"{path}.{leaf}" if path else leaf) in names
        }

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # To ask a weight for its shape or device is no use of it.
        if isinstance(result, (torch.Tensor, tuple, list)) and not isinstance(result, torch.Size):
            for given in (*args, *(kwargs or {}).values()):
                for item in given if isinstance(given, (tuple, list)) else (given,):
                    self._record(self._owners.get(id(item), ""))
        return result

    def _record(self, owner: str) -> None:
        while owner:
            if not self.calls[owner]:
                self.modules.add(owner)
            owner = owner.rpartition(".")[0]


class _Alive(TorchFunctionMode):
    """Adds up the memory of what is computed, as long as it is alive; what shares memory counts once.

    Attributes:
        most_bytes: At one time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes = 0
        self._bytes = 0
        self._tensors: dict[int, weakref.ref[torch.Tensor]] = {}
        self._num_tensors: Counter[int] = Counter()  # of a storage

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor) and id(item) not in self._tensors:
                self._add(item)
        return result

    def _add(self, tensor: torch.Tensor) -> None:
        storage, key = tensor.untyped_storage(), id(tensor)
        place, nbytes = storage_identity(tensor), storage.nbytes()

        def dropped(_: weakref.ref[torch.Tensor]) -> None:
            del self._tensors[key]
            self._num_tensors[place] -= 1
            if not self._num_tensors[place]:
                self._bytes -= nbytes

        self._tensors[key] = weakref.ref(tensor, dropped)
        self._num_tensors[place] += 1
        if self._num_tensors[place] == 1:
            self._bytes += nbytes
            self.most_bytes = max(self.most_bytes, self._bytes)


class _ZerosForZeros(TorchFunctionMode):
    """Where weights are all zero, what is computed from them is too: most of the time would go into that.

    On the meta device torch would also work out each step of attention and GELU. What does not fit is left to the
    function itself, which says so.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        shape = _shape_of_zeros(func, args, kwargs)
        return func(*args, **kwargs) if shape is None else args[0].new_zeros(shape)


def _shape_of_zeros(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """Of what `func` gives, if that is known to be zero."""
    match func, args:
        case F.linear, (given, weight, *_) if _alike(given, weight) and given.shape[-1] == weight.shape[-1]:
            return (*given.shape[:-1], *weight.shape[:-1])
        case torch.addmm, (_, given, weight) if _alike(given, weight) and given.shape[-1] == weight.shape[0]:
            return (*given.shape[:-1], weight.shape[-1])
        case F.layer_norm, (given, shape) if _alike(given, kwargs.get("weight")):
            return tuple(given.shape) if given.shape[-len(shape) :] == kwargs["weight"].shape else None
        case F.gelu, (given, *_):
            return tuple(given.shape)
        case F.scaled_dot_product_attention, (query, key, value, *_):
            if query.shape[:-2] == key.shape[:-2] == value.shape[:-2] and query.shape[-1] == key.shape[-1]:
                return (*query.shape[:-1], value.shape[-1])
    return None


def _alike(given: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Whether they can be computed with each other: a weight that stayed on the meta device must be noticed."""
    return weight is not None and given.dtype == weight.dtype and given.device == weight.device


def _zeros_like(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zeros that take no memory, however large they are: matrices may be larger than the machine's memory."""
    largest = max((tensor.nbytes for tensor in tensors.values()), default=0)
    try:
        block = mmap.mmap(-1, max(1, largest), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:  # a limit on addresses, or a system that promises no more than it has
        logger.debug("no room for the addresses of %d bytes: %s", largest, error)
        # Not first, because a product of several matrices would make a real copy of what is repeated.
        return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in tensors.items()}
    return {
        name: torch.frombuffer(block, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
        if tensor.numel()
        else torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in tensors.items()
    }


def _watch(
    model: PreTrainedModel, names: list[str], input_ids: torch.Tensor | None, run: Callable[[], object], on_what: str
) -> tuple[dict[str, int], frozenset[str], bool]:
    """`visits`, `used_outside` and `embeds_input_ids` of a `Probe`."""
    unloaded = model.state_dict(keep_vars=True)
    zeros = _zeros_like({name: unloaded[name] for name in names})
    visits: dict[str, int] = {}
    embedded: list[bool] = []

    def record(name: str) -> Any:
        def visited(module: nn.Module, args: Any) -> None:
            visits.setdefault(name, len(visits))
            outside.calls[name] += 1

        return visited

    def record_end(name: str) -> Any:
        def left(module: nn.Module, args: Any, output: Any) -> None:
            outside.calls[name] -= 1

        return left

    def embedding_called(module: nn.Module, args: tuple[Any, ...]) -> None:
        given = args[0] if len(args) == 1 else None
        same = isinstance(given, torch.Tensor) and input_ids is not None and torch.equal(given, input_ids)
        embedded.append(same)

    hooks: list[RemovableHandle] = []
    for name, module in model.named_modules():
        if any(True for _ in module.parameters()) or any(True for _ in module.buffers()):
            hooks.append(module.register_forward_pre_hook(record(name)))
            hooks.append(module.register_forward_hook(record_end(name)))
    embedding = token_embedding(model)
    if embedding is not None and input_ids is not None:
        hooks.append(embedding.register_forward_pre_hook(embedding_called))
    try:
        with replaced_tensors(model, zeros), torch.inference_mode(), _ZerosForZeros():
            outside = _UsesOutside(model, unloaded)
            with outside:
                run()
    except UnsupportedModelError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run {on_what}: {type(error).__name__}: {reason}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    embedding_name = next((name for name, module in model.named_modules() if module is embedding), None)
    used_outside = frozenset(outside.modules.intersection(visits))
    return visits, used_outside, embedded == [True] and embedding_name not in used_outside
