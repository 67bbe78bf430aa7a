"""Checks, before a model is run, that packed and chunked sequences give the same logits as each sequence alone.

transformers has hundreds of architectures. Any of them may do something between its layers that is silently wrong in a
packed row: its own masks, positions counted from the start of the row, states that are passed from token to token. So
the model's own code runs twice with the same random weights in float32: as transformers runs it, one sequence at a time
and without a cache, and as the engine runs it. The copy has heads of the model's own size, but few of them, few layers,
a narrow MLP and a small vocabulary. All its matrices are views of one block of noise.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hermes_async.errors import UnsupportedModelError
from hermes_async.foreign_errors import reason_of
from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.kv_cache import KVLayout, KVPool, SequenceKV, num_blocks
from hermes_async.modeling.module_tensors import ones_for_numbers, replaced_tensors
from hermes_async.modeling.packed import PackedBatch, PackedSequence, forward_packed
from hermes_async.modeling.probe import probe_model
from hermes_async.modeling.skeleton import build_model

logger = logging.getLogger(__name__)

_VOCAB_SIZE = 64
_WINDOW = 3
_WINDOW_NAMES = (
    *("sliding_window", "window_size", "attention_window_size", "attention_chunk_size"),
    *("keep_window_size", "index_topk"),  # so many keys are chosen by their scores
)
_INTERMEDIATE_SIZE = 256
_INTERMEDIATE_NAMES = (
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("ffn_dim", "ffn_hidden_size", "n_inner"),
)
_NUM_EXPERTS = 16
_LAYERS_NAMES = ("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers")
_NUM_POSITIONS = 16
_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOLERANCE = 1e-3
_MAX_NOISE_BYTES = 1 << 30
# Two sequences, and the tokens of each that a sweep computes: prompts in chunks, beside chunks and decodes.
_SEQUENCES = ((5, 9, 2, 33, 17, 40, 8, 21, 60), (11, 3, 50, 7))
_SWEEPS = (((0, 4),), ((0, 3), (1, 2)), ((1, 1), (0, 1)), ((0, 1), (1, 1)))


def check_packing(config: PreTrainedConfig, attention: PackedAttention) -> None:
    """Compares packed with separate sequences on a small copy of the model of `config`.

    Raises:
        UnsupportedModelError: They differ, so the engine would give other tokens than transformers; or no copy of the
            model could be run.
    """
    reason: Exception | None = None
    for small in small_copies(config):
        try:
            expected = _separately(copy.deepcopy(small))
        except Exception as error:  # the small copy does not run: try one with fewer changes
            logger.debug("self-check of %s: %s", config.model_type, error)
            reason = error
            continue
        actual = _packed(copy.deepcopy(small), attention)
        scale = max(float(torch.cat(expected).abs().max()), 1e-6)
        for idx, (one, other) in enumerate(zip(expected, actual, strict=True)):
            difference = float((one - other).abs().max()) / scale
            if not difference <= TOLERANCE:
                raise UnsupportedModelError(
                    f"{config.model_type}: sequence {idx + 1} of a packed row gets other logits than alone (by "
                    f"{difference:.1%} of the largest); this architecture cannot share sweeps"
                )
        return
    assert reason is not None  # the last of the configurations is the model's own
    raise not_checked(config, reason) from reason


def not_checked(config: PreTrainedConfig, reason: Exception) -> UnsupportedModelError:
    """The error of a model of which no copy could be run."""
    return UnsupportedModelError(
        f"{config.model_type} could not be checked against transformers ({reason_of(reason)}), so its tokens might be "
        'wrong; EngineConfig(self_check="skip") runs it unchecked'
    )


def small_copies(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """Smaller configurations of the same architecture, the smallest first, and at last `config` itself."""
    for narrow in (True, False):  # made one after another, as the first is enough for most models
        small = _shrunk(config, narrow=narrow)
        if small is not None:
            yield small
    yield config


def _shrunk(config: PreTrainedConfig, *, narrow: bool) -> PreTrainedConfig | None:
    """A copy with few layers, one of each kind at least, a small vocabulary and short windows; None if that fails.

    Args:
        narrow: Also reduce the heads and the experts.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    try:
        num_layers = text.num_hidden_layers
        kinds = {name: value for name, value in _lists(text) if len(value) == num_layers}
        needed = max((value.index(kind) + 1 for value in kinds.values() for kind in value), default=0)
        text.num_hidden_layers = min(num_layers, max(2, needed))
        for name, value in kinds.items():
            setattr(text, name, value[: text.num_hidden_layers])
        text.vocab_size = _VOCAB_SIZE
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(text, name, None) is not None:
                setattr(text, name, _VOCAB_SIZE - 1)
        for name in _WINDOW_NAMES:
            if isinstance(getattr(text, name, None), int):
                setattr(text, name, _WINDOW)
        _at_most(text, ("vocab_size_per_layer_input",), _VOCAB_SIZE)
        _at_most(text, _INTERMEDIATE_NAMES, _INTERMEDIATE_SIZE)
        if small.is_encoder_decoder:
            _at_most(text, _LAYERS_NAMES, 2)
            _at_most(text, ("max_source_positions",), _NUM_POSITIONS)
        if narrow:
            _at_most(text, _EXPERTS_NAMES, _NUM_EXPERTS)
            _take_heads(text)
    except Exception as error:
        logger.debug("self-check of %s cannot shrink it: %s", config.model_type, error)
        return None
    return small


