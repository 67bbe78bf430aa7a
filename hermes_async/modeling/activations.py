"""How much memory activations take at most, from the shapes of the model alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hermes_async.modeling.attention import QUERY_TOKENS, PackedAttention
from hermes_async.modeling.bfloat16_weight import bfloat16_shapes
from hermes_async.modeling.pooling import DENSE
from hermes_async.modeling.probe import Probe
from hermes_async.modeling.row_tables import is_input_embedding, most_rows, row_tables, token_tables
from hermes_async.modeling.skeleton import Skeleton, layers_of
from hermes_async.modeling.transformers_api import plain_attention, supports_packed_attention
from hermes_async.modeling.turns import MOST_TOKENS, TurnLayout
from hermes_async.quantization.bfloat16_products import LINEAR, Bfloat16Products
from hermes_async.storage.rows import RowReader

TEXT_TOKENS = 64
"""How long texts are where a model sets no limit. One that does not generate has room for one of them at least."""

QUESTION_TOKENS = 64
"""There is always room for a prompt with an image like the probe's, and so many tokens more."""

_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")


@dataclass(frozen=True, slots=True)
class SweepSize:
    """What a sweep of a model that generates computes.

    Attributes:
        packed_tokens, packed_outputs: Tokens of the packed row, and positions of it whose logits are wanted.
        turn_tokens, turn_outputs: The same of all turns.
        num_values: Of the images of each prompt that has some; see `num_values` in `inputs.py`.
    """

    packed_tokens: int = 0
    packed_outputs: int = 0
    turn_tokens: int = 0
    turn_outputs: int = 0
    num_values: tuple[int, ...] = ()


