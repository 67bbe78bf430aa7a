"""Finds out how a model runs before any weight is read, by one forward pass with weights that are all zero."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from hermes_async.errors import UnsupportedModelError
from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.inputs import example_inputs, example_token_ids
from hermes_async.modeling.kv_cache import KVLayout, KVPool, KVShape, SequenceKV, num_blocks
from hermes_async.modeling.module_tensors import replaced_tensors
from hermes_async.modeling.observation import Alive, Observation, observe
from hermes_async.modeling.packed import PackedBatch, PackedSequence, check_forward_signature, forward_packed
from hermes_async.modeling.row_tables import TableUse
from hermes_async.modeling.skeleton import Skeleton, layers_of
from hermes_async.modeling.turns import TurnLayout

logger = logging.getLogger(__name__)

_MORE_TOKENS = (16, 128)


@dataclass(frozen=True, slots=True)
class ImageProbe:
    """What a call with an image took.

    Attributes:
        num_tokens: Of the prompt.
        num_values: Of the tensors that were made of the image; see `num_values` in `inputs.py`.
        nbytes: The most memory that was alive at one time.
    """

    num_tokens: int
    num_values: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Probe:
    """What one forward pass showed.

    Attributes:
        visits: The modules whose forward ran and that have weights in or under them: their order, by name.
        used_outside: Modules whose weights were used while their forward did not run, whether it ran later or not.
        kv: The layers that have keys and values in a packed row, and their sizes.
        used_whole: Parameters that were used in another way than row by row, such as in another shape.
        table_uses: How the table of each `nn.Embedding` was used, by the module's name.
        groups: The modules whose forward runs only in some calls, such as those with an image, each with the name of
            those calls' group.
        unused: Parameters that the pass did not need.
        least_tokens: Tokens of the shortest text that was tried with success.
        tokens_per_image: Tokens of an image of `pixels_per_image` in the layers; 0 where the input is text.
        bytes_per_image: The most memory of what was computed from an image that was alive at one time.
        turns: The caches of sequences that run in turns: all, or those with images where others are packed. None if no
            sequence does.
        bytes_of_turn: The most memory that was alive at one time in a call of `tokens_of_turn` tokens.
        images: What a prompt with an image takes; None if the model takes none, or none could be tried.
        bytes_per_past_token: What a layer computes in turns from each token in the cache, such as keys of all heads.
        keeps_scores: In turns, attention keeps the scores of all pairs of tokens, and computes in float32.
    """

    visits: Mapping[str, int]
    used_outside: frozenset[str]
    kv: KVLayout
    table_uses: Mapping[str, TableUse]
    groups: Mapping[str, str] = field(default_factory=dict)
    unused: frozenset[str] = frozenset()
    used_whole: frozenset[str] = frozenset()
    least_tokens: int = 1
    tokens_per_image: int = 0
    pixels_per_image: int = 0
    bytes_per_image: int = 0
    turns: TurnLayout | None = None
    bytes_of_turn: int = 0
    images: ImageProbe | None = None
    tokens_of_turn: int = 1
    bytes_per_past_token: int = 0
    keeps_scores: bool = False

    @classmethod
    def of(cls, seen: Observation, kv: KVLayout) -> Probe:
        """What one call showed."""
        return cls(
            visits=seen.visits,
            used_outside=seen.used_outside,
            used_whole=seen.used_whole,
            kv=kv,
            table_uses=seen.table_uses,
        )

    @property
    def packs(self) -> bool:
        """Whether sequences are packed, apart from those with images."""
        return bool(self.kv.layers)

    @property
    def cache(self) -> KVLayout | TurnLayout:
        """The memory of a text's cache."""
        return self.kv if self.packs or self.turns is None else self.turns


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
    return without_unused(first, names, partial(probe_model, skeleton.model, attention))


def idle_parameters(names: Iterable[str], used: Collection[str], needed: Collection[str]) -> frozenset[str]:
    """The parameters of modules that are not among `used`, without those in `needed`."""
    return frozenset(name for name in names if name.rpartition(".")[0] not in used).difference(needed)


def without_unused(
    first: Probe, names: Sequence[str], probe: Callable[[list[str]], Probe], needed: Collection[str] = ()
) -> Probe:
    """Probes again without the parameters of modules that were not called; `first` if that does not work.

    Parameters of a module that was not called may still be used by the module around it.

    Args:
        needed: Parameters that count as used.
    """
    idle = idle_parameters(names, first.used_outside.union(first.visits), needed)
    if not idle:
        return first
    try:
        return replace(probe([name for name in names if name not in idle]), unused=idle)
    except UnsupportedModelError:
        return first


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
    token_ids = example_token_ids(model)
    kv = SequenceKV(pool, list(range(num_blocks(len(token_ids)))))
    batch = PackedBatch.of([PackedSequence(kv, past=0, token_ids=token_ids, num_outputs=1)])
    run = partial(forward_packed, model, attention, batch)
    seen = observe(model, run, names=names, input_ids=batch.input_ids, on_what="on a packed row of sequences")
    shapes = {
        layer_idx: KVShape(*keys.shape[1:], *values.shape[1:])
        for layer_idx, (keys, values) in sorted(pool.written.items())
    }
    if not shapes:
        raise UnsupportedModelError(f"{type(model).__name__} keeps no keys and values in a KV cache")
    dtype = next(iter(pool.written.values()))[0].dtype
    return Probe.of(seen, KVLayout(shapes, dtype))


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
    alive = Alive()
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
                seen = observe(model, partial(model, **shapes), names=(), input_ids=None, on_what=on_what)
                return Probe.of(seen, KVLayout({}, model.dtype))
        except UnsupportedModelError as error:
            logger.debug("%s does not run on shapes alone: %s", type(model).__name__, error)
    names, input_ids = list(model.state_dict()), inputs.get("input_ids")
    seen = observe(model, partial(model, **inputs), names=names, input_ids=input_ids, on_what=on_what)
    return Probe.of(seen, KVLayout({}, model.dtype))
