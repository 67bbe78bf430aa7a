"""How much memory a sweep's activations take, from the shapes of the model alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hermes_async.modeling.attention import QUERY_TOKENS, PackedAttention
from hermes_async.modeling.pooling import DENSE
from hermes_async.modeling.probe import Probe
from hermes_async.modeling.skeleton import Skeleton, layers_of
from hermes_async.modeling.transformers_api import plain_attention, supports_packed_attention

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


def workspace_bytes(skeleton: Skeleton, seen: Probe, attention: PackedAttention) -> Callable[[int, int, int], int]:
    """Returns a bound by tokens, outputs (positions whose logits are wanted) and KV bytes.

    Counted as if the outputs of all matrices of the widest layer lived at once, with four more as wide as the widest
    (activation functions and rotary embeddings compute in steps), and one of that width in float32, as norms do. A
    token passes several experts, and what goes into each and comes out of it lives in the model's dtype and once more
    in float32, as it is weighted. Over two dozen architectures that was 1.1 to 2.8 times what they took. Then logits in
    the model's dtype, joined, and one row of them, which is sampled from, in float32 four times.
    """
    model, config = skeleton.model, skeleton.model.config.get_text_config()
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    num_experts = _experts_per_token(config)
    per_token = max(_layer_bytes(layer, skeleton.dtype.itemsize, num_experts) for layer in layers_of(model) or [model])
    vocab_size = _out_features(head)
    itemsize = skeleton.dtype.itemsize
    num_heads = int(getattr(config, "num_attention_heads", 1))
    packed = supports_packed_attention(type(model))
    kv_per_token = seen.kv.bytes_per_token
    num_layers = len(seen.kv.layers)

    groups = max(1, num_heads // min(shape.num_heads for shape in seen.kv.layers.values()))

    def bound(tokens: int, outputs: int, kv_bytes: int) -> int:
        total = tokens * per_token + vocab_size * (outputs * 2 * itemsize + 16)
        kv_tokens = kv_bytes // kv_per_token
        if skeleton.context_length is not None:
            kv_tokens = min(kv_tokens, outputs * skeleton.context_length)
        if packed:
            # A mask, which sdpa turns into floats, or scores, and the keys and values, of one sequence at a time.
            longest = min(kv_tokens, skeleton.context_length or kv_tokens)
            per_score = num_heads * (8 + itemsize) if attention.eager else groups * (1 + itemsize)
            scores = min(tokens, QUERY_TOKENS) * longest * per_score
            return total + scores + longest * kv_per_token // num_layers
        # All keys and values of a layer side by side, a mask over them, and scores and weights in float32.
        scores = tokens * kv_tokens * (num_heads * 12 + 2 * itemsize)
        return total + scores + kv_tokens * kv_per_token // num_layers

    return bound


def forward_bytes(skeleton: Skeleton, seen: Probe) -> Callable[[int, int], int]:
    """Returns a bound for a plain forward pass by sequences (or images) and tokens of each.

    Layers count as for `workspace_bytes`; beside them the outputs of all that stands outside of layers, such as a head,
    for every token; and a mask over all pairs of tokens of a sequence, or their scores where attention is eager. Images
    may take more, above all where they are convolved: twice what was alive of one image when the model was looked at,
    or as much, and the copies that oneDNN makes of a convolution's weights.
    """
    model = skeleton.model
    itemsize = skeleton.dtype.itemsize
    layers = layers_of(model)
    inside = {module for layer in layers for module in layer.modules()}
    outside = [
        module
        for name, module in model.named_modules()
        if module not in inside and not name.startswith(f"{DENSE}.")  # those compute one vector of a text
    ]
    heads = sum(_out_features(module) for module in outside if isinstance(module, nn.Linear))
    num_experts = _experts_per_token(model.config.get_text_config())
    per_token = max(_layer_bytes(layer, itemsize, num_experts) for layer in layers or [model]) + 2 * heads * itemsize
    eager = plain_attention(model) == "eager"
    per_score = _num_heads(model) * (2 * itemsize + 4) if eager else 1 + 2 * itemsize
    if getattr(model.config, "relative_attention_num_buckets", None) is not None:
        per_score += 3 * _num_heads(model) * itemsize  # a bias for each head, kept for all layers, and the mask in it
    alive_per_token = seen.bytes_per_image // max(1, seen.tokens_per_image)
    convolutions = (module.weight for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d)))
    copied = 2 * max((weight.numel() * itemsize for weight in convolutions), default=0) if alive_per_token else 0

    def bound(sequences: int, tokens: int) -> int:
        alive = sequences * tokens * alive_per_token
        return max(sequences * (tokens * per_token + tokens * tokens * per_score), 2 * alive, alive + copied)

    return bound


def recorded_bytes(skeleton: Skeleton, sequences: int, tokens: int, *, hidden_states: bool, attentions: bool) -> int:
    """What a forward pass keeps if it is asked for every layer's hidden states, or attention weights."""
    if not hidden_states and not attentions:
        return 0
    config, itemsize = skeleton.model.config.get_text_config(), skeleton.dtype.itemsize
    num_layers = len(layers_of(skeleton.model)) + 1
    total = 0
    if hidden_states:
        total += num_layers * sequences * tokens * int(getattr(config, "hidden_size", 0)) * itemsize
    if attentions:
        total += num_layers * sequences * tokens * tokens * _num_heads(skeleton.model) * itemsize
    return total


def _num_heads(model: PreTrainedModel) -> int:
    configs = [model.config, getattr(model.config, "text_config", None), getattr(model.config, "vision_config", None)]
    return max(_counts(configs, ("num_attention_heads", "n_heads", "n_head")), default=1)


def _experts_per_token(config: PreTrainedConfig) -> int:
    """How many experts of a layer a token passes; 0 where there are none."""
    return max(_counts([config], _EXPERTS_PER_TOKEN), default=0)


def _counts(configs: Sequence[PreTrainedConfig | None], names: Sequence[str]) -> Iterator[int]:
    """What configs have under any of these names; some name a count for each stage or layer."""
    for value in (getattr(config, name, None) for config in configs for name in names):
        yield from (
            count for count in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(count, int)
        )


def _layer_bytes(layer: nn.Module, itemsize: int, experts_per_token: int) -> int:
    """What one token's activations take in a layer."""
    outputs, widest, of_expert = 0, 1, 0
    for module in layer.modules():
        for parameter in module.parameters(recurse=False):
            if experts_per_token and parameter.dim() == 3 and not isinstance(module, nn.Conv1d):
                of_expert += sum(parameter.shape[-2:])  # all experts' matrices, of one kind
            elif parameter.dim() >= 2 and not isinstance(module, nn.Embedding):
                # Some architectures keep a matrix the other way round.
                outputs += parameter.shape[0] if isinstance(module, nn.Linear) else max(parameter.shape[-2:])
                widest = max(widest, *parameter.shape[-2:])
    return (outputs + 4 * widest) * itemsize + 4 * widest + experts_per_token * of_expert * (itemsize + 4)


def _out_features(head: nn.Module) -> int:
    features = getattr(head, "out_features", None)
    if isinstance(features, int):
        return features
    return max((max(parameter.shape) for parameter in head.parameters()), default=1)