class WorkspaceBounds:
    """Upper bounds of the memory that a model's activations take, in bytes.

    Layers count as if the outputs of all matrices of the widest layer were alive at once, with four more as wide as the
    widest matrix (activation functions and rotary embeddings compute in steps), and one of that width in float32, as in
    norms. A token passes several experts; the inputs and outputs of each count in the model's dtype and again in
    float32, in which they are weighted. Over two dozen architectures this was 1.1 to 2.8 times what was measured.
    """

    def __init__(
        self, skeleton: Skeleton, probe: Probe, attention: PackedAttention, products: Bfloat16Products = LINEAR
    ) -> None:
        model, config = skeleton.model, skeleton.model.config.get_text_config()
        self._generates, self._probe, self._attention = skeleton.generates, probe, attention
        self._context_length = skeleton.context_length
        self._row_tables = row_tables(skeleton, probe)
        # Rows of all layers, as Gemma 3n has them: as they are looked up, and joined with something else.
        rows_of_layers = (one for one in token_tables(skeleton, probe) if not is_input_embedding(skeleton, one))
        shapes = [(table.spec if table.encoded is None else table.encoded).shape for table in rows_of_layers]
        self._rows_token_bytes = 2 * sum(columns for _, columns in shapes) * skeleton.dtype.itemsize
        self._scratch_bytes = max(
            (
                one.scratch_bytes + (one.nbytes if name in probe.used_whole and not one.whole else 0)
                for name, one in skeleton.encoded.items()
            ),
            default=0,
        )
        self._products, self._shapes = products, bfloat16_shapes(model)
        self._itemsize = skeleton.dtype.itemsize
        self._num_layers = len(layers_of(model))
        self._hidden_size = int(getattr(config, "hidden_size", 0))
        layers, num_experts = layers_of(model) or [model], experts_per_token(config)
        self._layer_token_bytes = max(_layer_token_bytes(layer, self._itemsize, num_experts) for layer in layers)
        self._num_heads = _num_heads(model)
        if skeleton.generates:
            head: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
            self._vocab_size = _out_features(head)
            self._packs = supports_packed_attention(type(model))
            self._num_query_heads = int(getattr(config, "num_attention_heads", 1) or 1)
            num_kv_heads = int(getattr(config, "num_key_value_heads", None) or self._num_query_heads)
            self._heads_per_kv_head = max(1, self._num_query_heads // num_kv_heads)
        self._turn_bytes = probe.bytes_of_turn * 5 // 4
        copies = 1 + 4 // self._itemsize if probe.keeps_scores else 1  # in float32
        self._past_token_bytes = copies * probe.bytes_per_past_token * 5 // 4
        self._outer_token_bytes = 2 * _outer_features(model) * self._itemsize
        self._plain_is_eager = plain_attention(model) == "eager"
        self._plain_score_bytes = self._bytes_of_plain_score(model)
        # A convolution of images; oneDNN makes copies of its weights.
        self._image_token_bytes = probe.bytes_per_image // max(1, probe.tokens_per_image)
        convolutions = (module.weight for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d)))
        self._convolution_bytes = 2 * max((weight.numel() * self._itemsize for weight in convolutions), default=0)

    def sweep(self, tokens: int, outputs: int, kv_bytes: int) -> int:
        """Of a sweep of `tokens`, with the embedding rows that it may have to read.

        A sweep of a model that generates is one packed row, or a call for each sequence. Of another model it is as many
        images as the tokens make, or texts as long as the model takes.
        """
        if self._probe.packs:
            return self.calls(SweepSize(packed_tokens=tokens, packed_outputs=outputs), kv_bytes=kv_bytes)
        if self._generates:
            return self.calls(SweepSize(turn_tokens=tokens, turn_outputs=outputs), kv_bytes=kv_bytes)
        longest = self._probe.tokens_per_image or self._context_length or TEXT_TOKENS
        activations = self.plain(sequences=-(-tokens // longest), tokens=min(tokens, longest))
        return activations + self.embedding_rows(tokens=tokens)

    def calls(self, size: SweepSize, *, kv_bytes: int) -> int:
        """Of a packed row and turns that share a sweep, with the embedding rows that it may have to read."""
        total = self.embedding_rows(tokens=size.packed_tokens + size.turn_tokens)
        if size.packed_tokens:
            total += self.packed(tokens=size.packed_tokens, outputs=size.packed_outputs, kv_bytes=kv_bytes)
        if size.turn_tokens:
            assert self._probe.turns is not None
            layout = self._probe.turns
            total += self.turns(layout, tokens=size.turn_tokens, outputs=size.turn_outputs, kv_bytes=kv_bytes)
        return total + sum(map(self.images, size.num_values))

    def images(self, num_values: int) -> int:
        """Of what is computed from the images of one prompt, in addition to its tokens.

        What was alive in the probe's call, with a quarter more, and the copies that oneDNN makes of a convolution's
        weights. It grows with the numbers of the input; where attention is eager, with their square.
        """
        probed = self._probe.images
        assert probed is not None
        nbytes = probed.nbytes * 5 // 4
        for _ in range(2 if self._plain_is_eager else 1):
            nbytes = max(nbytes, -(-nbytes * num_values // probed.num_values))
        return nbytes + self._convolution_bytes + self._most_scratch_bytes

    def prompt_with_image(self, num_tokens: int, *, kv_bytes: int) -> int:
        """Of a sweep with one prompt: the probe's image and a question, or images that fill `num_tokens`."""
        probed = self._probe.images
        assert probed is not None
        values = max(probed.num_values, -(-probed.num_values * num_tokens // probed.num_tokens))
        num_tokens = max(num_tokens, probed.num_tokens + QUESTION_TOKENS)
        return self.calls(SweepSize(turn_tokens=num_tokens, turn_outputs=1, num_values=(values,)), kv_bytes=kv_bytes)

    def packed(self, *, tokens: int, outputs: int, kv_bytes: int) -> int:
        """Of a packed row.

        Beside the layers, and the rows of all layers if there is a table of them, logits count in the model's dtype and
        once more joined, and one row of them, from which a token is sampled, four times in float32.

        Args:
            outputs: Positions whose logits are wanted.
            kv_bytes: Of the KV caches of all sequences.
        """
        total = self._scratch_of(tokens) + tokens * (self._layer_token_bytes + self._rows_token_bytes)
        total += self._vocab_size * (outputs * 2 * self._itemsize + 16)
        kv, context_length = self._probe.kv, self._context_length
        kv_tokens = kv_bytes // kv.bytes_per_token
        if context_length is not None:
            kv_tokens = min(kv_tokens, outputs * context_length)
        if not self._packs:
            # All keys and values of a layer side by side, a mask over them, and scores and weights in float32.
            scores = tokens * kv_tokens * (self._num_query_heads * 12 + 2 * self._itemsize)
            return total + scores + kv_tokens * kv.bytes_per_token // len(kv.layers)
        # A mask, which torch turns into floats, or scores, and the keys and values, of one sequence at a time.
        longest = min(kv_tokens, context_length or kv_tokens)
        if self._attention.eager:
            score_bytes = self._num_query_heads * (8 + self._itemsize)
        else:
            fewest_kv_heads = min(shape.num_heads for shape in kv.layers.values())
            score_bytes = max(1, self._num_query_heads // fewest_kv_heads) * (1 + self._itemsize)
        scores = min(tokens, QUERY_TOKENS) * longest * score_bytes
        return total + scores + longest * kv.bytes_per_token // len(kv.layers)

    def turns(self, layout: TurnLayout, *, tokens: int, outputs: int, kv_bytes: int) -> int:
        """Of turns with `tokens` in all, those of an encoder's input included.

        While one computes a stage, the others rest with what they have so far.

        Beside what `packed` counts: what was alive in the probe's call, once, because one call computes at a time;
        the keys and values that the tokens add, also those outside of a window; and of the longest sequence, a copy of
        the layer with most of them, once more for each head that shares them, or what the layer computes from them.
        """
        token_bytes = max(self._layer_token_bytes, self._turn_bytes // self._probe.tokens_of_turn)
        token_bytes += layout.bytes_per_token + layout.input_token_bytes
        total = (
            self._scratch_of(tokens)
            + self._turn_bytes
            + tokens * token_bytes
            + self._vocab_size * (outputs * 2 * self._itemsize + 16)
        )
        longest = tokens + min(layout.kept_within(kv_bytes), self._context_length or MOST_TOKENS)
        past_token_bytes = max((1 + self._heads_per_kv_head) * layout.most_layer_bytes, self._past_token_bytes)
        return total + longest * (tokens * self._plain_score_bytes + past_token_bytes)

    def plain(self, *, sequences: int, tokens: int) -> int:
        """Of a plain forward pass over `sequences` texts or images of `tokens` each.

        Beside the layers, the outputs of the linear layers outside of them count, such as a head, for every token; and
        a mask over all pairs of tokens of a sequence, or their scores where attention is eager. Images may take more,
        above all where they are convolved: twice what was alive of one image in the probe, or as much and the copies
        that oneDNN makes of a convolution's weights.
        """
        token_bytes = self._layer_token_bytes + self._rows_token_bytes + self._outer_token_bytes
        alive = sequences * tokens * self._image_token_bytes
        copied = self._convolution_bytes if self._image_token_bytes else 0
        of_layers = sequences * tokens * (token_bytes + tokens * self._plain_score_bytes)
        scratch = self._most_scratch_bytes if alive else self._scratch_of(sequences * tokens)
        return scratch + max(of_layers, 2 * alive, alive + copied)

    def recorded(self, *, sequences: int, tokens: int, hidden_states: bool, attentions: bool) -> int:
        """Of what a plain forward pass keeps if it is asked for every layer's hidden states, or attention weights."""
        numel = 0
        if hidden_states:
            numel += (self._num_layers + 1) * sequences * tokens * self._hidden_size
        if attentions:
            numel += (self._num_layers + 1) * sequences * tokens * tokens * self._num_heads
        return numel * self._itemsize

    def embedding_rows(self, *, tokens: int) -> int:
        """Of rows of embeddings, as they are read and as they are computed with; 0 where none can be read."""
        num_rows = most_rows(self._row_tables, tokens)
        return sum(
            RowReader.buffer_bytes(table.spec, num_rows) + num_rows * table.row_bytes for table in self._row_tables
        )

    def _scratch_of(self, tokens: int) -> int:
        """Where blocks of weights are dequantized, and converted to float32, while so many tokens are computed."""
        return self._scratch_bytes + self._products.scratch_bytes(tokens, self._shapes)

    @property
    def _most_scratch_bytes(self) -> int:
        """For any number of tokens, as images have it."""
        return self._scratch_of(sys.maxsize)

    def _bytes_of_plain_score(self, model: PreTrainedModel) -> int:
        """What a pair of tokens takes in transformers' own attention."""
        if self._plain_is_eager or self._probe.keeps_scores:
            score_bytes = self._num_heads * (2 * self._itemsize + 4)
        else:
            score_bytes = 1 + 2 * self._itemsize
        if getattr(model.config, "relative_attention_num_buckets", None) is not None:
            score_bytes += 3 * self._num_heads * self._itemsize  # a bias for each head in all layers, and its mask
        return score_bytes


def _outer_features(model: PreTrainedModel) -> int:
    """The outputs of all linear layers outside of the transformer layers, such as a head."""
    inside = {module for layer in layers_of(model) for module in layer.modules()}
    return sum(
        _out_features(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module not in inside
        and not name.startswith(f"{DENSE}.")  # those compute one vector of a text
    )


def _num_heads(model: PreTrainedModel) -> int:
    configs = [model.config, getattr(model.config, "text_config", None), getattr(model.config, "vision_config", None)]
    return max(_counts(configs, ("num_attention_heads", "n_heads", "n_head")), default=1)


def experts_per_token(config: PreTrainedConfig) -> int:
    """How many experts of a layer a token passes; 0 where there are none."""
    return max(_counts([config], _EXPERTS_PER_TOKEN), default=0)


def _counts(configs: Sequence[PreTrainedConfig | None], names: Sequence[str]) -> Iterator[int]:
    """What configs have under any of these names; some name a count for each stage or layer."""
    for value in (getattr(config, name, None) for config in configs for name in names):
        yield from (
            count for count in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(count, int)
        )


def _layer_token_bytes(layer: nn.Module, itemsize: int, experts_per_token: int) -> int:
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
