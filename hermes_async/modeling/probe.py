"""Finds out how a model runs before any weight is read, by one forward pass with weights that are all zero.

Every parameter is a view of one anonymous mapping, which is never written to. So it takes no memory, and none is
reserved for it. Where there are not even addresses for it, each parameter is a single zero, expanded.
"""

from __future__ import annotations

import logging
import math
import mmap
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from hermes_async.errors import UnsupportedModelError
from hermes_async.foreign_errors import reason_of
from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.inputs import example_inputs
from hermes_async.modeling.kv_cache import KVLayout, KVPool, KVShape, SequenceKV
from hermes_async.modeling.module_tensors import replaced_tensors
from hermes_async.modeling.packed import PackedBatch, PackedSequence, check_forward_signature, forward_packed
from hermes_async.modeling.skeleton import Skeleton, layers_of, token_embedding
from hermes_async.modeling.transformers_api import own_buffers, own_parameters, storage_identity
from hermes_async.storage.buffers import MAP_NORESERVE

logger = logging.getLogger(__name__)

_MORE_TOKENS = (16, 128)


@dataclass(frozen=True, slots=True)
class Probe:
    """What one forward pass showed.

    Attributes:
        visits: The modules whose forward ran and that have weights in or under them: their order, by name.
        used_outside: Those whose weights were also used while their forward did not run.
        kv: The layers that have keys and values, and their sizes.
        embeds_input_ids: The input embedding is called once, with the input ids themselves, and not used otherwise.
        unused: Parameters that the pass did not need.
        least_tokens: Tokens of the shortest text that was tried with success.
        tokens_per_image: Tokens of an image of `pixels_per_image` in the layers; 0 where the input is text.
        bytes_per_image: The most memory of what was computed from an image that was alive at one time.
    """

    visits: Mapping[str, int]
    used_outside: frozenset[str]
    kv: KVLayout
    embeds_input_ids: bool
    unused: frozenset[str] = frozenset()
    least_tokens: int = 1
    tokens_per_image: int = 0
    pixels_per_image: int = 0
    bytes_per_image: int = 0