def _lists(text: PreTrainedConfig) -> Iterator[tuple[str, list[Any]]]:
    """The attributes that are lists, such as the kind of each layer."""
    return ((name, value) for name, value in list(vars(text).items()) if isinstance(value, list))


def _at_most(text: PreTrainedConfig, names: Iterable[str], most: int) -> None:
    values = text.to_dict()  # as attributes, transformers refuses values that differ between layers
    for name in names:
        if isinstance(values.get(name), int):
            setattr(text, name, min(values[name], most))


def _take_heads(text: PreTrainedConfig) -> None:
    """Reduces the heads to four, in groups where the model has groups."""
    values = text.to_dict()
    num_heads = text.num_attention_heads
    num_groups = values.get("num_key_value_heads") or num_heads
    head_dim = values.get("head_dim") or text.hidden_size // num_heads
    group_size = min(2, num_heads // num_groups)
    few_groups = min(4 // group_size, num_groups)
    few_heads = few_groups * group_size
    if values.get("num_key_value_heads"):
        text.num_key_value_heads = few_groups
    text.num_attention_heads = few_heads
    for name in ("encoder_attention_heads", "decoder_attention_heads"):
        if isinstance(values.get(name), int):
            setattr(text, name, few_heads)
    text.hidden_size = few_heads * head_dim


def _separately(config: PreTrainedConfig) -> list[torch.Tensor]:
    """Each sequence's logits [tokens, vocab] as transformers computes them."""
    model = build_model(config, torch.float32, "eager", where="self-check")
    with noise(model), torch.inference_mode():
        return [model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0] for sequence in _SEQUENCES]


def _packed(config: PreTrainedConfig, attention: PackedAttention) -> list[torch.Tensor]:
    """Each sequence's logits [tokens, vocab] as the engine computes them."""
    model = build_model(config, torch.float32, attention.name, where="self-check")
    names = list(model.state_dict())
    layout: KVLayout = probe_model(model, attention, names).kv
    pool = KVPool(layout, sum(layout.nbytes(len(tokens)) for tokens in _SEQUENCES))
    sequences = [SequenceKV(pool, pool.allocate(num_blocks(len(tokens)))) for tokens in _SEQUENCES]
    logits: list[list[torch.Tensor]] = [[] for _ in _SEQUENCES]
    with noise(model):
        for sweep in _SWEEPS:
            packed = []
            for idx, count in sweep:
                kv = sequences[idx]
                token_ids = _SEQUENCES[idx][kv.length : kv.length + count]
                packed.append(PackedSequence(kv, kv.length, token_ids, num_outputs=count))
            batch = PackedBatch.of(packed)
            rows = forward_packed(model, attention, batch)
            for (idx, count), segment in zip(sweep, batch.segments, strict=True):
                logits[idx].append(rows[segment.start : segment.end])
                sequences[idx].length += count
    pool.close()
    return [torch.cat(parts) for parts in logits]


@contextmanager
def noise(model: PreTrainedModel) -> Iterator[None]:
    """Within the block every matrix is a view of one block of noise, from its own offset; norms are near one."""
    weights = dict(_weights(model))
    numbers = ones_for_numbers(model.state_dict(keep_vars=True))
    largest = max(tensor.numel() for tensor in weights.values())
    if largest * 4 > _MAX_NOISE_BYTES:
        raise MemoryError(f"the largest matrix has {largest} elements")
    generator = torch.Generator().manual_seed(0)
    places = 997
    # Scaled by the width, so that attention is neither flat nor saturated, and a wrong mask is noticed.
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    width = embedding.embedding_dim
    period = torch.randn(1 << 16, generator=generator).mul_(0.8 / width**0.5)
    block = period.repeat(-(-(largest + places) // period.numel()))
    values: dict[str, torch.Tensor] = {}
    for idx, (name, tensor) in enumerate(weights.items()):
        start = idx * 61 % places
        value = block[start : start + tensor.numel()].view(tensor.shape)
        values[name] = 1 + value if tensor.dim() <= 1 and not name.endswith("bias") else value
    with replaced_tensors(model, values | numbers):
        yield


def _weights(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    return ((name, tensor) for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point())
