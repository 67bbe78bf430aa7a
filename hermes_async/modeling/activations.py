"""How much memory a sweep's activations take, from the shapes of the model alone."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hermes_async.modeling.probe import Probe
from hermes_async.modeling.skeleton import Skeleton, supports_packed_attention


def workspace_bytes(skeleton: Skeleton, seen: Probe) -> Callable[[int, int, int], int]:
    """Returns a bound by tokens, outputs (positions whose logits are wanted) and KV bytes.

    Counted as if inputs and outputs of all matrices of the widest layer lived at once, in float32 beside the model's
    dtype (norms and softmax compute in float32), and logits in the model's dtype, joined, and one row of them, which
    is sampled from, in float32 four times.
    """
    model, config = skeleton.model, skeleton.model.config.get_text_config()
    head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    widest = max(
        (_features(layer) for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module),
        default=_features(model),
    )
    per_token = widest * (skeleton.dtype.itemsize + 4)
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
            # A mask, which sdpa turns into floats, and the keys and values of one sequence at a time.
            longest = min(kv_tokens, skeleton.context_length or kv_tokens)
            return total + tokens * longest * groups * (1 + itemsize) + longest * kv_per_token // num_layers
        # All keys and values of a layer side by side, a mask over them, and scores and weights in float32.
        scores = tokens * kv_tokens * (num_heads * 12 + 2 * itemsize)
        return total + scores + kv_tokens * kv_per_token // num_layers

    return bound


def _features(module: nn.Module) -> int:
    """Inputs and outputs of the matrices of `module`, added up."""
    total = 0
    for submodule in module.modules():
        for parameter in submodule.parameters(recurse=False):
            if parameter.dim() == 2 and not isinstance(submodule, nn.Embedding):
                total += sum(parameter.shape)
            elif parameter.dim() > 2:
                total += parameter.shape[-1] + parameter.shape[-2]
    return max(total, 1)


def _out_features(head: nn.Module) -> int:
    features = getattr(head, "out_features", None)
    if isinstance(features, int):
        return features
    return max((max(parameter.shape) for parameter in head.parameters()), default=1)
