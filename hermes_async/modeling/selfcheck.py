"""Shows, before a model is run, that packed and chunked sequences give what each gives alone.

transformers has hundreds of architectures, and any of them may do something between its layers that a packed row
would get wrong in silence: masks of its own, positions counted from the row's start, states that run on from one
token to the next. So the model's own code is run twice over the same random weights in float32: as transformers runs
it, one sequence at a time and without a cache; and as the engine does. The copy has heads of the model's own size, but
few of them, few layers, a narrow MLP and a small vocabulary; all its matrices are views of one block of noise.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hermes_async.errors import UnsupportedModelError
from hermes_async.modeling.attention import PackedAttention
from hermes_async.modeling.kv_cache import KVLayout, KVPool, Segment, SequenceKV, num_blocks
from hermes_async.modeling.module_tensors import replaced_tensors
from hermes_async.modeling.packed import PackedBatch, forward_packed
from hermes_async.modeling.probe import probe_model
from hermes_async.modeling.skeleton import build_model

logger = logging.getLogger(__name__)

_VOCAB_SIZE = 64
_WINDOW = 3
_WINDOW_NAMES = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size")
_INTERMEDIATE_SIZE = 256
_INTERMEDIATE_NAMES = (
    *("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("ffn_dim", "ffn_hidden_size", "n_inner"),
)
_NUM_EXPERTS = 16
_EXPERTS_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOLERANCE = 1e-3
_MAX_NOISE_BYTES = 1 << 30
# Two sequences; what each sweep takes of them: prompts in chunks, beside each other's chunks and decodes.
_SEQUENCES = ((5, 9, 2, 33, 17, 40, 8, 21, 60), (11, 3, 50, 7))
_SWEEPS = (((0, 4),), ((0, 3), (1, 2)), ((1, 1), (0, 1)), ((0, 1), (1, 1)))


def check_packing(config: PreTrainedConfig, attention: PackedAttention) -> None:
    """Compares packed with separate sequences on a small copy of the model of `config`.

    Raises:
        UnsupportedModelError: They differ, so the engine would write other tokens than transformers; or no copy of the
            model could be compared.
    """
    shrunk = (_shrunk(config, narrow=narrow) for narrow in (True, False))  # one at a time: the first is mostly enough
    reason: Exception | None = None
    for small in chain(shrunk, [config]):
        if small is None:
            continue
        try:
            expected = _separately(copy.deepcopy(small))
        except Exception as error:  # the copy's fault, not the model's: try it less changed
            logger.debug("self-check of %s: %s", config.model_type, error)
            reason = error
            continue
        actual = _packed(copy.deepcopy(small), attention)
        scale = max(float(torch.cat(expected).abs().max()), 1e-6)
        for idx, (one, other) in enumerate(zip(expected, actual, strict=True)):
            difference = float((one - other).abs().max()) / scale
            if not difference <= _TOLERANCE:
                raise UnsupportedModelError(
                    f"{config.model_type}: sequence {idx + 1} of a packed row gets other logits than alone (by "
                    f"{difference:.1%} of the largest); this architecture cannot share sweeps"
                )
        return
    shown = f"{type(reason).__name__}: {reason}".strip().splitlines()[0]
    raise UnsupportedModelError(
        f"{config.model_type} could not be checked against transformers ({shown}), so its tokens might be wrong; "
        'EngineConfig(self_check="skip") runs it unchecked'
    ) from reason


def _shrunk(config: PreTrainedConfig, *, narrow: bool) -> PreTrainedConfig | None:
    """A copy with few layers, each kind among them, a small vocabulary and short windows; None if that fails.

    Args:
        narrow: With few heads and few experts too.
    """
    small = copy.deepcopy(config)
    text = small.get_text_config()
    try:
        kinds = list(getattr(text, "layer_types", None) or ())
        num_layers = text.num_hidden_layers
        needed = max((kinds.index(kind) + 1 for kind in set(kinds)), default=0)
        text.num_hidden_layers = min(num_layers, max(2, needed))
        if kinds:
            text.layer_types = kinds[: text.num_hidden_layers]
        text.vocab_size = _VOCAB_SIZE
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(text, name, None) is not None:
                setattr(text, name, _VOCAB_SIZE - 1)
        for name in _WINDOW_NAMES:
            if isinstance(getattr(text, name, None), int):
                setattr(text, name, _WINDOW)
        _at_most(text, ("vocab_size_per_layer_input",), _VOCAB_SIZE)
        _at_most(text, _INTERMEDIATE_NAMES, _INTERMEDIATE_SIZE)
        if narrow:
            _at_most(text, _EXPERTS_NAMES, _NUM_EXPERTS)
            _take_heads(text)
    except Exception as error:
        logger.debug("self-check of %s cannot shrink it: %s", config.model_type, error)
        return None
    return small


def _at_most(text: PreTrainedConfig, names: Iterable[str], most: int) -> None:
    values = text.to_dict()  # by attribute, transformers refuses to give what differs between layers
    for name in names:
        if isinstance(values.get(name), int):
            setattr(text, name, min(values[name], most))


def _take_heads(text: PreTrainedConfig) -> None:
    """Four heads, in groups where the model has groups."""
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
    text.hidden_size = few_heads * head_dim


def _separately(config: PreTrainedConfig) -> list[torch.Tensor]:
    """Each sequence's logits [tokens, vocab] as transformers computes them."""
    model = build_model(config, torch.float32, None, where="self-check")
    with _noise(model), torch.inference_mode():
        return [model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0] for sequence in _SEQUENCES]