class _RecordingPool(KVPool):
    """Keeps what each layer writes, and so its shapes."""

    def __init__(self) -> None:
        self.written: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def write(
        self, layer_idx: int, blocks: torch.Tensor, offsets: torch.Tensor, keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        self.written[layer_idx] = (keys, values)

    def gather(self, layer_idx: int, blocks: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        return self.written[layer_idx]


def probe_packed(skeleton: Skeleton, attention: PackedAttention) -> Probe:
    """Runs a model that generates once with zeros. Its parameters are on the meta device again afterwards.

    Raises:
        UnsupportedModelError: The model's forward does not run on a packed row.
    """
    names = list(skeleton.model.state_dict())
    attention.windows.clear()
    first = probe_model(skeleton.model, attention, names)
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
        second = probe_model(skeleton.model, attention, needed)
    except UnsupportedModelError:
        return first
    return replace(second, unused=idle)


def _check_windows(skeleton: Skeleton, attention: PackedAttention, kv: KVLayout) -> None:
    """Refuses models whose cache would drop keys outside of a window that their attention function is not given."""
    for layer_idx, layer in enumerate(DynamicCache(config=skeleton.model.config).layers):
        if layer_idx not in kv.layers or attention.windows.get(layer_idx) is not None:
            continue
        window = getattr(layer, "sliding_window", None)
        if window is not None and (skeleton.context_length is None or window < skeleton.context_length):
            raise UnsupportedModelError(
                f"{type(skeleton.model).__name__} keeps {window} tokens in the cache of layer {layer_idx}, "
                "but gives its attention no such window; the engine would attend to more"
            )


def probe_model(model: PreTrainedModel, attention: PackedAttention, names: list[str]) -> Probe:
    """Runs a causal language model with zeros for the parameters in `names`; the others stay on the meta device."""
    check_forward_signature(model)
    pool = _RecordingPool()
    batch = PackedBatch.of([PackedSequence(SequenceKV(pool, [0]), past=0, token_ids=[0], num_outputs=1)])
    run = partial(forward_packed, model, attention, batch)
    probe = _observe(model, run, names=names, input_ids=batch.input_ids, on_what="on a packed row of sequences")
    shapes = {
        layer_idx: KVShape(*keys.shape[1:], *values.shape[1:])
        for layer_idx, (keys, values) in sorted(pool.written.items())
    }
    if not shapes:
        raise UnsupportedModelError(f"{type(model).__name__} keeps no keys and values in a KV cache")
    dtype = next(iter(pool.written.values()))[0].dtype
    return replace(probe, kv=KVLayout(shapes, dtype))


def probe_forward(skeleton: Skeleton) -> Probe:
    """Runs a model that does not generate once with zeros, on the smallest input that it takes.

    Raises:
        UnsupportedModelError: The model's forward does not run on token ids or images.
    """
    inputs = example_inputs(skeleton.model)
    try:
        return _probe_forward(skeleton, inputs)
    except UnsupportedModelError:
        # A few models divide the tokens into windows or groups, and do not run on fewer.
        for num_tokens in _MORE_TOKENS if "input_ids" in inputs else ():
            with suppress(UnsupportedModelError):
                probe = _probe_forward(skeleton, example_inputs(skeleton.model, num_tokens))
                return replace(probe, least_tokens=num_tokens)
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
            probe = _observe_forward(model, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    if "pixel_values" not in inputs:
        return probe
    return replace(
        probe,
        tokens_per_image=max(lengths),
        pixels_per_image=math.prod(inputs["pixel_values"].shape[-2:]),
        bytes_per_image=alive.most_bytes,
    )


def _observe_forward(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> Probe:
    """Runs the model's own forward. An image may be many tokens, so it goes through shapes alone where that works."""
    on_what = "on token ids or images"
    if "input_ids" not in inputs:
        shapes = {name: value.to("meta") for name, value in inputs.items()}
        buffers = {name: buffer.to("meta") for name, buffer in model.named_buffers() if not buffer.is_meta}
        try:
            with replaced_tensors(model, buffers):
                return _observe(model, partial(model, **shapes), names=(), input_ids=None, on_what=on_what)
        except UnsupportedModelError as error:
            logger.debug("%s does not run on shapes alone: %s", type(model).__name__, error)
    names, input_ids = list(model.state_dict()), inputs.get("input_ids")
    return _observe(model, partial(model, **inputs), names=names, input_ids=input_ids, on_what=on_what)


class _ModuleCalls:
    """Records the calls of all modules that have tensors in or under them.

    Args:
        input_ids: What the model is called with; None where its input is something else.

    Attributes:
        visits: Each module that was called, with its turn, by name.
        num_open: How many calls of each module are under way, by name.
        embedded: Of each call of the input embedding, whether it was given the input ids and nothing else.
    """

    def __init__(self, input_ids: torch.Tensor | None) -> None:
        self.visits: dict[str, int] = {}
        self.num_open: Counter[str] = Counter()
        self.embedded: list[bool] = []
        self._input_ids = input_ids

    @contextmanager
    def recorded(self, model: PreTrainedModel) -> Iterator[None]:
        """Within the block the calls of the model's modules are recorded."""
        embedding = token_embedding(model)
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if any(True for _ in chain(module.parameters(), module.buffers())):
                    hooks.callback(module.register_forward_pre_hook(partial(self._begin, name)).remove)
                    hooks.callback(module.register_forward_hook(partial(self._end, name)).remove)
            if embedding is not None and self._input_ids is not None:
                hooks.callback(embedding.register_forward_pre_hook(self._embed).remove)
            yield

    def _begin(self, name: str, module: nn.Module, args: Any) -> None:
        self.visits.setdefault(name, len(self.visits))
        self.num_open[name] += 1

    def _end(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        self.num_open[name] -= 1

    def _embed(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        given = args[0] if len(args) == 1 else None
        assert self._input_ids is not None
        self.embedded.append(isinstance(given, torch.Tensor) and torch.equal(given, self._input_ids))


class _UsesOutside(TorchFunctionMode):
    """Finds modules whose weights are used while their forward does not run.

    Args:
        names: The tensors that count as weights.
        num_open: How many calls of each module are under way, by name; changes from outside.

    Attributes:
        modules: Their names; a module that contains one of them counts too.
    """

    def __init__(self, model: nn.Module, names: Collection[str], num_open: Counter[str]) -> None:
        super().__init__()
        self.modules: set[str] = set()
        self._num_open = num_open
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
        # Reading the shape or device of a weight is no use of it.
        if isinstance(result, (torch.Tensor, tuple, list)) and not isinstance(result, torch.Size):
            for given in (*args, *(kwargs or {}).values()):
                for item in given if isinstance(given, (tuple, list)) else (given,):
                    self._record(self._owners.get(id(item), ""))
        return result

    def _record(self, owner: str) -> None:
        while owner:
            if not self._num_open[owner]:
                self.modules.add(owner)
            owner = owner.rpartition(".")[0]


class _Alive(TorchFunctionMode):
    """Measures the memory of the computed tensors that are alive; tensors that share memory count once.

    Attributes:
        most_bytes: The most at one time.
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
    """Returns zeros in place of what is computed from weights that are all zero: it would take most of the time.

    On the meta device torch would also compute the shapes of each step of attention and GELU. Arguments that do not
    fit are given to the function itself, which raises an error.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        shape = _shape_of_zeros(func, args, kwargs)
        return func(*args, **kwargs) if shape is None else args[0].new_zeros(shape)


def _shape_of_zeros(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, ...] | None:
    """The shape of the result of `func`, if the result is known to be zero."""
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
    """Whether dtype and device are the same: a weight that stayed on the meta device must cause an error."""
    return weight is not None and given.dtype == weight.dtype and given.device == weight.device


def _zeros_like(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Zeros that take no memory, as matrices may be larger than the machine's memory."""
    largest = max((tensor.nbytes for tensor in tensors.values()), default=0)
    try:
        block = mmap.mmap(-1, max(1, largest), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:  # addresses are limited, or the system does not overcommit memory
        logger.debug("no addresses for %d bytes: %s", largest, error)
        # The second choice, because a product of several matrices would copy an expanded zero.
        return {name: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape) for name, tensor in tensors.items()}
    return {
        name: torch.frombuffer(block, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape)
        if tensor.numel()
        else torch.empty(tensor.shape, dtype=tensor.dtype)
        for name, tensor in tensors.items()
    }


def _observe(
    model: PreTrainedModel,
    run: Callable[[], object],
    *,
    names: Sequence[str],
    input_ids: torch.Tensor | None,
    on_what: str,
) -> Probe:
    """Calls `run`, which runs the model, with zeros for the parameters in `names`; the KV layout is left empty.

    Raises:
        UnsupportedModelError: The model does not run; the message says `on_what`.
    """
    unloaded = model.state_dict(keep_vars=True)
    zeros = _zeros_like({name: unloaded[name] for name in names})
    calls = _ModuleCalls(input_ids)
    try:
        with replaced_tensors(model, zeros), calls.recorded(model), torch.inference_mode(), _ZerosForZeros():
            outside = _UsesOutside(model, unloaded, calls.num_open)  # knows the zeros as the weights
            with outside:
                run()
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(f"{type(model).__name__} does not run {on_what}: {reason_of(error)}") from error
    embedding = token_embedding(model)
    embedding_name = next((name for name, module in model.named_modules() if module is embedding), None)
    used_outside = frozenset(outside.modules.intersection(calls.visits))
    embeds_input_ids = calls.embedded == [True] and embedding_name not in used_outside
    return Probe(
        visits=calls.visits,
        used_outside=used_outside,
        kv=KVLayout({}, model.dtype),
        embeds_input_ids=embeds_input_ids,
    )
