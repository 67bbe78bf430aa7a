"""Calls of the model for one sequence each, with transformers' own cache: a request as a turn.

Where a packed row is not exact, each request of a sweep has a call of its own. Masks, positions, the kind of cache and
recurrent states are transformers' business: the calls are those that `generate` makes. All turns of a sweep share the
reads of its stages (`calls.py`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from greenlet import getcurrent
from torch import nn
from transformers import PreTrainedModel

from hermes_async.modeling.calls import EmbeddingRows, ModelCall
from hermes_async.modeling.generation_api import cache_of_output, new_generation_inputs, prepare_generation_inputs
from hermes_async.modeling.kernels import bounded_attention
from hermes_async.modeling.kv_cache import Settable
from hermes_async.modeling.module_state import ModuleState
from hermes_async.modeling.transformers_api import ENCODER_OUTPUTS
from hermes_async.modeling.turn_state import (
    StatePart,
    compact,
    crop,
    cut,
    is_croppable,
    is_cuttable,
    map_tensors,
    parts_of,
    record_past,
    state_bytes,
)

MOST_TOKENS = 1 << 24
"""More tokens than any model takes: where a cache does not grow, this stands for no limit."""

_TENSOR_BYTES = 4096
"""What the allocator may take for a tensor beyond its bytes."""


@dataclass(frozen=True, slots=True)
class TurnTraits:
    """What the self-check found out about an architecture's cache.

    Attributes:
        keeps: The model keeps a cache. Otherwise each call computes the whole sequence again.
        chunks: A call of several tokens may follow other calls; otherwise a prompt is one call.
        crops: The last tokens can be removed again, so drafts are possible.
        module_state: The attributes of modules that hold state of a sequence: the module's path, and the attribute.
    """

    keeps: bool = True
    chunks: bool = False
    crops: bool = False
    module_state: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class WindowedBytes:
    """The bytes of one token in some layers, and the most tokens that these layers keep; None for all."""

    bytes_per_token: int
    window: int | None


@dataclass(frozen=True, slots=True)
class TurnLayout:
    """The memory of one sequence's cache, measured by the probe.

    Attributes:
        sequence_bytes: What does not depend on the length, such as recurrent states.
        layers: What each further token adds, by window.
        most_layer_bytes: What a token adds in the layer where it adds most.
        input_token_bytes: What each token of an encoder's input adds; 0 where there is no encoder, or its input always
            has the same length.
    """

    traits: TurnTraits
    sequence_bytes: int
    layers: tuple[WindowedBytes, ...]
    most_layer_bytes: int
    input_token_bytes: int = 0

    @property
    def bytes_per_token(self) -> int:
        return sum(layer.bytes_per_token for layer in self.layers)

    def nbytes(self, capacity: int) -> int:
        """Bytes of a sequence of `capacity` tokens, without those of an encoder's input."""
        kept = (min(capacity, layer.window or capacity) * layer.bytes_per_token for layer in self.layers)
        return self.sequence_bytes + sum(kept)

    def tokens_within(self, nbytes: int) -> int:
        """The most tokens of a sequence in so many bytes; at most `MOST_TOKENS`."""
        return _tokens_within(self, nbytes)

    def kept_within(self, nbytes: int) -> int:
        """The most tokens that a layer keeps of a sequence in so many bytes; 0 where no layer keeps tokens."""
        windows = [layer.window for layer in self.layers]
        if None in windows:
            return self.tokens_within(nbytes)
        return max((window for window in windows if window is not None), default=0)

    @classmethod
    def measure(
        cls, traits: TurnTraits, shorter: TurnCache, longer: TurnCache, more_input: TurnCache | None = None
    ) -> TurnLayout:
        """Compares the states of two sequences of which one has more tokens.

        Args:
            more_input: As `shorter`, with a longer input of the encoder; None if there is none, or it cannot be longer.
        """
        assert shorter.stored is not None and longer.stored is not None
        before, after = _parts(shorter), _parts(longer)
        with_more_input = before if more_input is None else _parts(more_input)
        num_input = shorter.num_input
        num_more, num_more_input = longer.stored - shorter.stored, 1
        if more_input is not None:
            num_more_input = more_input.num_input - num_input
        fixed, growing, per_input = 0, Counter[int | None](), 0
        most_layer = 0
        for name, part in after.items():
            nbytes_before = before[name].nbytes if name in before else 0
            per_token = -(-max(0, part.nbytes - nbytes_before) // num_more)
            of_input = -(-max(0, with_more_input[name].nbytes - nbytes_before) // num_more_input)
            rest = part.nbytes - per_token * longer.stored - of_input * num_input
            fixed += max(0, rest) + part.num_tensors * _TENSOR_BYTES
            growing[part.window] += per_token
            per_input += of_input
            most_layer = max(most_layer, per_token, of_input)
        layers = tuple(WindowedBytes(nbytes, window) for window, nbytes in growing.items() if nbytes)
        return cls(traits, fixed, layers, most_layer, per_input)


@lru_cache(maxsize=256)  # a plan asks a thousand times, with few budgets
def _tokens_within(layout: TurnLayout, nbytes: int) -> int:
    return bisect_right(range(1, MOST_TOKENS + 1), nbytes, key=layout.nbytes)


@dataclass(eq=False, slots=True)
class TurnCache:
    """What one sequence carries from one call of the model to the next.

    Attributes:
        length: Tokens that are complete. A sweep computes those after them; `length` is advanced when it has succeeded.
        stored: Tokens that `state` holds; None while a call changes it, and after a call that did not come to its end.
            Drafted tokens that were refused are in it until the next call.
        state: The inputs that `generate` carries between calls, above all transformers' cache; empty before the first
            call.
        on_modules: The values of `ModuleState`; empty before the first call.
        modules_crop: Tokens may be removed in spite of `on_modules`.
        positions: The positions of all tokens so far, [..., tokens] int64; None where the model takes none.
        drafts: Drafted tokens may be removed from it.
        keeps: False for a model that keeps no cache: each call computes the whole sequence.
        is_shared: Another cache has the same tensors.
    """

    length: int = 0
    stored: int | None = 0
    state: dict[str, Any] = field(default_factory=dict)
    on_modules: list[Any] = field(default_factory=list)
    modules_crop: bool = False
    positions: torch.Tensor | None = None
    drafts: bool = False
    keeps: bool = True
    is_shared: bool = False

    @property
    def contents(self) -> tuple[dict[str, Any], list[Any]]:
        """All that has tensors, but for positions."""
        return self.state, self.on_modules

    def with_contents(self, contents: tuple[dict[str, Any], list[Any]]) -> TurnCache:
        """The same cache with other tensors."""
        return replace(self, state=contents[0], on_modules=contents[1], is_shared=False)

    def fork(self) -> TurnCache:
        """A cache of another sequence with the same tokens so far. Each is copied before a call changes it."""
        self.is_shared = True
        return replace(self)

    @property
    def holds_state(self) -> bool:
        """Whether the calls so far have left anything for the next one, beside what an encoder has made."""
        state = {name: value for name, value in self.state.items() if name != ENCODER_OUTPUTS}
        return state_bytes((state, self.on_modules)) > 0

    @property
    def num_input(self) -> int:
        """The length of what an encoder has made."""
        return self.state[ENCODER_OUTPUTS][0].shape[1] if ENCODER_OUTPUTS in self.state else 0

    def advance(self, length: int) -> None:
        """The first `length` tokens are complete."""
        self.length = length if self.keeps else 0

    def can_continue_from(self, length: int) -> bool:
        """Whether the next call may come after the first `length` tokens."""
        if self.stored is None:  # a call ended between two layers
            return not self.on_modules and length > 0 and is_cuttable(self.state, length)
        if length > self.stored:
            return False
        if length == self.stored:
            return True
        modules_crop = self.modules_crop or not self.on_modules
        return modules_crop and is_croppable(self.state, self.stored - length, recorded=self.drafts)

    def forget(self) -> None:
        """Begins again: nothing is computed."""
        self.length, self.stored, self.positions = 0, 0, None
        self.state, self.on_modules, self.is_shared = {}, [], False

    def copy(self) -> TurnCache:
        """A copy that shares no memory. Not for the event loop: this copies tensors."""
        with torch.inference_mode():
            return self.with_contents(map_tensors(self.contents, torch.Tensor.clone))

    def unshare(self) -> None:
        """Copies what another cache shares."""
        if self.is_shared:
            own = self.copy()
            self.state, self.on_modules, self.is_shared = own.state, own.on_modules, False

    def crop(self, length: int) -> None:
        """Removes the tokens after the first `length`. Needs `can_continue_from(length)`."""
        if self.stored is None:
            cut(self.state, length)
        elif self.stored and (self.stored > length or self.drafts):
            crop(self.state, self.stored - length)
        self.stored = length
        if self.positions is not None:
            self.positions = self.positions[..., :length]


@dataclass(frozen=True, slots=True)
class TurnInput:
    """What one call computes.

    Attributes:
        cache: The sequence's cache; the call changes it. `length` is not advanced.
        token_ids: The sequence up to the last token to compute.
        past: How many of them are computed already.
        num_outputs: Logits are wanted for so many of the last tokens.
        model_inputs: Further inputs of the first call, such as pixel values, or all inputs of an encoder.
    """

    cache: TurnCache
    token_ids: Sequence[int]
    past: int
    num_outputs: int
    model_inputs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class TurnCall(ModelCall):
    """A call for one sequence; made by `Turns.call`.

    Attributes:
        left: Set when the call has ended, whatever the way.
    """

    turns: Turns = field(kw_only=True)
    cache: TurnCache = field(kw_only=True)
    left: Settable | None = None

    def run(self) -> None:
        try:
            super().run()
        finally:
            if self.left is not None:
                self.left.set()

    def put_away(self) -> None:
        self.cache.on_modules = self.turns.module_state.exchange(self.turns.module_state.initial)

    def take_out(self) -> None:
        self.turns.module_state.exchange(self.cache.on_modules)


class Turns:
    """Runs a model in turns.

    Args:
        traits: Of the architecture.
    """

    def __init__(self, model: PreTrainedModel, traits: TurnTraits) -> None:
        self._model = model
        self.traits = traits
        self.module_state = ModuleState(model, traits.module_state)

    def new_cache(self, *, drafts: bool = False) -> TurnCache:
        """An empty cache. `drafts`: drafted tokens will be removed from it."""
        drafts = drafts and self.traits.crops
        return TurnCache(drafts=drafts, keeps=self.traits.keeps, modules_crop=self.module_state.crops)

    def call(
        self,
        turn: TurnInput,
        then: Callable[[torch.Tensor], Any],
        rows: Mapping[str, EmbeddingRows],
        left: Settable | None = None,
    ) -> TurnCall:
        """A call that computes `turn`.

        Args:
            then: Makes the result from the logits [num_outputs, vocab], on the inference thread.
            rows: Of the tables that are not loaded, by the tables' names.
            left: Set when the call has ended.
        """
        return TurnCall(lambda: then(self.forward(turn)), rows=rows, turns=self, cache=turn.cache, left=left)

    def forward(self, turn: TurnInput) -> torch.Tensor:
        """Runs the model as transformers' `generate` would. The caller has bound its weights, or hooks do meanwhile.

        Args:
            turn: Its cache must be able to continue from `past`.

        Returns:
            Logits [num_outputs, vocab] of the last tokens, in the model's dtype.
        """
        cache, past = turn.cache, turn.past
        assert cache.can_continue_from(past)
        cache.unshare()
        cache.crop(past)
        cache.stored = None
        before = self.module_state.exchange(cache.on_modules or self.module_state.initial)
        most_queries = None if turn.model_inputs else len(turn.token_ids) - past  # an image has more
        try:
            with torch.inference_mode(), bounded_attention(self._model.dtype, most_queries):
                logits, positions = self._forward(turn)
        finally:
            cache.on_modules = self.module_state.exchange(before)
        if cache.keeps:
            cache.positions, cache.stored = positions, len(turn.token_ids)
        else:
            cache.forget()
        return logits[len(logits) - turn.num_outputs :]

    def _forward(self, turn: TurnInput) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The logits of the last tokens, and the positions of all tokens."""
        cache, past, model = turn.cache, turn.past, self._model
        input_ids = torch.tensor([turn.token_ids], dtype=torch.long)
        num_new = input_ids.shape[1] - past
        if not cache.state:
            cache.state, cache.positions = new_generation_inputs(model, input_ids, turn.model_inputs)
        inputs = dict(cache.state)
        positions = _extended(cache, input_ids.shape[1])
        if positions is not None:
            inputs["position_ids"] = positions[..., past:]
        inputs = prepare_generation_inputs(model, input_ids, inputs, past=past)
        if "logits_to_keep" in inputs:  # some architectures ask for one row themselves
            inputs["logits_to_keep"] = max(1, turn.num_outputs)
        with _OutputRows(model, num_new, max(1, turn.num_outputs)):
            output = model(**inputs, return_dict=True)
        if past == 0:
            cache.state = {name: value for name, value in cache.state.items() if name not in turn.model_inputs}
        cache.state.update(cache_of_output(model, output))
        if cache.drafts and past == 0:
            record_past(cache.state)
        if num_new > 1 or past == 0:
            cache.state = compact(cache.state)
        logits: torch.Tensor = output.logits[0]
        return logits, positions


def _parts(cache: TurnCache) -> dict[tuple[str, int], StatePart]:
    return parts_of({**cache.state, "module": cache.on_modules})


def _extended(cache: TurnCache, length: int) -> torch.Tensor | None:
    """The positions of the first `length` tokens; those that are not known yet count on."""
    positions = cache.positions
    if positions is None or positions.shape[-1] >= length:
        return positions
    missing = torch.arange(1, 1 + length - positions.shape[-1]).expand(*positions.shape[:-1], -1)
    return torch.cat([positions, positions[..., -1:] + missing], dim=-1)


class _OutputRows:
    """Within the block the head computes only the last positions of this call; other calls may compute meanwhile."""

    def __init__(self, model: PreTrainedModel, num_tokens: int, num_outputs: int) -> None:
        head: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        self._head, self._num_tokens, self._num_outputs = head, num_tokens, num_outputs
        self._own = getcurrent()

    def __enter__(self) -> None:
        self._hook = None
        if self._head is not None and self._num_outputs < self._num_tokens:
            self._hook = self._head.register_forward_pre_hook(self._select)

    def __exit__(self, *_: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _select(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if getcurrent() is not self._own or args[0].shape[-2] != self._num_tokens:
            return None
        # `contiguous`, because on a slice `linear` would copy the whole weight.
        return (args[0][..., self._num_tokens - self._num_outputs :, :].contiguous(), *args[1:])