def _packed(config: PreTrainedConfig, attention: PackedAttention) -> list[torch.Tensor]:
    """The same, as the engine computes them."""
    model = build_model(config, torch.float32, attention.name, where="self-check")
    names = list(model.state_dict())
    layout: KVLayout = probe_model(model, attention, names, _VOCAB_SIZE).kv
    pool = KVPool(layout, sum(layout.nbytes(len(tokens)) for tokens in _SEQUENCES))
    sequences = [SequenceKV(pool, pool.allocate(num_blocks(len(tokens)))) for tokens in _SEQUENCES]
    logits: list[list[torch.Tensor]] = [[] for _ in _SEQUENCES]
    with _noise(model):
        for sweep in _SWEEPS:
            token_ids: list[int] = []
            position_ids: list[int] = []
            segments = []
            for idx, count in sweep:
                kv = sequences[idx]
                segments.append(Segment(len(token_ids), len(token_ids) + count, kv, kv.length))
                token_ids += _SEQUENCES[idx][kv.length : kv.length + count]
                position_ids += range(kv.length, kv.length + count)
            rows = forward_packed(
                model,
                attention,
                PackedBatch(
                    input_ids=torch.tensor([token_ids]),
                    position_ids=torch.tensor([position_ids]),
                    segments=segments,
                    logits_positions=torch.arange(len(token_ids)),
                ),
            )
            for (idx, count), segment in zip(sweep, segments, strict=True):
                logits[idx].append(rows[segment.start : segment.end])
                sequences[idx].length += count
    pool.close()
    return [torch.cat(parts) for parts in logits]


@contextmanager
def _noise(model: PreTrainedModel) -> Iterator[None]:
    """Every matrix a view of one block of noise, each at a place of its own; norms near one, biases near zero."""
    weights = dict(_weights(model))
    largest = max(tensor.numel() for tensor in weights.values())
    if largest * 4 > _MAX_NOISE_BYTES:
        raise MemoryError(f"the largest matrix has {largest} elements")
    generator = torch.Generator().manual_seed(0)
    places = 997
    # By the width, so that attention is neither flat nor saturated, and a wrong mask shows.
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
    with replaced_tensors(model, values):
        yield


def _weights(model: nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    return ((name, tensor) for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_floating_point())
